"""Token removal as the paper says it: one image, one coalition, tokens gathered by hand."""

import copy

import torch
from torch import nn

from tests.backbones import READOUTS


def reference_value(case, image: torch.Tensor, coalition: torch.Tensor) -> torch.Tensor:
    """v(s) [K] of one image and one coalition, with absent tokens physically removed."""
    model = copy.deepcopy(case.wrapped.model).eval()
    keep = coalition.nonzero()[:, 0]
    if len(keep) == 0:
        return torch.zeros(case.wrapped.num_classes, dtype=image.dtype)
    family = case.kind.split("-")[0]
    features = ENCODERS.get(family, _timm_tokens)(model, image[None], keep, case)[0]
    num_patches = case.wrapped.num_patches
    if "-map" in case.kind:
        return model.forward_head(features[None])[0] * len(keep) / num_patches
    if case.kind == "torchvision-vit":
        return model.heads(features).sum(0) / num_patches
    if READOUTS.get(case.kind, "affine") == "affine":
        return model.head(features).sum(0) / num_patches
    return _head_after_mean(model)(features.mean(0)) * len(keep) / num_patches


def _head_after_mean(model):
    if hasattr(model, "fc_norm"):
        return nn.Sequential(model.fc_norm, model.head)
    if hasattr(model.head, "fc"):
        return nn.Sequential(model.head.norm, model.head.fc)
    return nn.Sequential(model.norm, model.head)


def _timm_tokens(model, image, keep, case):
    patches = model.patch_embed(image)
    positioned = model._pos_embed(patches)
    tokens, rope = positioned if isinstance(positioned, tuple) else (positioned, None)
    prefix = model.num_prefix_tokens
    kept = tokens[:, prefix:][:, keep]
    if "average" in case.kind or "mixed" in case.kind:
        kept = torch.cat((tokens[:, :prefix], kept), dim=1)
    else:
        # Without class and register tokens, no leading token goes without rotary positions.
        prefix = 0
        for block in model.blocks:
            if hasattr(block.attn, "num_prefix_tokens"):
                block.attn.num_prefix_tokens = 0
    kept = model.norm_pre(kept)
    for index, block in enumerate(model.blocks):
        if rope is None:
            kept = block(kept)
        else:
            own = rope[index] if getattr(model, "rope_mixed", False) else rope
            kept = block(kept, rope=own[..., keep, :])
    kept = model.norm(kept)
    # Attention pooling may read the prefix as well: the model's own layer does it all.
    return kept if "-map" in case.kind else kept[:, prefix:]


def _torchvision_tokens(model, image, keep, case):
    patches = model._process_input(image) + model.encoder.pos_embedding[:, 1:]
    return model.encoder.ln(model.encoder.layers(patches[:, keep]))


def _beit_tokens(model, image, keep, case):
    tokens = torch.cat((model.cls_token, model.patch_embed(image)), dim=1)
    if model.pos_embed is not None:
        tokens = tokens + model.pos_embed
    places = _places(keep, 1, case)
    shared = None
    if model.rel_pos_bias is not None:
        shared = _of_places(model.rel_pos_bias(), places)
    kept = tokens[:, places]
    for block in model.blocks:
        if block.attn.relative_position_bias_table is not None:
            own = _of_places(block.attn._get_rel_pos_bias(), places)
            block.attn._get_rel_pos_bias = lambda own=own: own
        kept = block(kept, shared_rel_pos_bias=shared)
    return model.norm(kept)[:, len(places) - len(keep) :]


def _relpos_tokens(model, image, keep, case):
    patches = model.patch_embed(image)
    prefix = patches[:, :0] if model.cls_token is None else model.cls_token
    places = _places(keep, prefix.shape[1], case)
    shared = None
    if model.shared_rel_pos is not None:
        shared = _of_places(model.shared_rel_pos.get_bias(), places)
    kept = torch.cat((prefix, patches), dim=1)[:, places]
    for block in model.blocks:
        if block.attn.rel_pos is not None:
            own = _of_places(block.attn.rel_pos.get_bias(), places)
            block.attn.rel_pos.get_bias = lambda own=own: own
        kept = block(kept, shared_rel_pos=shared)
    return model.norm(kept)[:, len(places) - len(keep) :]


