"""Where attention probabilities meet values, in the order of the blocks."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from shapwrap.errors import UnsupportedBackboneError
from shapwrap.explainers.relevance.tape import Operation, Tape

UNCHANGED = {"dropout", "to", "float", "double", "type", "type_as", "contiguous", "clone"}
UNCHANGED |= {"masked_fill"}
"""Operations that attention probabilities may pass on their way to the values."""


class AttentionProduct(NamedTuple):
    """Probabilities times values: one block's mixing of tokens."""

    operation: Operation
    """The product."""
    probabilities: Tensor
    """Its left operand, of [B, heads, queries, keys] or with images and heads in one axis."""

    def by_image(self, tensor: Tensor, batch: int) -> Float[Tensor, "batch heads queries keys"]:
        """The probabilities, or what has their shape, with an axis for the images."""
        return tensor if tensor.ndim == 4 else tensor.unflatten(0, (batch, -1))


def attention_products(tape: Tape, batch: int) -> list[AttentionProduct]:
    """All attentions of a forward pass over the same tokens, first block first.

    The last one may have other queries, as attentional pooling has.

    Raises:
        UnsupportedBackboneError: There is none; a softmax whose output is not what values are
            multiplied by; or attention within windows, over channels or over fewer tokens.
    """
    makers = {id(o): operation for operation in tape.operations for o in operation.outputs}
    found: list[AttentionProduct] = []
    used: set[int] = set()
    for operation in tape.operations:
        if operation.name not in ("matmul", "bmm") or len(operation.inputs) != 2:
            continue
        probabilities = operation.arguments[0]
        softmax = makers.get(id(probabilities))
        while softmax is not None and softmax.name in UNCHANGED:
            softmax = makers.get(id(softmax.inputs[0]))
        if softmax is not None and softmax.name == "softmax" and _over_keys(softmax):
            found.append(AttentionProduct(operation, probabilities))
            used.add(id(softmax))
    unused = [o for o in tape.operations if o.name == "softmax" and id(o) not in used]
    if unused:
        raise UnsupportedBackboneError(
            f"the model has a softmax (shape {tuple(unused[0].outputs[0].shape)}) whose output is "
            "not multiplied with values directly; expected plain attention in every block, and "
            "logits rather than probabilities at the end."
        )
    _check_shapes(found, batch)
    return found


def _over_keys(softmax: Operation) -> bool:
    axis = softmax.keywords.get("dim")
    if axis is None and len(softmax.arguments) > 1:
        axis = softmax.arguments[1]
    return axis in (-1, softmax.outputs[0].ndim - 1)


def _check_shapes(found: list[AttentionProduct], batch: int) -> None:
    if not found:
        raise UnsupportedBackboneError(
            "the model runs no attention (softmax, then a product with values); expected a vision "
            "transformer. For a CNN use Grad-CAM or integrated gradients."
        )
    shapes = [tuple(product.probabilities.shape) for product in found]
    tokens = shapes[0][-1]
    for place, shape in enumerate(shapes):
        by_image = len(shape) == 4 and shape[0] == batch
        merged = len(shape) == 3 and shape[0] % batch == 0
        square = shape[-2:] == (tokens, tokens) or (place + 1 == len(shapes) > 1)
        if not (by_image or merged) or not square or shape[-1] != tokens:
            raise UnsupportedBackboneError(
                f"attention probabilities have the shapes {shapes} for {batch} images; expected "
                f"[{batch}, heads, T, T] with the same T in every block: global attention, not "
                "windows, channels or a pyramid."
            )
