"""Small random backbones of every kind, and what a test needs to know about them."""

from dataclasses import dataclass

import timm.models.beit
import timm.models.byobnet
import timm.models.cait
import timm.models.convit
import timm.models.convnext
import timm.models.deepseek_vit
import timm.models.eva
import timm.models.gemma4_vit
import timm.models.hiera
import timm.models.naflexvit
import timm.models.pit
import timm.models.qwen3_vit
import timm.models.resnet
import timm.models.tnt
import timm.models.vision_transformer
import timm.models.vision_transformer_relpos
import torch
import torchvision
from hypothesis import strategies as st
from torch import nn

from shapwrap import ShapleyWrapper

NUM_CLASSES = 5


@dataclass(frozen=True)
class Case:
    """A wrapped random model and images for it."""

    kind: str
    wrapped: ShapleyWrapper
    images: torch.Tensor

    @property
    def tolerance(self) -> float:
        """Of a comparison in the model's precision."""
        return 1e-10 if self.images.dtype == torch.float64 else 2e-5


def build(kind: str, grid: tuple[int, int]) -> tuple[nn.Module, tuple[int, int]]:
    """A model in eval mode with random weights and the image size that gives `grid`."""
    rows, columns = grid
    model, cell = BUILDERS[kind](rows, columns)
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    with torch.no_grad():
        for parameter in model.parameters():
            # Zero biases, unit gains and 1e-5 layer scales would let wrong code pass.
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.2 if parameter.ndim < 2 else 0.05))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval(), (rows * cell, columns * cell)


def _vit(**options):
    def make(rows, columns):
        model = timm.models.vision_transformer.VisionTransformer(
            img_size=(rows * 4, columns * 4),
            patch_size=4,
            embed_dim=24,
            depth=2,
            num_heads=3,
            num_classes=NUM_CLASSES,
            **options,
        )
        return model, 4

    return make


def _eva(**options):
    def make(rows, columns):
        model = timm.models.eva.Eva(
            img_size=(rows * 4, columns * 4),
            patch_size=4,
            embed_dim=24,
            depth=2,
            num_heads=3,
            num_classes=NUM_CLASSES,
            use_rot_pos_emb=True,
            **options,
        )
        return model, 4

    return make


def _beit(**options):
    def make(rows, columns):
        model = timm.models.beit.Beit(
            img_size=(rows * 4, columns * 4),
            patch_size=4,
            embed_dim=24,
            depth=2,
            num_heads=3,
            num_classes=NUM_CLASSES,
            **options,
        )
        return model, 4

    return make


def _relpos(**options):
    def make(rows, columns):
        model = timm.models.vision_transformer_relpos.VisionTransformerRelPos(
            img_size=(rows * 4, columns * 4),
            patch_size=4,
            embed_dim=24,
            depth=2,
            num_heads=3,
            num_classes=NUM_CLASSES,
            **options,
        )
        return model, 4

    return make


def _naflex(**options):
    def make(rows, columns):
        model = timm.models.naflexvit.NaFlexVit(
            timm.models.naflexvit.NaFlexVitCfg(
                patch_size=4, embed_dim=24, depth=2, num_heads=3, **options
            ),
            num_classes=NUM_CLASSES,
        )
        return model, 4

    return make


def _encoder(make_model, side, **options):
    def make(rows, columns):
        cell = 4 * side
        model = make_model(
            img_size=(rows * cell, columns * cell),
            patch_size=4,
            embed_dim=24,
            depth=2,
            num_heads=3,
            num_classes=NUM_CLASSES,
            **options,
        )
        return model, cell

    return make


def _hiera(**options):
    def make(rows, columns):
        model = timm.models.hiera.Hiera(
            img_size=(rows * 16, columns * 16),
            embed_dim=8,
            stages=(1, 1, 2),
            mask_unit_size=(4, 4),
            mask_unit_attn=(True, False, False),
            q_pool=2,
            num_classes=NUM_CLASSES,
            **options,
        )
        return model, 16

    return make


def _cait(rows, columns):
    model = timm.models.cait.Cait(
        img_size=(rows * 4, columns * 4),
        patch_size=4,
        embed_dim=24,
        depth=2,
        num_heads=3,
        num_classes=NUM_CLASSES,
        init_values=0.5,
    )
    return model, 4


def _convit(rows, columns):
    model = timm.models.convit.ConVit(
        img_size=(rows * 4, columns * 4),
        patch_size=4,
        embed_dim=6,
        depth=3,
        local_up_to_layer=2,
        num_heads=4,
        num_classes=NUM_CLASSES,
    )
    return model, 4


def _tnt(**options):
    def make(rows, columns):
        model = timm.models.tnt.TNT(
            img_size=(rows * 8, columns * 8),
            patch_size=8,
            embed_dim=24,
            inner_dim=8,
            depth=2,
            num_heads_inner=2,
            num_heads_outer=3,
            num_classes=NUM_CLASSES,
            **options,
        )
        return model, 8

    return make


