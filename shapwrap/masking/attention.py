"""Token removal as an attention mask: who may look at whom."""

import torch
from jaxtyping import Bool
from torch import Tensor

from shapwrap.masking.packing import kernel_runs_on, packed_mask

AttentionMask = Bool[Tensor, "#items 1 #queries keys"]
"""True where a query token may attend to a key token."""


def pair_mask(
    present: Bool[Tensor, "items patches"], num_prefix: int, *, keep_prefix: bool
) -> AttentionMask:
    """Attention mask that runs a coalition and its complement in one pass over the tokens.

    A coalition and its complement partition the patches, so attention inside each part alone is
    the same as two passes with the other part physically removed. Where a kernel for it runs, the
    mask also packs the tokens of each part, so that attention costs no more than those two passes.

    Args:
        present: First coalition of each pair.
        num_prefix: Length of one copy of the class and register tokens.
        keep_prefix: The sequence starts with two copies of the prefix, one for each part.
            Otherwise it starts with one copy, which only sees itself and is seen by no patch.
    """
    part = present.long()
    num_parts = 2
    if num_prefix:
        shape = (present.shape[0], num_prefix)
        prefixes = [part.new_full(shape, 1), part.new_full(shape, 0)]
        part = torch.cat([*(prefixes if keep_prefix else [part.new_full(shape, 2)]), part], dim=1)
        num_parts = 2 if keep_prefix else 3
    mask = (part[:, :, None] == part[:, None, :])[:, None]
    return packed_mask(mask, part, num_parts) if kernel_runs_on(part.device) else mask


def removal_mask(
    present: Bool[Tensor, "items patches"], num_prefix: int, *, keep_prefix: bool
) -> AttentionMask:
    """Attention mask of one coalition an item, [items, 1, 1, T]: absent tokens are never keys.

    What absent tokens compute is never read, so their own rows need no mask. An item without any
    key may use all: its softmax would otherwise be over nothing, and none of its tokens is read.
    """
    prefix = present.new_full((present.shape[0], num_prefix), keep_prefix)
    keys = torch.cat((prefix, present), dim=1)
    return (keys | ~keys.any(dim=1, keepdim=True))[:, None, None]


def hidden_prefix_mask(num_prefix: int, num_patches: int, device: torch.device) -> AttentionMask:
    """Attention mask of the full image, [1, 1, 1, T], whose prefix tokens no patch can see."""
    keys = torch.ones(num_prefix + num_patches, dtype=torch.bool, device=device)
    keys[:num_prefix] = False
    return keys[None, None, None]


def masked_bias(bias: Tensor | None, mask: AttentionMask | None) -> Tensor | None:
    """One tensor for `scaled_dot_product_attention`: the bias, minus infinity where masked."""
    if bias is None or mask is None:
        return mask if bias is None else bias
    return torch.where(mask, bias, bias.new_full((), -torch.inf))


def mask_of_members(
    mask: AttentionMask | None, size: int
) -> Bool[Tensor, "#items 1 #member_queries member_keys"] | None:
    """The mask of units of `size` tokens, spread over their tokens, unit after unit."""
    if mask is None or size == 1:
        return mask
    keys = mask.repeat_interleave(size, dim=-1)
    return keys if mask.shape[-2] == 1 else keys.repeat_interleave(size, dim=-2)


def mask_of_patches(
    mask: AttentionMask | None, num_prefix: int
) -> Bool[Tensor, "#items 1 #patch_queries patch_keys"] | None:
    """The mask among the patches alone, for layers that the prefix does not enter."""
    if mask is None or num_prefix == 0:
        return mask
    among = mask[..., num_prefix:]
    if mask.shape[-2] > 1:
        among = among[..., num_prefix:, :]
    # Without the prefix a row may be left without any key; what it computes is never read.
    return among | ~among.any(dim=-1, keepdim=True)
