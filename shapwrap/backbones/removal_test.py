"""Proof, at wrap time, that patches of a token model can be removed before the first block."""

import torch
from torch import Tensor

from shapwrap._types import Grid, Images
from shapwrap.backbones.tokens import TokenBackbone, TokenSequence
from shapwrap.errors import MaskingError
from shapwrap.masking.attention import hidden_prefix_mask
from shapwrap.masking.pixels import pixel_mask

EFFECT_TOLERANCE = 1e-2
"""Largest error, as a share of what removal changes at all."""

ROUNDING_TOLERANCE = 2e-5
"""Largest error, as a share of the size of the features, that float32 rounding may cause."""


def check_removal(backbone: TokenBackbone, images: Images) -> None:
    """Raise unless removing tokens before the first block is removing patches from the image.

    Four facts are tested on `images`. The adapter's parts replay the model's own forward pass;
    the token of a present patch depends on pixels of present patches alone; permuting patch tokens,
    with their positions, permutes the output (nothing but global attention mixes them); and the
    attention mask in use equals physically gathering the tokens.

    Raises:
        MaskingError: Which of the four fails, by how much.
    """
    name = type(backbone.model).__name__
    replayed = check_replay(backbone, images)
    sequence = backbone.embed(images)
    _check_local(backbone, images, sequence.grid, name)
    num_prefix, num_patches = sequence.prefix.shape[1], sequence.patches.shape[1]
    kept = torch.arange(0, num_patches, 2, device=images.device)
    gathered = _encode(backbone, sequence.take(kept))[:, num_prefix:]
    patches = replayed[:, num_prefix:]
    effect = _largest(gathered - patches[:, kept])
    scale = _largest(replayed)
    allowed = EFFECT_TOLERANCE * effect + ROUNDING_TOLERANCE * scale

    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(num_patches, generator=generator).to(images.device)
    permuted = _encode(backbone, sequence.take(order))[:, num_prefix:]
    errors = {
        "permuting patch tokens permutes its output": _largest(permuted - patches[:, order]),
        "masking attention equals removing tokens": _mask_error(
            backbone, images, kept, num_patches
        ),
    }
    for fact, error in errors.items():
        if not error <= allowed:
            raise MaskingError(
                f"{name} fails the removal test '{fact}': the error is {error:.2g}, allowed "
                f"{allowed:.2g}. Something besides global attention mixes or places its tokens; "
                "use masking='zero-mask'."
            )


def check_replay(backbone: TokenBackbone, images: Images) -> Tensor:
    """All tokens [B, T, D] from the adapter's parts; raises unless they are the model's own.

    Raises:
        MaskingError: They differ.
    """
    name = type(backbone.model).__name__
    replayed = _encode(backbone, backbone.embed(images))
    original = backbone.original_tokens(images)
    if original.shape == replayed.shape:
        error = _largest(original - replayed)
        if error <= ROUNDING_TOLERANCE * _largest(original):
            return replayed
        came = f"tokens that differ by {error:.2g}"
    else:
        came = f"tokens of shape {tuple(replayed.shape)}, not {tuple(original.shape)}"
    raise MaskingError(
        f"{name} fails the removal test 'its parts replay its own forward pass': they give {came}. "
        "It does more than embed, attend and normalise; use masking='zero-mask'."
    )


def _encode(backbone: TokenBackbone, sequence: TokenSequence) -> Tensor:
    return backbone.encode(
        torch.cat((sequence.prefix, sequence.patches), dim=1), sequence.positions, None
    )


def _check_local(backbone: TokenBackbone, images: Images, grid: Grid, name: str) -> None:
    """Change every pixel outside one patch: its token, alone, must not change by one bit."""
    rows, columns = grid
    row, column = rows // 2, columns // 2
    alone = torch.zeros(images.shape[0], 1, rows * columns, dtype=torch.bool, device=images.device)
    alone[:, :, row * columns + column] = True
    size = (images.shape[-2], images.shape[-1])
    inside = pixel_mask(alone, grid, size, backbone.covered(size, grid))
    changed = torch.where(inside, images, images.flip(0) * -1.5 + 0.3)
    before, after = (
        backbone.embed_present(pixels, alone, paired=False).patches[alone[:, 0]]
        for pixels in (images, changed)
    )
    if not torch.equal(before, after):
        raise MaskingError(
            f"{name} mixes patches before its token slot: the token of patch ({row}, {column}) "
            "changes when only pixels of other patches change, so a removed patch would leak. "
            "Use masking='zero-mask'."
        )


def _mask_error(backbone: TokenBackbone, images: Images, kept: Tensor, num_patches: int) -> float:
    """Masked passes against gathered tokens, for the kept half, paired and not."""
    present = torch.zeros(num_patches, dtype=torch.bool, device=images.device)
    present[kept] = True
    coalitions = torch.stack((present, ~present)).expand(images.shape[0], 2, -1)
    gathered = torch.stack(
        [_gathered_mean(backbone, images, coalition) for coalition in (present, ~present)], dim=1
    )
    return max(
        _largest(backbone.present_means(images, coalitions, paired=paired) - gathered)
        for paired in (True, False)
    )


def _gathered_mean(backbone: TokenBackbone, images: Images, coalition: Tensor) -> Tensor:
    """Mean feature of the present patches, with the tokens of absent ones out of the sequence."""
    alone = coalition.expand(images.shape[0], 1, -1)
    remaining = backbone.embed_present(images, alone, paired=False).take(coalition.nonzero()[:, 0])
    mask = None
    if backbone.prefix_tokens == "drop" and remaining.prefix.shape[1]:
        if remaining.prefix_has_slots:
            mask = hidden_prefix_mask(
                remaining.prefix.shape[1], remaining.patches.shape[1], images.device
            )
        else:
            positions = remaining.positions
            remaining = remaining._replace(
                prefix=remaining.prefix[:, :0],
                positions=None if positions is None else positions.with_prefix_copies(0),
            )
    tokens = torch.cat((remaining.prefix, remaining.patches), dim=1)
    encoded = backbone.encode(tokens, remaining.positions, mask)
    everyone = encoded.new_ones(encoded.shape[:2], dtype=torch.bool)
    return backbone.read(encoded, everyone, remaining.prefix.shape[1], copies=1).mean(dim=1)


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())
