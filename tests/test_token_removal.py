"""Masked attention equals physically removing tokens, and the gate refuses what does not."""

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shapwrap import ShapleyWrapper
from shapwrap.backbones.positions import Places
from shapwrap.backbones.timm_gemma import TimmGemma
from shapwrap.backbones.timm_hiera import TimmHiera
from shapwrap.backbones.timm_tokens import TimmTokens
from shapwrap.backbones.tokens import TokenBackbone
from shapwrap.errors import ImageError, MaskingError
from tests.backbones import CLASS_TOKEN_KINDS, TOKEN_KINDS, cases, make_case, random_coalitions
from tests.removal_reference import reference_value

PREFIXED = ("class-token", "registers", "beit", "eva", "tnt", "torchvision")
PREFIX_KINDS = [
    kind for kind in TOKEN_KINDS if any(word in kind for word in PREFIXED) and "cait" not in kind
]


@pytest.mark.parametrize("kind", TOKEN_KINDS)
@pytest.mark.parametrize("paired", [True, False])
@torch.no_grad()
def test_equals_gathering_one_image_at_a_time(kind, paired):
    case = make_case(kind, batch=3)
    assert case.wrapped.report().masking == "token-removal"
    for num in (2, 8):
        coalitions = random_coalitions(case, num, seed=num, paired=paired)
        coalitions[0, :2] = torch.stack(
            (torch.zeros(case.wrapped.num_patches), torch.ones(case.wrapped.num_patches))
        ).bool()
        assert len(coalitions.sum(-1).unique()) > num // 2, "sizes must be mixed"
        values = case.wrapped.value(case.images, coalitions)
        for image, rows, found in zip(case.images, coalitions, values, strict=True):
            expected = torch.stack([reference_value(case, image, row) for row in rows])
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@given(cases(TOKEN_KINDS), st.integers(0, 99), st.booleans(), st.integers(1, 4))
@torch.no_grad()
def test_equals_gathering_for_any_grid_batch_dtype_and_coalitions(recipe, seed, paired, pairs):
    case = recipe()
    coalitions = random_coalitions(case, 2 * pairs, seed, paired=paired)
    values = case.wrapped.value(case.images, coalitions)
    for image, rows, found in zip(case.images, coalitions, values, strict=True):
        expected = torch.stack([reference_value(case, image, row) for row in rows])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["vit-class-token", "naflex-class-token", "gemma-average-soft"])
@torch.no_grad()
def test_unfused_attention_is_masked_too(kind):
    case = make_case(kind)
    coalitions = random_coalitions(case, 4, seed=1, paired=True)
    fused = case.wrapped.value(case.images, coalitions)
    layers = [m for m in case.wrapped.model.modules() if getattr(m, "fused_attn", False)]
    assert layers
    for layer in layers:
        layer.fused_attn = False
    torch.testing.assert_close(
        case.wrapped.value(case.images, coalitions), fused, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("prefix_tokens", ["keep", "drop"])
@pytest.mark.parametrize("kind", PREFIX_KINDS)
@torch.no_grad()
def test_one_pass_a_pair_is_two_passes_with_or_without_prefix(kind, prefix_tokens):
    # "auto" would keep the class token for the head, too.
    readout = {"readout": "affine"} if kind in CLASS_TOKEN_KINDS else {}
    case = make_case(kind, prefix_tokens=prefix_tokens, **readout)
    assert case.wrapped.report().masking == "token-removal"
    coalitions = random_coalitions(case, 4, seed=3, paired=True)
    coalitions[:, 0], coalitions[:, 1] = True, False
    together = case.wrapped.value(case.images, coalitions)
    one_by_one = [case.wrapped.value(case.images, part) for part in coalitions.split(1, dim=1)]
    torch.testing.assert_close(together, torch.cat(one_by_one, dim=1), atol=1e-5, rtol=1e-5)
    assert (together[:, 1] == 0).all()
    torch.testing.assert_close(together[:, 0], case.wrapped(case.images), atol=1e-5, rtol=1e-5)


def _first_rows(places, bias):
    """A bias that stays behind when tokens move."""
    length = len(places.prefix) + len(places.patches)
    rows = torch.arange(length).clamp(max=bias.shape[-1] - 1)
    return bias[..., rows[:, None], rows]


@pytest.mark.parametrize(
    ("kind", "owner", "method", "instead", "words"),
    [
        ("beit-average", Places, "of_sequence", _first_rows, "permuting patch tokens"),
        (
            "hiera-average",
            TimmHiera,
            "embed_present",
            TokenBackbone.embed_present,
            "mixes patches before its token slot",
        ),
        (
            "gemma-average-soft",
            TimmGemma,
            "project_tokens",
            lambda self, projector, squares: squares.mean((1, 2))[:, None],
            "replay its own forward pass",
        ),
    ],
)
def test_gate_refuses_an_adapter_that_is_wrong(monkeypatch, kind, owner, method, instead, words):
    model = make_case(kind).wrapped.unwrap()
    size = make_case(kind).wrapped.image_size
    monkeypatch.setattr(owner, method, instead)
    with pytest.raises(MaskingError, match=words):
        ShapleyWrapper(model, masking="token-removal", image_size=size)


def test_a_stem_that_mixes_patches_is_refused():
    model = timm.create_model("tnt_s_legacy_patch16_224", depth=1, num_classes=2).eval()
    with pytest.raises(MaskingError, match="mixes patches before its token slot"):
        ShapleyWrapper(model, masking="token-removal")
    assert ShapleyWrapper(model).report().masking == "zero-mask"


class _MixedBeforeBlocks(nn.Module):
    def __init__(self, embed):
        super().__init__()
        self.embed = embed
        self.mix = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, images):
        return self.embed(self.mix(images))


