"""Attention inside the parts of a sequence, packed: no work is spent between the parts."""

from importlib.util import find_spec
from inspect import signature
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

KERNEL_DTYPES = (torch.bfloat16, torch.float16)
"""Precisions of the variable-length kernels."""

LARGEST_HEAD = 256
"""Features of a head that the kernels can hold."""

Heads = Float[Tensor, "items heads tokens features"]
Packed = Float[Tensor, "all_tokens heads features"]


class Packing(NamedTuple):
    """Where each token of a batch goes when the tokens of every part are brought together."""

    order: Int[Tensor, " all_tokens"]
    """The token, counted over the whole batch, at each place of the packing."""
    places: Int[Tensor, " all_tokens"]
    """The place of each token: the inverse of `order`."""
    boundaries: Int[Tensor, " segments_and_one"]
    """First place of every part of every item, and the end, int32; parts may be empty."""
    longest: int
    """Bound of the length of a part, known without a look at the tensors."""


def pack(part: Int[Tensor, "items tokens"], num_parts: int) -> Packing:
    """The packing of sequences whose tokens belong to parts 0 to `num_parts` - 1.

    Sizes of parts are data, so nothing here may depend on them in shape: the host never waits.
    """
    items, length = part.shape
    member = part[:, :, None] == torch.arange(num_parts, device=part.device)
    counts = member.sum(dim=1)
    first_of_item = torch.arange(items, device=part.device)[:, None] * length
    ends = counts.cumsum(dim=1) + first_of_item
    rank = member.cumsum(dim=1) - 1
    places = torch.where(member, rank + (ends - counts)[:, None], 0).sum(dim=2).flatten()
    order = torch.empty_like(places).scatter_(
        0, places, torch.arange(items * length, device=part.device)
    )
    boundaries = functional.pad(ends.flatten(), (1, 0)).to(torch.int32)
    return Packing(order, places, boundaries, length)


class PackedMask(Tensor):
    """A boolean attention mask that knows the packing which does the same with less work.

    To `scaled_dot_product_attention` it means packed attention where the kernel can run, to
    everything else it is the mask. It goes through any layer that hands its mask on, and through
    recomputation, like any other argument.
    """

    packing: Packing

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Attention is packed; all else sees a plain tensor."""
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return _attend(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


def packed_mask(
    mask: Bool[Tensor, "items 1 tokens tokens"], part: Int[Tensor, "items tokens"], num_parts: int
) -> Tensor:
    """The same mask, packed; `part` says which tokens see each other."""
    packed = mask.as_subclass(PackedMask)
    packed.packing = pack(part, num_parts)
    return packed


def kernel_runs_on(device: torch.device) -> bool:
    """Whether variable-length attention is built for this device: CUDA from Ampere on."""
    return device.type == "cuda" and _cuda_kernel(device.index)


@torch.compiler.assume_constant_result
def _cuda_kernel(index: int | None) -> bool:
    return (
        _torch_has_it()
        and torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(index) >= (8, 0)
    )


def _torch_has_it() -> bool:
    """Whether this torch has the function, with all options that are used of it."""
    if find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention.varlen import varlen_attn

    return {"scale", "window_size"} <= set(signature(varlen_attn).parameters)


def variable_length_attention(
    query: Packed, key: Packed, value: Packed, packing: Packing, scale: float | None
) -> Packed:
    """Attention of packed tokens, each within its part."""
    from torch.nn.attention.varlen import varlen_attn

    ends, longest = packing.boundaries, packing.longest
    # A window over everything changes no result, but keeps cuDNN out, which before 9.25 may give
    # NaN where a part is empty.
    window = (longest, longest)
    attended = varlen_attn(
        query, key, value, ends, ends, longest, longest, scale=scale, window_size=window
    )
    return cast(Tensor, attended)


def _attend(
    query: Heads,
    key: Heads,
    value: Heads,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Heads:
    """`scaled_dot_product_attention` with a packed mask."""
    with torch._C.DisableTorchFunctionSubclass():
        device = query.device.type
        dtype = query.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        if (
            not isinstance(attn_mask, PackedMask)
            or dropout_p
            or is_causal
            or dtype not in KERNEL_DTYPES
            or not _fit(query, key, value, attn_mask)
        ):
            return functional.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
                enable_gqa=enable_gqa,
            )  # fmt: skip
        packing = attn_mask.packing
        rows, keys, values = (
            _Permute.apply(_rows(heads.to(dtype)), packing.order, packing.places)
            for heads in (query, key, value)
        )
        attended = variable_length_attention(rows, keys, values, packing, scale)
        unpacked = _Permute.apply(attended, packing.places, packing.order)
        return unpacked.unflatten(0, (query.shape[0], query.shape[2])).transpose(1, 2)


def _fit(query: Heads, key: Heads, value: Heads, mask: Tensor) -> bool:
    """Whether these are the tokens of the mask, and heads that the kernels can hold."""
    features = query.shape[-1]
    return (
        query.ndim == 4
        and query.shape == key.shape == value.shape
        and (query.shape[0], query.shape[2]) == (mask.shape[0], mask.shape[-1])
        and features % 8 == 0
        and features <= LARGEST_HEAD
    )


def _rows(heads: Heads) -> Packed:
    return heads.transpose(1, 2).flatten(0, 1)


class _Permute(torch.autograd.Function):
    """Rows in another order; the gradient takes the way back, without sums over indices."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        """The rows that `order` names."""
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The gradient, in the order of before."""
        return gradients[0].index_select(0, ctx.saved_tensors[0]), None, None