def _torchvision_vit(rows, columns):
    model = torchvision.models.VisionTransformer(
        image_size=rows * 4,
        patch_size=4,
        num_layers=2,
        num_heads=3,
        hidden_dim=24,
        mlp_dim=48,
        num_classes=NUM_CLASSES,
    )
    return model, 4


def _resnet(rows, columns):
    model = timm.models.resnet.ResNet(
        timm.models.resnet.BasicBlock,
        layers=(1, 1, 1, 1),
        channels=(4, 8, 8, 16),
        num_classes=NUM_CLASSES,
        stem_width=8,
        stem_type="deep",
    )
    return model, 32


def _convnext(rows, columns):
    model = timm.models.convnext.ConvNeXt(
        depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=NUM_CLASSES
    )
    return model, 32


def _torchvision_resnet(rows, columns):
    model = torchvision.models.ResNet(
        torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=NUM_CLASSES
    )
    return model, 32


def _own_gap_head(rows, columns):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 16),
        nn.GELU(),
        nn.Linear(16, NUM_CLASSES),
    )
    return model, 4


def _clip_resnet(head_type):
    def make(rows, columns):
        block = timm.models.byobnet.ByoBlockCfg
        configuration = timm.models.byobnet.ByoModelCfg(
            blocks=tuple(block("bottle", d=1, c=64, s=2) for _ in range(2)),
            stem_chs=8,
            head_type=head_type,
        )
        model = timm.models.byobnet.ByobNet(
            configuration, img_size=(rows * 16, columns * 16), num_classes=NUM_CLASSES
        )
        return model, 16

    return make


def _pit(**options):
    def make(rows, columns):
        model = timm.models.pit.PoolingVisionTransformer(
            img_size=(rows * 16, columns * 16),
            patch_size=4,
            stride=4,
            base_dims=(8, 8, 8),
            depth=(1, 1, 1),
            heads=(1, 2, 4),
            num_classes=NUM_CLASSES,
            **options,
        )
        return model, 16

    return make


class OwnConvolutions(nn.Module):
    """A model that no adapter knows: functions between its layers, a max or a mean at the end."""

    def __init__(self, pooling):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = nn.BatchNorm2d(8)
        self.mix = nn.Conv2d(8, 12, 3, padding=1)
        self.fc = nn.Linear(12, NUM_CLASSES)
        self.pooling = pooling

    def forward(self, images):
        feature_map = torch.relu(self.mix(torch.relu(self.norm(self.stem(images)))))
        return self.fc(getattr(feature_map.flatten(2), self.pooling)(dim=2))


class OwnPooling(OwnConvolutions):
    """Without a function between the last layer and the pooling."""

    def forward(self, images):
        feature_map = self.mix(torch.relu(self.norm(self.stem(images))))
        return self.fc(getattr(feature_map.flatten(2), self.pooling)(dim=2))


BUILDERS = {
    "vit-class-token": _vit(),
    "vit-registers": _vit(reg_tokens=2, init_values=0.5),
    "vit-average": _vit(global_pool="avg", class_token=False, fc_norm=False),
    "vit-average-norm-registers": _vit(global_pool="avg", class_token=False, reg_tokens=2),
    "vit-average-class-token": _vit(global_pool="avg"),
    "eva-class-token": _eva(global_pool="token"),
    "eva-average": _eva(global_pool="avg"),
    "eva-mixed-registers": _eva(global_pool="avg", rope_type="mixed", num_reg_tokens=2),
    "beit-average": _beit(use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.5),
    "beit-class-token": _beit(global_pool="token", use_shared_rel_pos_bias=True, swiglu_mlp=True),
    "relpos-average": _relpos(rel_pos_type="bias", fc_norm=True, qk_norm=True, init_values=0.5),
    "relpos-class-token": _relpos(class_token=True, global_pool="token"),
    "relpos-average-class-token": _relpos(
        class_token=True,
        shared_rel_pos=True,
        block_fn=timm.models.vision_transformer_relpos.ResPostRelPosBlock,
    ),
    "naflex-average-registers": _naflex(
        global_pool="avg", reg_tokens=2, pos_embed="factorized", pos_embed_grid_size=(5, 5)
    ),
    "naflex-class-token": _naflex(
        class_token=True,
        reg_tokens=1,
        global_pool="token",
        fc_norm=False,
        rope_type="mixed",
        pos_embed_grid_size=(4, 4),
    ),
    "qwen-average": _encoder(
        timm.models.qwen3_vit.Qwen3VitClassifier, 1, pos_embed_grid_size=3, mlp_ratio=2.0
    ),
    "deepseek-average-align": _encoder(
        timm.models.deepseek_vit.DeepseekVitClassifier,
        2,
        encoder_pool="align",
        downsample_ratio=2,
        out_features=20,
    ),
    "gemma-average-soft": _encoder(
        timm.models.gemma4_vit.Gemma4VitClassifier,
        2,
        encoder_pool="soft",
        pooling_kernel_size=2,
        head_dim=8,
        intermediate_size=32,
        position_embedding_size=16,
        standardize=True,
    ),
    "hiera-average": _hiera(),
    "hiera-average-windows": _hiera(
        abs_win_pos_embed=True, global_pos_size=(3, 3), use_expand_proj=False, init_values=0.5
    ),
    "cait-class-token": _cait,
    "convit-class-token": _convit,
    "tnt-average": _tnt(global_pool="avg"),
    "torchvision-vit": _torchvision_vit,
    "resnet": _resnet,
    "convnext": _convnext,
    "torchvision-resnet": _torchvision_resnet,
    "own-nonlinear-head": _own_gap_head,
    "vit-average-map": _vit(global_pool="map", class_token=False),
    "vit-average-map-registers": _vit(global_pool="map", class_token=True, reg_tokens=1),
    "eva-average-map": _eva(global_pool="map"),
    "clip-resnet": _clip_resnet("attn_abs"),
    "clip-resnet-rotary": _clip_resnet("attn_rot"),
    "whole-class-token": _pit(),
    "whole-two-heads": _pit(distilled=True),
    "traced-mean": lambda rows, columns: (OwnPooling("mean"), 4),
    "traced-whole": lambda rows, columns: (OwnConvolutions("amax"), 4),
}

