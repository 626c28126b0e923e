"""Proof, at wrap time, that patches of a token model can be removed before the first block."""

import torch
from torch import Tensor

from shapwrap._types import Images
from shapwrap.backbones.tokens import TokenBackbone, TokenSequence
from shapwrap.errors import MaskingError

EFFECT_TOLERANCE = 1e-2
"""Largest error, as a share of what removal changes at all."""

ROUNDING_TOLERANCE = 2e-5
"""Largest error, as a share of the size of the features, that float32 rounding may cause."""


def check_removal(backbone: TokenBackbone, images: Images) -> None:
    """Raise unless removing tokens before the first block is removing patches from the image.

    Four facts are tested on `images`. The adapter's parts replay the model's own forward pass;
    each token depends on the pixels of its patch alone; permuting patch tokens, with their rotary
    positions, permutes the output (nothing but global attention mixes them); and the attention
    mask in use equals physically gathering the tokens.

    Raises:
        MaskingError: Which of the four fails, by how much.
    """
    name = type(backbone.model).__name__
    replayed = check_replay(backbone, images)
    sequence = backbone.embed(images)
    _check_local(backbone, images, sequence, name)
    num_prefix, num_patches = sequence.prefix.shape[1], sequence.patches.shape[1]
    kept = torch.arange(0, num_patches, 2, device=images.device)
    gathered = _encode(backbone, _take(sequence, kept))[:, num_prefix:]
    patches = replayed[:, num_prefix:]
    effect = _largest(gathered - patches[:, kept])
    scale = _largest(replayed)
    allowed = EFFECT_TOLERANCE * effect + ROUNDING_TOLERANCE * scale

    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(num_patches, generator=generator).to(images.device)
    permuted = _encode(backbone, _take(sequence, order))[:, num_prefix:]
    errors = {
        "permuting patch tokens permutes its output": _largest(permuted - patches[:, order]),
        "masking attention equals removing tokens": _mask_error(backbone, images, sequence, kept),
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
        torch.cat((sequence.prefix, sequence.patches), dim=1), sequence.rotary, None
    )


def _take(sequence: TokenSequence, index: Tensor) -> TokenSequence:
    rotary = sequence.rotary
    return sequence._replace(
        patches=sequence.patches[:, index],
        rotary=None if rotary is None else rotary.index_select(-2, index),
    )


def _check_local(
    backbone: TokenBackbone, images: Images, sequence: TokenSequence, name: str
) -> None:
    """Change every pixel outside one patch: its token must not change by one bit."""
    rows, columns = sequence.grid
    height, width = images.shape[-2:]
    row, column = rows // 2, columns // 2
    outside = torch.ones(height, width, dtype=torch.bool, device=images.device)
    outside[
        row * height // rows : (row + 1) * height // rows,
        column * width // columns : (column + 1) * width // columns,
    ] = False
    changed = backbone.embed(torch.where(outside, images.flip(0) * -1.5 + 0.3, images))
    token = row * columns + column
    if not torch.equal(changed.patches[:, token], sequence.patches[:, token]):
        raise MaskingError(
            f"{name} mixes patches before its token slot: the token of patch ({row}, {column}) "
            "changes when only pixels of other patches change, so a removed patch would leak. "
            "Use masking='zero-mask'."
        )


def _mask_error(
    backbone: TokenBackbone, images: Images, sequence: TokenSequence, kept: Tensor
) -> float:
    """Masked passes against gathered tokens, for the kept half, paired and not."""
    num_patches = sequence.patches.shape[1]
    present = torch.zeros(num_patches, dtype=torch.bool, device=images.device)
    present[kept] = True
    coalitions = torch.stack((present, ~present)).expand(images.shape[0], 2, -1)
    expected = []
    for coalition in (present, ~present):
        remaining = _take(sequence, coalition.nonzero()[:, 0])
        if backbone.prefix_tokens == "drop" and sequence.rotary is None:
            remaining = remaining._replace(prefix=remaining.prefix[:, :0])
        mask = None
        num_prefix = remaining.prefix.shape[1]
        if backbone.prefix_tokens == "drop" and num_prefix:
            mask = torch.ones(
                1, 1, 1, num_prefix + remaining.patches.shape[1], device=images.device
            ).bool()
            mask[..., :num_prefix] = False
        tokens = torch.cat((remaining.prefix, remaining.patches), dim=1)
        encoded = backbone.encode(tokens, remaining.rotary, mask)
        everyone = encoded.new_ones(encoded.shape[:2], dtype=torch.bool)
        expected.append(backbone.weigh(encoded, everyone, num_prefix).mean(dim=1))
    gathered = torch.stack(expected, dim=1)
    return max(
        _largest(backbone.present_means(images, coalitions, paired=paired) - gathered)
        for paired in (True, False)
    )


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())
