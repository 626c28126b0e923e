"""What a person should know about a wrapped model before using it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from shapwrap._types import Grid
from shapwrap.backbones.stride_one import native_strides
from shapwrap.choosing import Masking
from shapwrap.flops import count_operations
from shapwrap.probing import random_images, undisturbed
from shapwrap.readout.readouts import CosineReadout
from shapwrap.wrapping import Wrapping

if TYPE_CHECKING:
    from shapwrap.wrapper import ShapleyWrapper


class BeforeAfter(NamedTuple):
    """A count for the original model and for the wrapped one."""

    before: int
    after: int


@dataclass(frozen=True)
class Report:
    """Summary of a wrapped model; print it."""

    backbone: str
    """Class of the model and the adapter in use."""
    masking: Masking
    """How an absent patch is hidden."""
    readout: str
    """How the pretrained head is shared among patches."""
    grid: Grid
    """Rows and columns of patches at `image_size`."""
    image_size: tuple[int, int]
    """Height and width in pixels for which the numbers here hold."""
    num_classes: int
    """K."""
    max_logit_difference: float
    """Largest |wrapped - original logit| on two images of noise, measured at wrap time."""
    params: BeforeAfter
    """Number of parameters."""
    flops: BeforeAfter
    """Multiply-adds of one image, half of what FlopCounterMode counts: the logits of the original
    model, and logits with the patch values of all classes of the wrapped one (the paper's unit)."""
    flops_logits: int
    """Multiply-adds of one image for the logits alone, which pool before the classifier."""
    exact: bool
    """Whether the logits are those of the original model, or of a new `head` on the very features
    that its classifier reads, up to rounding on two images of noise."""
    note: str
    """What the user should know, in sentences."""

    def __str__(self) -> str:
        """The summary as aligned lines."""
        rows = {
            "backbone": self.backbone,
            "masking": self.masking,
            "readout": self.readout,
            "grid": f"{self.grid[0]} x {self.grid[1]} patches "
            f"at {self.image_size[0]} x {self.image_size[1]} pixels",
            "classes": str(self.num_classes),
            "max logit difference": f"{self.max_logit_difference:.2g}",
            "parameters": f"{self.params.before / 1e6:.2f} M -> {self.params.after / 1e6:.2f} M",
            "multiply-adds": f"{self.flops.before / 1e9:.2f} G -> {self.flops.after / 1e9:.2f} G "
            f"with all patch values, {self.flops_logits / 1e9:.2f} G for the logits",
            "note": self.note,
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())


def report_on(
    wrapped: "ShapleyWrapper",
    model: nn.Module,
    wrapping: Wrapping,
    params_before: int,
    *,
    new_head: bool,
) -> Report:
    """The report of a wrapped model: counts what it costs, before and after.

    Args:
        wrapped: The wrapper, with `attribute`.
        model: What it wraps.
        wrapping: How.
        params_before: Parameters of the model before it was wrapped.
        new_head: Whether the classifier was replaced.
    """
    image = random_images(wrapping.backbone, wrapping.image_size, batch=1)
    after = count_multiply_adds(wrapped, lambda: wrapped.attribute(image))
    logits_alone = count_multiply_adds(wrapped, lambda: wrapped(image))
    with native_strides(wrapping.stride_changes):
        before = count_multiply_adds(model, lambda: model(image))
    return Report(
        backbone=f"{type(model).__name__} ({wrapping.backbone.family})",
        masking=wrapping.masking,
        readout=wrapping.head.readout.name,
        grid=wrapping.grid,
        image_size=wrapping.image_size,
        num_classes=wrapping.head.classifier.num_classes,
        max_logit_difference=wrapping.max_logit_difference,
        params=BeforeAfter(params_before, count_parameters(wrapped)),
        flops=BeforeAfter(before, after),
        flops_logits=logits_alone,
        exact=is_exact(wrapping),
        note=note_for(wrapping, new_head=new_head),
    )


def count_multiply_adds(model: nn.Module, call: Callable[[], object]) -> int:
    """Multiply-adds of one call, with `model` in eval mode; the model is left as it was."""
    with undisturbed(model):
        return count_operations(call)


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, frozen ones included."""
    return sum(parameter.numel() for parameter in model.parameters())


def is_exact(wrapping: Wrapping) -> bool:
    """Whether the logits are the original ones, up to rounding."""
    return wrapping.max_logit_difference <= 1e-4 * max(wrapping.logit_scale, 1e-6)


def note_for(wrapping: Wrapping, *, new_head: bool) -> str:
    """Sentences on what changed and what must come first."""
    sentences = []
    if wrapping.class_token_dropped:
        sentences.append(
            "The pretrained head reads the class token, which was dropped; it now reads the patch "
            "tokens: fine-tune before use."
        )
    if wrapping.registers_dropped:
        sentences.append(
            "The class and register tokens, which patches could see, were dropped: fine-tune "
            "before use."
        )
    if isinstance(wrapping.head.readout, CosineReadout) and not is_exact(wrapping):
        sentences.append(
            "Each patch's embedding is brought to unit length before the mean, so similarities are "
            "not those of the pretrained embedding: fine-tune before use."
        )
    if wrapping.stride_changes:
        sentences.append(
            f"{len(wrapping.stride_changes)} layers run at stride 1 for the finer grid, which "
            "changes the logits: fine-tune before use."
        )
    if wrapping.max_logit_difference == 0.0 == wrapping.logit_scale:
        sentences.append("The head is all zero: train it before use.")
    elif new_head and isinstance(wrapping.head.readout, CosineReadout):
        sentences.append(
            "Embeddings are compared with the rows of the head: embeddings of texts, or new ones "
            "that must be trained before use."
        )
    elif new_head:
        sentences.append("The head is new: train it before use.")
    elif is_exact(wrapping) and not sentences:
        nobody = wrapping.head.reads_class_token
        sentences.append(
            "The logits are those of the original model; the patch values sum to them"
            f"{' minus the baseline, what the class token says alone' if nobody else ''}, and only "
            "training with shapley_loss makes them Shapley values."
        )
    if wrapping.head.patch_layer is not None:
        sentences.append(
            "The head is kept whole: each patch gets an equal share of its output until a layer of "
            "its own is trained with shapley_loss."
        )
    if wrapping.why_not_removal:
        sentences.append(f"Patches are hidden by zeroing pixels: {wrapping.why_not_removal}")
    return " ".join(sentences)
