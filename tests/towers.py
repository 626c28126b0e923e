"""Small image towers of open_clip, one of each kind."""

from functools import partial

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer as VisionTransformerTrunk
from torch import nn

EMBEDDING = 20


def vit(**options):
    return VisionTransformer(
        image_size=(12, 16),
        patch_size=4,
        width=24,
        layers=2,
        heads=3,
        mlp_ratio=2,
        output_dim=EMBEDDING,
        **options,
    )


def coca(**options):
    pooler = {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 4}
    return vit(**pooler, output_tokens=True, **options)


def resnet():
    tower = ModifiedResNet((1, 1, 1, 1), output_dim=EMBEDDING, heads=4, image_size=64, width=8)
    for module in tower.modules():
        if isinstance(module, nn.Conv2d):
            # torch's own initialisation shrinks the signal, until all images look the same.
            nn.init.kaiming_normal_(module.weight)
    return tower


def timm_tower(name, pool, proj):
    return TimmModel(name, EMBEDDING, 64, pool=pool, proj=proj)


def around(trunk, size):
    """A tower whose trunk is smaller than any that has a name."""
    tower = TimmModel("test_resnet", EMBEDDING, size, pool="avg", proj="linear")
    tower.trunk = trunk
    if trunk.num_classes == EMBEDDING or trunk.num_features == EMBEDDING:
        tower.head = nn.Sequential()
    else:
        tower.head.proj = nn.Linear(trunk.num_features, EMBEDDING, bias=False)
    return tower


def timm_vit(pool, num_classes, width=24, **options):
    trunk = VisionTransformerTrunk(
        img_size=16,
        patch_size=4,
        embed_dim=width,
        depth=2,
        num_heads=2,
        global_pool=pool,
        num_classes=num_classes,
        **options,
    )
    return around(trunk, 16)


def eva(pool, num_classes):
    trunk = Eva(
        img_size=16,
        patch_size=4,
        embed_dim=24,
        depth=2,
        num_heads=3,
        use_rot_pos_emb=True,
        global_pool=pool,
        num_classes=num_classes,
    )
    return around(trunk, 16)


def swin():
    trunk = SwinTransformer(
        img_size=32, embed_dim=8, depths=(1, 1), num_heads=(2, 2), window_size=4, num_classes=0
    )
    return around(trunk, 32)


def without_projection():
    tower = vit(pool_type="avg")
    tower.proj = None
    return tower


TOWERS = {
    "vit-token": vit,
    "vit-token-dropout": partial(vit, patch_dropout=0.5),
    "vit-token-custom-blocks": partial(vit, qk_norm=True, scale_heads=True, scale_fc=True),
    "vit-token-late-norm": partial(vit, final_ln_after_pool=True),
    "vit-average": partial(vit, pool_type="avg", ls_init_value=0.5),
    "vit-average-late-norm": partial(
        vit, pool_type="avg", final_ln_after_pool=True, no_ln_pre=True
    ),
    "vit-without-projection": without_projection,
    "coca": coca,
    "coca-average": partial(coca, pool_type="avg"),
    "resnet": resnet,
    "timm-vit-token-linear": partial(timm_vit, "token", 0, reg_tokens=2),
    "timm-vit-map-none": partial(timm_vit, "map", 0, EMBEDDING, class_token=False),
    "timm-vit-map-trunk": partial(timm_vit, "map", EMBEDDING),
    "timm-eva-token": partial(eva, "token", EMBEDDING),
    "timm-eva-map": partial(eva, "map", EMBEDDING),
    "timm-convnext-linear": partial(timm_tower, "test_convnext", "", "linear"),
    "timm-convnext-mlp": partial(timm_tower, "test_convnext", "", "mlp"),
    "timm-convnext-absolute": partial(timm_tower, "test_convnext", "abs_attn", ""),
    "timm-convnext-rotary": partial(timm_tower, "test_convnext", "rot_attn", "linear"),
    "timm-resnet-trunk": partial(timm_tower, "test_resnet", "avg", ""),
    "timm-swin": swin,
}


def build(kind):
    tower = TOWERS[kind]()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in tower.parameters():
            # Zero biases, unit gains and zeroed last layers would let wrong code pass.
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.2 if parameter.ndim < 2 else 0.05))
    return tower.eval()