TOKEN_FAMILIES = ["vit", "eva", "beit", "relpos", "naflex", "qwen", "deepseek", "gemma"]
TOKEN_FAMILIES += ["hiera", "cait", "convit", "tnt"]
TOKEN_KINDS = [kind for kind in BUILDERS if any(family in kind for family in TOKEN_FAMILIES)]
SQUARE_KINDS = ["torchvision-vit", "convit-class-token"]
EXACT_KINDS = [k for k in BUILDERS if "class-token" not in k or "average" in k or "whole" in k]
EXACT_KINDS = [k for k in EXACT_KINDS if k not in ("vit-registers", "torchvision-vit")]
CLASS_TOKEN_KINDS = [k for k in BUILDERS if k not in EXACT_KINDS]
"""Whose head reads the class token: dropped in a case, as the paper does, unless asked."""
READOUTS = {
    "vit-average-norm-registers": "shared-norm",
    "vit-average-class-token": "shared-norm",
    "eva-average": "shared-norm",
    "eva-mixed-registers": "shared-norm",
    "beit-average": "shared-norm",
    "relpos-average": "shared-norm",
    "naflex-average-registers": "shared-norm",
    "qwen-average": "shared-norm",
    "deepseek-average-align": "shared-norm",
    "gemma-average-soft": "shared-norm",
    "hiera-average": "shared-norm",
    "hiera-average-windows": "shared-norm",
    "convnext": "shared-norm",
    "own-nonlinear-head": "gap",
    "vit-average-map": "gap",
    "vit-average-map-registers": "gap",
    "eva-average-map": "gap",
    "whole-class-token": "efficiency-gap",
    "whole-two-heads": "efficiency-gap",
    "traced-whole": "efficiency-gap",
}


def make_case(kind, grid=(3, 4), batch=2, dtype=torch.float32, **options) -> Case:
    """A wrapped model of a kind and random images."""
    if kind in SQUARE_KINDS:
        grid = (grid[0], grid[0])
    model, size = build(kind, grid)
    if kind in CLASS_TOKEN_KINDS and "readout" not in options:
        options.setdefault("prefix_tokens", "drop")
    wrapped = ShapleyWrapper(model.to(dtype), image_size=size, **options)
    if wrapped.patch_layer is not None:
        # It starts at zero, where every patch gets the same share.
        nn.init.normal_(wrapped.patch_layer.weight, generator=torch.Generator().manual_seed(3))
    images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(7)).to(dtype)
    return Case(kind, wrapped, images)


def random_coalitions(case: Case, num: int, seed: int, paired: bool) -> torch.Tensor:
    """Coalitions of any size, empty and full included, unlike those of the sampler."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(case.images), num, case.wrapped.num_patches)
    shares = torch.rand(shape[0], num, 1, generator=generator) * 1.4 - 0.2
    drawn = torch.rand(shape, generator=generator) < shares
    if paired:
        drawn[:, 1::2] = ~drawn[:, 0::2]
    return drawn


@dataclass(frozen=True)
class CaseRecipe:
    """What hypothesis draws; models are made in the test, since making one uses global state."""

    kind: str
    grid: tuple[int, int]
    batch: int
    dtype: torch.dtype

    def __call__(self) -> Case:
        return make_case(self.kind, self.grid, self.batch, self.dtype)


grids = st.tuples(st.integers(2, 4), st.integers(2, 4))


def cases(kinds=tuple(BUILDERS)):
    """Random kind, grid (often h != w), batch size and dtype; call the result for the case."""
    return st.builds(
        CaseRecipe,
        st.sampled_from(kinds),
        grids,
        st.integers(1, 3),
        st.sampled_from([torch.float32, torch.float64]),
    )