class _Shifted(nn.Module):
    """A block that looks at the neighbouring token: order matters."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, tokens, **options):
        return self.block(tokens + 0.05 * tokens.roll(1, dims=1), **options)


class _Unmasked(nn.Module):
    """A block that takes a mask and ignores it."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, tokens, attn_mask=None, **options):
        return self.block(tokens, **options)


def _broken(part):
    model = timm.create_model("test_vit", num_classes=3, img_size=32, patch_size=8)
    if part == "stem":
        model.patch_embed.proj = _MixedBeforeBlocks(model.patch_embed.proj)
    elif part == "order":
        model.blocks[0] = _Shifted(model.blocks[0])
    elif part == "mask":
        model.blocks = nn.Sequential(*(_Unmasked(block) for block in model.blocks))
    else:
        features = model.forward_features
        model.forward_features = lambda images, **options: features(images) * 1.1
    return model.eval()


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("stem", "mixes patches before its token slot"),
        ("order", "permuting patch tokens"),
        ("mask", "masking attention equals removing tokens"),
        ("more", "replay its own forward pass"),
    ],
)
def test_gate_refuses_removal_and_falls_back_visibly(part, words):
    with pytest.raises(MaskingError, match=words):
        ShapleyWrapper(_broken(part), masking="token-removal")
    wrapped = ShapleyWrapper(_broken(part))
    report = wrapped.report()
    assert report.masking == "zero-mask"
    assert words in report.note
    images = torch.randn(2, 3, 32, 32)
    coalitions = torch.zeros(2, 1, wrapped.num_patches, dtype=torch.bool)
    coalitions[:, :, ::2] = True
    cells = coalitions.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    changed = torch.where(cells, images, torch.randn(2, 3, 32, 32))
    with torch.no_grad():
        assert torch.equal(wrapped.value(images, coalitions), wrapped.value(changed, coalitions))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gate_is_as_strict_in_half_precision(dtype):
    with pytest.raises(MaskingError, match="permuting"):
        ShapleyWrapper(_broken("order").to(dtype), masking="token-removal")
    wrapped = ShapleyWrapper(
        make_case("eva-average").wrapped.unwrap().to(dtype), image_size=(12, 16)
    )
    assert wrapped.report().masking == "token-removal"


def test_a_buffer_that_the_model_fills_follows_its_precision():
    case = make_case("convit-class-token", dtype=torch.bfloat16)
    assert case.wrapped.report().masking == "token-removal"
    assert case.wrapped.attribute(case.images).isfinite().all()
    assert case.wrapped.unwrap()(case.images).dtype == torch.bfloat16


def test_zero_masking_on_request():
    case = make_case("vit-class-token", masking="zero-mask")
    assert case.wrapped.report().masking == "zero-mask"


def test_prefix_tokens_are_dropped_or_kept():
    images = torch.randn(2, 3, 12, 16)

    def sensitivity(kind, **options):
        wrapped = make_case(kind, **options).wrapped
        with torch.no_grad():
            before = wrapped(images)
            for name in ("cls_token", "reg_token"):
                token = getattr(wrapped.model, name, None)
                if token is not None:
                    token.add_(torch.randn_like(token))
            return float((wrapped(images) - before).abs().max())

    assert sensitivity("vit-registers") == 0
    assert sensitivity("eva-class-token") == 0
    assert sensitivity("vit-registers", prefix_tokens="keep") > 1e-4
    assert sensitivity("vit-registers", prefix_tokens="keep", readout="affine") > 1e-4
    assert sensitivity("vit-average-norm-registers") > 1e-4
    assert sensitivity("vit-average-norm-registers", prefix_tokens="drop") == 0


def test_patches_that_leave_pixels_unread():
    """A model may be built for a size that its patches do not divide: no patch reads the rest."""
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=38, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=3
    ).eval()
    wrapped = ShapleyWrapper(model)
    assert (wrapped.grid, wrapped.report().masking) == ((4, 4), "token-removal")
    images = torch.randn(1, 3, 38, 38)
    explanation = wrapped.explain(images)
    assert explanation.covered == (32, 32)
    heatmap = explanation.heatmap()
    assert heatmap.shape == (1, 38, 38)
    assert not heatmap[:, 32:].any() and not heatmap[:, :, 32:].any()
    assert heatmap[:, :32, :32].all()
    first = torch.zeros(1, 1, 16, dtype=torch.bool)
    first[..., 0] = True
    changed = torch.randn(1, 3, 38, 38)
    changed[..., :8, :8] = images[..., :8, :8]
    zeroed = ShapleyWrapper(wrapped.unwrap(), masking="zero-mask")
    with torch.no_grad():
        assert torch.equal(zeroed.value(images, first), zeroed.value(changed, first))
    with pytest.raises(ImageError, match="refuses images of 44 x 44"):
        zeroed(torch.randn(1, 3, 44, 44))


def test_an_adapter_that_fails_says_so_in_the_report(monkeypatch):
    def fail(self, *arguments):
        raise RuntimeError("a block with other arguments")

    monkeypatch.setattr(TimmTokens, "encode", fail)
    wrapped = ShapleyWrapper(timm.create_model("test_vit2").eval())
    assert wrapped.report().masking == "zero-mask"
    assert "a block with other arguments" in wrapped.report().note
