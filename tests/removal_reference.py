"""Token removal as the paper says it: one image, one coalition, tokens gathered by hand."""

import copy

import torch


def reference_value(case, image: torch.Tensor, coalition: torch.Tensor) -> torch.Tensor:
    """v(s) [K] of one image and one coalition, with absent tokens physically removed."""
    model = copy.deepcopy(case.wrapped.model).eval()
    keep = coalition.nonzero()[:, 0]
    if len(keep) == 0:
        return torch.zeros(case.wrapped.num_classes, dtype=image.dtype)
    encode = _torchvision_tokens if case.kind == "torchvision-vit" else _timm_tokens
    features = encode(model, image[None], keep, case)[0]
    num_patches = case.wrapped.num_patches
    if case.kind == "torchvision-vit":
        return model.heads(features).sum(0) / num_patches
    if case.kind in ("vit-class-token", "vit-registers", "eva-class-token", "vit-average"):
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