def _naflex_tokens(model, image, keep, case):
    """The model's own blocks on these patches alone.

    Where patches don't see the prefix, its slots stay and are masked: rotary blocks skip them.
    """
    tokens, grid = model.embeds(image)
    num_prefix = model.num_prefix_tokens
    tokens = model.norm_pre(tokens)
    kept = torch.cat((tokens[:, :num_prefix], tokens[:, num_prefix:][:, keep]), dim=1)
    mask = torch.ones(1, 1, 1, kept.shape[1], dtype=torch.bool)
    if "average" not in case.kind:
        mask[..., :num_prefix] = False
    for index, block in enumerate(model.blocks):
        if model.rope is None:
            kept = block(kept, attn_mask=mask)
        else:
            kept = block(kept, rope=model.rope.get_embed(grid)[index][:, keep], attn_mask=mask)
    return model.norm(kept)[:, num_prefix:]


def _encoder_tokens(model, image, keep, case):
    """Qwen3 and DeepSeek: tokens of the present squares through the model's own blocks."""
    encoder = model.encoder
    embedded = encoder.patch_embed(image)
    tokens, rope = encoder._pos_embed(embedded)
    members, side = _members(keep, embedded.shape[1:3], case)
    kept = tokens[:, members]
    for block in encoder.blocks:
        kept = block(kept, rope=rope[members])
    kept = getattr(encoder, "norm", nn.Identity())(kept)
    if side == 1:
        return kept
    squares = kept.view(len(keep), side, side, -1)
    return torch.cat([encoder.aligner(square[None]) for square in squares], dim=1)


def _gemma_tokens(model, image, keep, case):
    """The model's own blocks and rotation of the places of the present squares."""
    encoder = model.encoder
    tokens, places, _ = encoder.patch_embed(image)
    rows, columns = (size // 4 for size in image.shape[-2:])
    members, side = _members(keep, (rows, columns), case)
    kept = encoder._encode(tokens[:, members], places[:, members], None)
    squares = kept.view(1, len(keep), side * side, -1).mean(2) * kept.shape[-1] ** 0.5
    return (squares - encoder.std_bias) * encoder.std_scale


def _members(keep, tokens, case):
    """Indices of the tokens of the present squares, square by square, and the squares' side."""
    side = tokens[0] // case.wrapped.grid[0]
    columns = case.wrapped.grid[1]
    index = torch.arange(tokens[0] * tokens[1]).view(*tokens)
    squares = []
    for patch in keep:
        row, column = int(patch) // columns * side, int(patch) % columns * side
        squares.append(index[row : row + side, column : column + side].flatten())
    return torch.cat(squares), side


def _hiera_tokens(model, image, keep, case):
    """The model's own `mask=`, which drops units and zeroes their pixels."""
    mask = torch.zeros(1, case.wrapped.num_patches, dtype=torch.bool)
    mask[:, keep] = True
    return model.forward_features(image, mask=mask)


def _cait_tokens(model, image, keep, case):
    return model.norm(model.blocks((model.patch_embed(image) + model.pos_embed)[:, keep]))


def _convit_tokens(model, image, keep, case):
    """The model's own blocks, which find the offsets of the remaining patches in their buffer."""
    kept = (model.patch_embed(image) + model.pos_embed)[:, keep]
    for block in model.blocks:
        if block.use_gpsa:
            offsets = block.attn.get_rel_indices(case.wrapped.num_patches)
            block.attn.rel_indices = offsets[:, keep][:, :, keep]
        kept = block(kept)
    return model.norm(kept)


def _tnt_tokens(model, image, keep, case):
    pixels = model.pixel_embed(image, model.pixel_pos)
    told = model.proj(model.norm1_proj(pixels.reshape(1, case.wrapped.num_patches, -1)))
    tokens = torch.cat((model.cls_token, model.norm2_proj(told)), dim=1) + model.patch_pos
    pixels, tokens = pixels[keep], tokens[:, _places(keep, 1, case)]
    for block in model.blocks:
        pixels, tokens = block(pixels, tokens)
    return model.norm(tokens)[:, 1:]


def _places(keep, num_prefix, case):
    """Places of the remaining tokens in the model's own sequence."""
    seen = list(range(num_prefix)) if "average" in case.kind else []
    return seen + [num_prefix + int(patch) for patch in keep]


def _of_places(bias, places):
    return bias[..., places, :][..., places]


ENCODERS = {
    "torchvision": _torchvision_tokens,
    "beit": _beit_tokens,
    "relpos": _relpos_tokens,
    "naflex": _naflex_tokens,
    "qwen": _encoder_tokens,
    "deepseek": _encoder_tokens,
    "gemma": _gemma_tokens,
    "hiera": _hiera_tokens,
    "cait": _cait_tokens,
    "convit": _convit_tokens,
    "tnt": _tnt_tokens,
}
