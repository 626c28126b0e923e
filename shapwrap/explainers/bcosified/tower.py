"""From CLIP's ModifiedResNet to a tower of B-cos layers with the same weights."""

from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shapwrap._types import Images
from shapwrap.backbones.base import Normalization
from shapwrap.backbones.open_clip_resnet import OpenClipResNet
from shapwrap.backbones.tower_whole import pixel_statistics, size_of_tower
from shapwrap.errors import ArgumentError, BackboneTypeError, UnsupportedBackboneError
from shapwrap.explainers.bcosified.attention_pool import BcosifiedAttentionPool
from shapwrap.explainers.bcosified.batch_norm import UncentredBatchNorm2d
from shapwrap.explainers.bcosified.dynamic import check_b
from shapwrap.explainers.bcosified.layers import BcosConv2d, Factor

KEPT = (nn.ReLU, nn.AvgPool2d, nn.Identity, nn.Dropout, BcosConv2d, BcosifiedAttentionPool)
"""Layers that are linear maps given their input, without bias, and stay as they are."""

Encoded = Float[Tensor, "batch doubled height width"]
"""Images in twice as many channels, x and 1 - x."""


class BcosifiedTower(nn.Module):
    """An image tower without biases whose embedding is W(x) x, linear in six channels.

    Takes images normalised as the original does, of any size from 31 pixels on.

    Args:
        body: A tower whose layers are B-cos layers; `bcosify` makes one.
        image_size: What the original was built for.
        normalization: Mean and deviation of the channels, where known.
    """

    def __init__(
        self, body: nn.Module, image_size: tuple[int, int], normalization: Normalization | None
    ):
        super().__init__()
        self.body: Any = body
        self.image_size = image_size
        self.normalization = normalization

    def forward(self, images: Images) -> Float[Tensor, "batch embedding"]:
        """Embeddings; not of unit length, as CLIP's towers give them."""
        return self.embed(self.encode(images))

    def encode(self, images: Images) -> Encoded:
        """The channels [x, 1 - x] of pixels x in 0 ... 1, normalised by (m, 1 - m) and s.

        With images normalised by m and s this is [z, -z], z being the images, whatever m and s are:
        (1 - x - (1 - m)) / s = -(x - m) / s.
        """
        return torch.cat((images, -images), dim=1)

    def embed(self, encoded: Encoded) -> Float[Tensor, "batch embedding"]:
        """Embeddings of encoded images, by attention pooling."""
        return self.body.attnpool(self.features(encoded))

    def embed_places(self, encoded: Encoded) -> Float[Tensor, "batch places embedding"]:
        """An embedding for each place of the last map, row by row; not of unit length."""
        return self.body.attnpool.unpooled(self.features(encoded))

    def features(self, encoded: Encoded) -> Float[Tensor, "batch features rows columns"]:
        """The last map, before any pooling."""
        feature_map = self.body.stem(encoded)
        for level in ("layer1", "layer2", "layer3", "layer4"):
            feature_map = getattr(self.body, level)(feature_map)
        return feature_map


