"""A wrapped model in the metrics of Quantus, which need not be installed for this."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from shapwrap.errors import ArgumentError
from shapwrap.images import first_weight
from shapwrap.interop.pixel_maps import check_wrapped, pixel_map


def explain_func(
    model: Any, inputs: np.ndarray | Tensor, targets: Any, *, device: Any = None, **unknown: Any
) -> np.ndarray:
    """Maps [B, 1, H, W] that sum to the logit minus `model.baseline`, as Quantus asks for them.

    Pass it as `explain_func=` to any metric, with the wrapped model in eval mode as `model=`:
    Quantus asks for the mode itself.

    Args:
        model: A `ShapleyWrapper`. For a `ShapleyCLIP` pass `clip.classifier(texts)`.
        inputs: Images, float [B, C, H, W], normalised as the model was trained. Brought to the
            device and the precision of the model.
        targets: One class an image, int [B], or one for all; the predicted class if None.
        device: What Quantus was told, and passes on; images go where the model lies.
        **unknown: Quantus passes on `explain_func_kwargs`; there is nothing else to choose.

    Raises:
        ArgumentError: Other options.
        BackboneTypeError: No `ShapleyWrapper`.
        ImageTypeError: Images that are not floating point.
        ImageError: A shape or size that the model refuses, or pixels that are not finite.
        TargetError: A class that the model does not have.
    """
    if unknown:
        raise ArgumentError(
            f"explain_func_kwargs has {sorted(unknown)}; expected nothing but device: the values "
            "of a wrapped model need no option."
        )
    wrapped = check_wrapped(model)
    images: Any = torch.as_tensor(inputs) if isinstance(inputs, np.ndarray) else inputs
    weight = first_weight(wrapped)
    if isinstance(images, Tensor) and images.is_floating_point() and weight is not None:
        # Noise of NumPy turns what Quantus perturbs into float64.
        images = images.to(weight)
    maps = pixel_map(wrapped.explain(images, targets))
    return maps[:, None].cpu().numpy()
