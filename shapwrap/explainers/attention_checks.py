"""Whether what was recorded is a vision transformer of global attention."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from shapwrap.errors import UnsupportedBackboneError
from shapwrap.explainers.attention_recorder import AttentionLayer, AttentionRecorder

OTHERS = "Methods that read no attention work: integrated gradients, occlusion, RISE, KernelSHAP."


def check_shapes(
    recorder: AttentionRecorder, batch: int, num_patches: int, prefix: Sequence[int]
) -> int:
    """Number of prefix tokens, where every attention is one of all tokens.

    Raises:
        UnsupportedBackboneError: One is not: windows, pooled keys, attention of channels.
    """
    layers, poolings = recorder.layers, recorder.poolings
    if not layers:
        raise UnsupportedBackboneError(
            "no attention among tokens was seen in the forward pass; expected a vision transformer "
            f"of global attention, softmax(Q K^T) V. {OTHERS}"
        )
    shapes = {tuple(layer.weights.shape) for layer in layers}
    length = layers[0].weights.shape[-1]
    numbers = [n for n in shapes if n[0] != batch or n[-1] != length]
    by_hand = [tuple(s.shape) for s in recorder.softmaxes.values() if _is_square(s)]
    if numbers or length - num_patches not in prefix:
        raise UnsupportedBackboneError(
            f"attention has shapes {sorted(shapes)} for {batch} images of {num_patches} patches; "
            f"expected [B, heads, T, T] with T = {num_patches} patches + prefix tokens, the same "
            "in every block. Attention in windows or at several resolutions has no such map; for "
            f"a model whose own patch grid is another, pass grid=(rows, columns). {OTHERS}"
        )
    if by_hand:
        raise UnsupportedBackboneError(
            f"{len(by_hand)} softmaxes of shape {by_hand[0]} are not applied to values as they "
            "are (talking heads, gated positions); expected softmax(Q K^T) V in every block. "
            f"{OTHERS}"
        )
    keys = [weights.shape[-1] for _, weights in poolings]
    late = [place == len(layers) for place, _ in poolings]
    if len(poolings) > 1 or not all(late) or any(k not in (length, num_patches) for k in keys):
        shapes = [tuple(weights.shape) for _, weights in poolings]
        raise UnsupportedBackboneError(
            f"attention by other queries than the tokens has shapes {shapes}; expected at most one "
            f"such, after all blocks, that pools {num_patches} patches or all {length} tokens. "
            f"{OTHERS}"
        )
    return length - num_patches


def check_residual_stream(layers: list[AttentionLayer]) -> None:
    """Raise unless attention is added to tokens that run from block to block.

    Raises:
        UnsupportedBackboneError: It is not, or in place.
    """
    for index, layer in enumerate(layers):
        if layer.in_place or not layer.additions:
            how = "in place" if layer.in_place else "in no way that could be seen"
            raise UnsupportedBackboneError(
                f"the output of attention {index} is added to its tokens {how}; expected "
                f"tokens + attention(tokens), out of place. {OTHERS}"
            )
    for index, (before, after) in enumerate(pairwise(layers)):
        if after.additions[0].shortcut is not before.additions[-1].result:
            raise UnsupportedBackboneError(
                f"attention {index + 1} is not added to the tokens that the block before gave; "
                f"expected one residual stream through all blocks (no post-norm). {OTHERS}"
            )


def _is_square(softmax: Tensor) -> bool:
    return softmax.ndim >= 4 and softmax.shape[-1] == softmax.shape[-2] > 1