def bcosify(
    tower: nn.Module,
    *,
    b: float = 2.0,
    factor: Factor | str = "cosine",
    normalization: Normalization | None = None,
) -> BcosifiedTower:
    """A new tower of B-cos layers with copies of the weights; the given one is not changed.

    - The first convolution reads [x, 1 - x] with weights (W, -W) / 2: the same response.
    - Convolutions and the output projection of the attention pooling become B-cos layers; without
      weight normalisation, so that b = 1 leaves them linear.
    - Batch normalisations keep gain and running variance, and lose mean and bias; the positional
      embedding and all other biases are left out.
    - Max pools become average pools.

    All parameters are trainable, in float32 at least. It needs training (`BcosifiedCLIP.fit`):
    without it the embeddings are those of no model.

    Args:
        tower: open_clip's ModifiedResNet, of any size, recognised by its parts.
        b: B; `set_b` changes it later.
        factor: "cosine" as in the papers, or "response" as in the authors' code, |w . x| / |x|,
            which the weights' lengths scale; for weights that were trained with that code.
        normalization: Mean and deviation of the channels; by default what the tower states.

    Raises:
        UnsupportedBackboneError: Another tower, or a layer in it that is no linear map.
        ArgumentError: An exponent below 1, or an unknown factor.
        BackboneTypeError: A whole image-text model, a tower of this kind already, or no module.
    """
    check_b(b)
    _check_tower(tower)
    body: Any = deepcopy(tower)
    channels = body.conv1.in_channels
    stated = normalization or pixel_statistics(tower)
    if stated is not None and {len(stated.mean), len(stated.std)} != {channels}:
        raise ArgumentError(
            f"normalization has {len(stated.mean)} means and {len(stated.std)} deviations; "
            f"expected {channels}, one a channel."
        )
    weight = body.conv1.weight
    doubled = torch.cat((weight, -weight), dim=1) / 2
    body.conv1 = BcosConv2d(body.conv1, b=b, factor=factor, weight=doubled)
    body.attnpool = BcosifiedAttentionPool(body.attnpool, b=b, factor=factor)
    _convert(body, "", b, factor)
    size = size_of_tower(tower) or (224, 224)
    return BcosifiedTower(body, size, stated).train(tower.training)


def _check_tower(tower: nn.Module) -> None:
    name = type(tower).__name__
    if isinstance(tower, BcosifiedTower) or not isinstance(tower, nn.Module):
        raise BackboneTypeError(
            f"tower is {name}; expected open_clip's ModifiedResNet, not B-cosified yet."
        )
    if isinstance(visual := getattr(tower, "visual", None), nn.Module):
        raise BackboneTypeError(
            f"tower is {name}, an image-text model; expected its image tower "
            f"({type(visual).__name__}). Pass model.visual."
        )
    if not OpenClipResNet.recognises(tower) or not hasattr(tower, "conv1"):
        raise UnsupportedBackboneError(
            f"tower is {name}; expected open_clip's ModifiedResNet (RN50, RN101, RN50x4 ...): "
            "B-cosified CLIP is defined for it alone. The layers of transformers and of other "
            "trunks have biases, norms and gates that these rules do not turn into linear maps, "
            "and no B-cosified CLIP of theirs is published. Use open_clip.create_model('RN50')."
        )


def _convert(module: nn.Module, path: str, b: float, factor: Factor | str) -> None:
    """Replaces the layers below a module.

    Raises:
        UnsupportedBackboneError: A layer that is neither known nor made of known ones.
    """
    for name, child in module.named_children():
        here = f"{path}.{name}".lstrip(".")
        if isinstance(child, KEPT):
            continue
        if isinstance(child, nn.Conv2d):
            setattr(module, name, BcosConv2d(child, b=b, factor=factor))
        elif getattr(child, "running_var", None) is not None:
            setattr(module, name, UncentredBatchNorm2d(child))
        elif isinstance(child, nn.MaxPool2d):
            setattr(module, name, _average(child, here))
        elif list(child.children()) and not list(child.parameters(recurse=False)):
            _convert(child, here, b, factor)
        else:
            raise UnsupportedBackboneError(
                f"layer {here!r} is {type(child).__name__}; expected convolutions, batch "
                "normalisations with running statistics, ReLUs and pools, which are linear maps "
                "given their input."
            )


def _average(pool: nn.MaxPool2d, path: str) -> nn.AvgPool2d:
    if pool.dilation not in (1, (1, 1)):
        raise UnsupportedBackboneError(
            f"layer {path!r} is a max pool with dilation {pool.dilation}; expected 1, for there is "
            "no average pool like it."
        )
    sizes: Any = {"stride": pool.stride, "padding": pool.padding, "ceil_mode": pool.ceil_mode}
    return nn.AvgPool2d(pool.kernel_size, **sizes)
