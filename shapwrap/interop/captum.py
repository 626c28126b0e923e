"""A wrapped model as a method of captum: for its metrics, its figures and its tunnels."""

from numbers import Integral
from typing import Any

from torch import Tensor

from shapwrap.errors import ArgumentError, MapError, MissingDependencyError, TargetError
from shapwrap.explanation import Explanation
from shapwrap.interop.pixel_maps import check_wrapped, pixel_map
from shapwrap.wrapper import ShapleyWrapper

try:
    from captum.attr import Attribution
    from captum.log import log_usage  # pyright: ignore[reportAttributeAccessIssue]
except ImportError as error:
    raise MissingDependencyError(
        "shapwrap.interop.captum needs captum; run: pip install 'shapwrap[explainers]'"
    ) from error

Target = int | tuple[int, ...] | Tensor | list[int] | list[tuple[int, ...]] | None
"""Classes, in all forms that captum takes for logits [B, K]."""


class ShapleyAttribution(Attribution):
    """captum's interface to the patch values of a wrapped model.

    A patch's value is shared equally among its pixels and their channels, so attributions have the
    shape of the inputs and sum to the logit minus `wrapped.baseline`. One forward pass, in eval
    mode, without gradients; modes are left as they were.

    Args:
        wrapped: The model. For a `ShapleyCLIP` pass `clip.classifier(texts)`.

    Raises:
        BackboneTypeError: No `ShapleyWrapper`.
        MissingDependencyError: captum is not installed (when this module is imported).
    """

    forward_func: ShapleyWrapper

    def __init__(self, wrapped: ShapleyWrapper):
        super().__init__(check_wrapped(wrapped))

    @property
    def multiplies_by_inputs(self) -> bool:
        """True: values are contributions in logits, not slopes."""
        return True

    def has_convergence_delta(self) -> bool:
        """True."""
        return True

    # NoiseTunnel calls `attribute.__wrapped__`, which captum's own decorator leaves behind.
    @log_usage()
    def attribute(  # pyright: ignore[reportIncompatibleVariableOverride]
        self,
        inputs: Tensor | tuple[Tensor],
        target: Target = None,
        additional_forward_args: None = None,
        return_convergence_delta: bool = False,
    ) -> Any:
        """Attributions [B, C, H, W], a tuple if inputs are, and their convergence deltas [B].

        float32, or float64 for a float64 model.

        Args:
            inputs: Images, float [B, C, H, W], normalised as the model was trained; or a tuple of
                just them.
            target: One class (an int, a tuple of one, a tensor of one) or one an image (a list,
                int64 [B]). The predicted class if None: pass the class to `NoiseTunnel` and to
                metrics, which call this with changed images.
            additional_forward_args: A wrapped model takes none.
            return_convergence_delta: Whether to return (attributions, deltas).

        Raises:
            ArgumentError: More inputs than images, or additional arguments.
            ImageTypeError: Images that are not floating point.
            ImageError: A shape or size that the model refuses, or pixels that are not finite.
            TargetError: A class that the model does not have.
        """
        images = _images(inputs, additional_forward_args)
        explanation = self.forward_func.explain(images, _classes(target))
        channels = images.shape[1]
        shares = pixel_map(explanation)[:, None] / channels
        attributions = shares.repeat(1, channels, 1, 1)
        formatted = (attributions,) if isinstance(inputs, tuple) else attributions
        if return_convergence_delta:
            return formatted, _delta(attributions, explanation)
        return formatted

    def compute_convergence_delta(  # pyright: ignore[reportIncompatibleVariableOverride]
        self,
        attributions: Tensor | tuple[Tensor],
        inputs: Tensor | tuple[Tensor],
        target: Target = None,
        additional_forward_args: None = None,
    ) -> Tensor:
        """Sum of the attributions minus (logit - `wrapped.baseline`), [B]: 0 up to rounding.

        Args:
            attributions: Of `attribute`, or of any method that claims the same sum.
            inputs: What was explained.
            target: As in `attribute`.
            additional_forward_args: A wrapped model takes none.

        Raises:
            MapError: Attributions of another shape than the inputs.
            ShapwrapError: What `attribute` says of inputs and target.
        """
        images = _images(inputs, additional_forward_args)
        explanation = self.forward_func.explain(images, _classes(target))
        maps = attributions[0] if isinstance(attributions, tuple) else attributions
        if maps.shape != images.shape:
            raise MapError(
                f"attributions have shape {tuple(maps.shape)}; expected that of the inputs, "
                f"{tuple(images.shape)}."
            )
        return _delta(maps, explanation)


def _images(inputs: Any, additional_forward_args: Any) -> Tensor:
    """The only tensor of the inputs."""
    if additional_forward_args is not None:
        raise ArgumentError(
            f"additional_forward_args is {type(additional_forward_args).__name__}; expected None: "
            "a wrapped model takes images alone."
        )
    if not isinstance(inputs, tuple):
        return inputs
    if len(inputs) != 1:
        raise ArgumentError(
            f"inputs are a tuple of {len(inputs)} tensors; expected images alone, [B, C, H, W]. "
            "A wrapped model has no other input whose part of the logit could be told."
        )
    return inputs[0]


def _classes(target: Any) -> Any:
    """What captum takes as a target of logits [B, K], as `ShapleyWrapper.explain` takes it."""
    if isinstance(target, Tensor):
        # captum takes a tensor of one element for the class of all images, whatever its shape.
        return target.reshape(()) if target.numel() == 1 else target
    if isinstance(target, list):
        return [_index(item) for item in target]
    return None if target is None else _index(target)


def _index(item: Any) -> int:
    """The class that an index, or a tuple of one, captum's form for outputs of any rank, names."""
    index = item[0] if isinstance(item, tuple) and len(item) == 1 else item
    if isinstance(index, bool) or not isinstance(index, Integral):
        raise TargetError(
            f"target has {item!r}; expected a class index: logits are [B, K]. For one class an "
            "image use a list or an int64 tensor."
        )
    return int(index)


def _delta(attributions: Tensor, explanation: Explanation) -> Tensor:
    return attributions.flatten(1).sum(dim=1) - explanation.explained()
