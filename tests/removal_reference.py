"""Token removal as the paper says it: one image, one coalition, tokens gathered by hand."""

import copy

import torch

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
    if case.kind == "torchvision-vit":
        return model.heads(features).sum(0) / num_patches
    if READOUTS.get(case.kind, "affine") == "affine":
        return model.head(features).sum(0) / num_patches
    return model.head(model.fc_norm(features.mean(0))) * len(keep) / num_patches


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
    return model.norm(kept)[:, prefix:]


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
}
