"""ViT-Shapley's explainer: the surrogate's blocks, one attention block more, an MLP a token."""

from copy import deepcopy
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from shapwrap._types import Images, PatchValues
from shapwrap.explainers.trained.token_surrogate import TokenSurrogate
from shapwrap.probing import random_images, undisturbed


class TokenNetwork(nn.Module):
    """Images to raw patch values [B, N, K].

    Args:
        surrogate: Whose weights the backbone starts from; copied.
        image_size: Height and width of the images.
        num_classes: K.
        mlp_ratio: Hidden width of the new layers, as a multiple of the tokens' width.
        bounded: End in tanh, for values of probabilities, none of which exceeds 1.

    References:
        Covert et al. 2023.
    """

    def __init__(
        self,
        surrogate: TokenSurrogate,
        image_size: tuple[int, int],
        num_classes: int,
        *,
        mlp_ratio: float,
        bounded: bool,
    ):
        super().__init__()
        self.encoder = deepcopy(surrogate)
        noise = random_images(self.encoder.backbone, image_size, batch=1)
        with undisturbed(self.encoder):
            width = self.encoder.backbone.whole_tokens(noise)[0].shape[-1]
        hidden = max(1, round(width * mlp_ratio))
        self.block = _Block(width, hidden, _num_heads(surrogate.model, width))
        self.head = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, num_classes),
        )
        self._bounded = bounded
        for layer in (*self.block.modules(), *self.head.modules()):
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.to(noise)
        self._freeze_unread(noise)

    def forward(self, images: Images) -> PatchValues:
        """Raw values, before normalisation."""
        tokens, _, num_prefix = self.encoder.backbone.whole_tokens(images)
        # Class and register tokens take part in attention, and have no value of their own.
        values = self.head(self.block(tokens)[:, num_prefix:])
        return torch.tanh(values) if self._bounded else values

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: those of the model."""
        told: Any = getattr(self.encoder.model, "no_weight_decay", None)
        listed: Any = told() if callable(told) else ()
        return {f"encoder.model.{name}" for name in listed}

    def _freeze_unread(self, images: Images) -> None:
        """The classifier is not read here, and several processes wait for all gradients."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            gradients = torch.autograd.grad(self(images).sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)


class _Block(nn.Module):
    """A pre-norm attention block without its first norm: the tokens are normed already."""

    def __init__(self, width: int, hidden: int, num_heads: int):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self._num_heads = num_heads

    def forward(self, tokens: Tensor) -> Tensor:
        queries, keys, values = rearrange(
            self.qkv(tokens), "b t (three h d) -> three b h t d", three=3, h=self._num_heads
        )
        attended = functional.scaled_dot_product_attention(queries, keys, values)
        tokens = tokens + self.projection(rearrange(attended, "b h t d -> b t (h d)"))
        return tokens + self.mlp(self.norm(tokens))


def _num_heads(model: nn.Module, width: int) -> int:
    """As many as the model's own blocks have, where that divides the width; else of 64 each."""
    for module in model.modules():
        heads = getattr(module, "num_heads", None)
        if isinstance(heads, int) and heads > 0 and width % heads == 0:
            return heads
    return width // 64 if width % 64 == 0 else 1
