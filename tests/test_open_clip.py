"""Image towers of open_clip: their output is what a new head reads, and their patches are found."""

from functools import partial

import pytest
import torch
from timm.models.vision_transformer_hybrid import HybridEmbed
from torch import nn

from shapwrap import ShapleyWrapper, shapley_loss
from shapwrap.errors import (
    ImageError,
    MissingHeadError,
    ReadoutError,
    UnsupportedBackboneError,
)

open_clip = pytest.importorskip("open_clip")

from tests.towers import EMBEDDING, TOWERS, around, build, timm_vit, vit  # noqa: E402

NUM_CLASSES = 5

# adapter, masking, readout, grid
TOKENS, REMOVAL, ZERO = "open_clip tokens", "token-removal", "zero-mask"
TIMM_TOKENS, TIMM_MAP = "image tower, timm tokens", "image tower, timm feature map"
EXPECTED = {
    "vit-token": (TOKENS, REMOVAL, "class-token", (3, 4)),
    "vit-token-dropout": (TOKENS, REMOVAL, "class-token", (3, 4)),
    "vit-token-custom-blocks": (TOKENS, REMOVAL, "class-token", (3, 4)),
    "vit-token-late-norm": (TOKENS, REMOVAL, "class-token", (3, 4)),
    "vit-average": (TOKENS, REMOVAL, "affine", (3, 4)),
    "vit-average-late-norm": (TOKENS, REMOVAL, "shared-norm", (3, 4)),
    "vit-without-projection": (TOKENS, REMOVAL, "affine", (3, 4)),
    "coca": (TOKENS, REMOVAL, "shared-norm", (3, 4)),
    # Each of its queries is normed alone, so no mean of patches is read.
    "coca-average": ("image tower, kept whole", ZERO, "efficiency-gap", (3, 4)),
    "resnet": ("open_clip ResNet", ZERO, "affine", (2, 2)),
    "timm-vit-token-linear": (TIMM_TOKENS, REMOVAL, "class-token", (4, 4)),
    "timm-vit-map-none": (TIMM_TOKENS, REMOVAL, "gap", (4, 4)),
    "timm-vit-map-trunk": (TIMM_TOKENS, REMOVAL, "gap", (4, 4)),
    "timm-eva-token": (TIMM_TOKENS, REMOVAL, "class-token", (4, 4)),
    "timm-eva-map": (TIMM_TOKENS, REMOVAL, "gap", (4, 4)),
    "timm-convnext-linear": (TIMM_MAP, ZERO, "shared-norm", (2, 2)),
    "timm-convnext-mlp": (TIMM_MAP, ZERO, "gap", (2, 2)),
    "timm-convnext-absolute": (TIMM_MAP, ZERO, "affine", (2, 2)),
    "timm-convnext-rotary": (TIMM_MAP, ZERO, "affine", (2, 2)),
    "timm-resnet-trunk": (TIMM_MAP, ZERO, "affine", (2, 2)),
    "timm-swin": (TIMM_MAP, ZERO, "affine", (4, 4)),
}
every_kind = pytest.mark.parametrize("kind", TOWERS)


def make(kind, **options):
    tower = build(kind)
    width = 24 if kind == "vit-without-projection" else EMBEDDING
    wrapped = ShapleyWrapper(tower, head=nn.Linear(width, NUM_CLASSES), **options)
    images = torch.randn(2, 3, *wrapped.image_size, generator=torch.Generator().manual_seed(1))
    return wrapped, images


def draw(wrapped, num=4):
    generator = torch.Generator().manual_seed(2)
    coalitions = torch.rand(2, num, wrapped.num_patches, generator=generator) < 0.5
    coalitions[:, 1::2] = ~coalitions[:, 0::2]
    return coalitions


def embedding(tower, images):
    output = tower(images)
    return output[0] if isinstance(output, tuple) else output


@every_kind
@torch.no_grad()
def test_what_is_found(kind):
    wrapped, images = make(kind)
    report = wrapped.report()
    assert report.backbone == f"{type(wrapped.model).__name__} ({EXPECTED[kind][0]})"
    assert (report.masking, report.readout, report.grid) == EXPECTED[kind][1:]
    logits = wrapped(images)
    gains = logits - wrapped.baseline
    torch.testing.assert_close(wrapped.attribute(images).sum(1), gains, atol=1e-5, rtol=1e-5)
    expected = wrapped.new_head(embedding(wrapped.model, images))
    assert expected.std(dim=0).mean() > 2e-4, "the images must differ"
    torch.testing.assert_close(logits, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in TOWERS if "token" in kind])
@torch.no_grad()
def test_a_token_that_was_dropped(kind):
    wrapped, images = make(kind, prefix_tokens="drop")
    logits = wrapped(images)
    torch.testing.assert_close(wrapped.attribute(images).sum(1), logits, atol=1e-5, rtol=1e-5)
    assert "class token, which was dropped" in wrapped.report().note
    expected = wrapped.new_head(embedding(wrapped.model, images))
    assert (logits - expected).abs().max() > 1e-3


@every_kind
@torch.no_grad()
def test_the_game(kind):
    wrapped, images = make(kind)
    coalitions = draw(wrapped)
    coalitions[:, 0], coalitions[:, 1] = False, True
    values = wrapped.value(images, coalitions)
    assert torch.equal(values[:, 0], torch.zeros_like(values[:, 0]))
    gains = wrapped(images) - wrapped.baseline
    torch.testing.assert_close(values[:, 1], gains, atol=1e-5, rtol=1e-5)
    alone = wrapped(images, coalitions, paired=False).values
    torch.testing.assert_close(wrapped(images, coalitions, paired=True).values, alone)
    absent = ~coalitions[:, 2].unflatten(1, wrapped.grid)
    sides = [size // cells for size, cells in zip(wrapped.image_size, wrapped.grid, strict=True)]
    hidden = absent.repeat_interleave(sides[0], 1).repeat_interleave(sides[1], 2)[:, None]
    changed = torch.where(hidden, images * -3 + 1, images)
    assert not torch.equal(changed, images)
    single = coalitions[:, 2:3]
    assert torch.equal(wrapped.value(changed, single), wrapped.value(images, single))


@every_kind
def test_training(kind):
    wrapped, images = make(kind)
    wrapped.train()
    output = wrapped(images, draw(wrapped))
    (shapley_loss(output) + output.logits.square().mean()).backward()
    gradients = [p.grad for p in wrapped.parameters() if p.requires_grad and p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    first = next(m for m in wrapped.model.modules() if isinstance(m, nn.Conv2d))
    assert first.weight.grad.abs().sum() > 0
    assert wrapped.new_head.weight.grad.abs().sum() > 0
    with torch.no_grad():
        values = wrapped.attribute(images).sum(1) + wrapped.baseline
        torch.testing.assert_close(values, wrapped(images), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("prefix_tokens", ["auto", "keep", "drop"])
@pytest.mark.parametrize("kind", [kind for kind in EXPECTED if EXPECTED[kind][0] == TOKENS])
@torch.no_grad()
def test_removal_equals_gathering(kind, prefix_tokens):
    wrapped, images = make(kind, prefix_tokens=prefix_tokens)
    keep_prefix = prefix_tokens != "drop"
    coalitions = draw(wrapped, num=6)
    found = wrapped.value(images, coalitions)
    for image, rows, values in zip(images, coalitions, found, strict=True):
        for row, value in zip(rows, values, strict=True):
            expected = gathered_value(wrapped, image[None], row, keep_prefix)
            torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)


def gathered_value(wrapped, image, coalition, keep_prefix):
    """v(s) from the tower's own blocks on the tokens that are present, and nothing else."""
    tower = wrapped.model
    tokens = tower._embeds(image)
    patches = tokens[:, 1:][:, coalition]
    kept = torch.cat((tokens[:, :1], patches), dim=1) if keep_prefix else patches
    encoded = tower.transformer(kept)
    if wrapped.has_baseline:
        # Token and head as they are, less what they say without a patch.
        alone = tower.transformer(tokens[:, :1])
        said, empty = (tower.ln_post(one[:, 0]) @ tower.proj for one in (encoded, alone))
        return (wrapped.new_head(said) - wrapped.new_head(empty))[0]
    first = 1 if keep_prefix else 0
    if tower.attn_pool is not None:
        pooled = tower.ln_post(tower.attn_pool(encoded)[:, 0])
    elif tower.final_ln_after_pool:
        pooled = tower.ln_post(encoded[:, first:].mean(dim=1))
    else:
        pooled = tower.ln_post(encoded[:, first:]).mean(dim=1)
    projected = pooled if tower.proj is None else pooled @ tower.proj
    return wrapped.new_head(projected)[0] * coalition.sum() / coalition.numel()


@pytest.mark.parametrize("kind", ["vit-average", "vit-average-late-norm", "coca", "resnet"])
@torch.no_grad()
def test_half_precision_keeps_efficiency(kind):
    tower = build(kind).to(torch.bfloat16)
    head = nn.Linear(EMBEDDING, NUM_CLASSES).to(torch.bfloat16)
    wrapped = ShapleyWrapper(tower, head=head)
    assert wrapped.report().readout == EXPECTED[kind][2]
    images = torch.randn(2, 3, *wrapped.image_size).to(torch.bfloat16)
    values = wrapped.attribute(images)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.sum(1), wrapped(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["vit-token", "coca", "resnet", "timm-convnext-linear"])
def test_a_tower_needs_a_head(kind):
    tower = build(kind)
    with pytest.raises(MissingHeadError, match="num_classes"):
        ShapleyWrapper(tower)
    wrapped = ShapleyWrapper(tower, num_classes=3)
    assert wrapped.new_head.in_features == EMBEDDING
    assert "train it before use" in wrapped.report().note
    with pytest.raises(ReadoutError, match=f"{EMBEDDING} features"):
        ShapleyWrapper(tower, head=nn.Linear(EMBEDDING + 1, 3))


def test_a_nonlinear_head_after_a_late_norm_is_shared_by_the_gap():
    hidden = nn.Sequential(nn.Linear(EMBEDDING, 8), nn.ReLU(), nn.Linear(8, 3))
    affine = nn.Sequential(nn.Linear(EMBEDDING, 8), nn.Linear(8, 3))
    readouts = [
        ShapleyWrapper(build("vit-average-late-norm"), head=head).report().readout
        for head in (hidden, affine)
    ]
    assert readouts == ["gap", "shared-norm"]


def test_towers_without_one_embedding_are_refused():
    with pytest.raises(UnsupportedBackboneError, match="one embedding an image"):
        ShapleyWrapper(vit(pool_type="none"), num_classes=3)


def test_images_must_fit_the_positions():
    wrapped, _ = make("vit-average")
    for size in ((16, 12), (13, 16)):
        with pytest.raises(ImageError, match="3 x 4 patches"):
            wrapped(torch.randn(1, 3, *size))


@pytest.mark.parametrize("kind", ["vit-token", "resnet", "timm-resnet-trunk"])
def test_pixel_statistics(kind):
    tower = build(kind)
    assert ShapleyWrapper(tower, num_classes=3).normalization is None
    open_clip.model.set_model_preprocess_cfg(
        tower, {"mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.3)}
    )
    found = ShapleyWrapper(tower, num_classes=3).normalization
    assert (found.mean, found.std) == ((0.4, 0.5, 0.6), (0.1, 0.2, 0.3))


def test_a_class_token_is_kept_where_tokens_cannot_be_removed():
    overlapping = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    overlapping.num_features = 8
    embed = partial(HybridEmbed, backbone=overlapping, feature_size=(8, 8), feature_ratio=2)
    tower = timm_vit("token", EMBEDDING, embed_layer=embed).eval()
    wrapped = ShapleyWrapper(tower, head=nn.Linear(EMBEDDING, 3))
    report = wrapped.report()
    assert report.backbone == "TimmModel (image tower, kept whole)"
    assert (report.masking, report.readout) == ("zero-mask", "efficiency-gap")
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(wrapped(images), wrapped.new_head(tower(images)))


@torch.no_grad()
def test_a_tower_may_leave_borders_unread():
    tower = around(timm_vit("map", EMBEDDING).trunk, 16)
    tower.trunk.set_input_size((18, 18))
    tower.image_size = (18, 18)
    images = torch.randn(1, 3, 18, 18)
    before = tower.eval()(images)
    head = torch.nn.Linear(before.shape[1], 3)
    wrapped = ShapleyWrapper(tower, head=head)
    assert wrapped.report().masking == "token-removal"
    explanation = wrapped.eval().explain(images)
    assert explanation.covered == (16, 16)
    torch.testing.assert_close(explanation.logits, head(before), atol=1e-5, rtol=1e-5)
