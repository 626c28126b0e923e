"""What the recorder sees of a forward pass: attention, its gradient, tokens; and what it leaves."""

import copy

import numpy as np
import pytest
import timm.models.deit
import timm.models.vision_transformer as timm_vit
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.overrides import _get_current_function_mode_stack

from shapwrap import ShapleyWrapper
from shapwrap.errors import UnsupportedBackboneError
from shapwrap.explainers.attention_pass import attention_pass
from shapwrap.explainers.attention_recorder import AttentionRecorder
from shapwrap.explainers.explained_model import ExplainedModel
from shapwrap.explainers.explicit_attention import attend
from tests.attention_models import Fused, OwnTransformer, Sequences
from tests.backbones import CLASS_TOKEN_KINDS, NUM_CLASSES, SQUARE_KINDS, build, make_case

KINDS = [
    "vit-class-token",
    "vit-registers",
    "vit-average",
    "vit-average-map",
    "eva-class-token",
    "eva-mixed-registers",
    "eva-average-map",
    "beit-average",
    "beit-class-token",
    "relpos-average",
    "naflex-class-token",
    "qwen-average",
    "torchvision-vit",
]


def model_and_images(kind, batch=2, dtype=torch.float64):
    grid = (3, 3) if kind in SQUARE_KINDS else (2, 3)
    model, size = build(kind, grid)
    images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))
    return model.to(dtype), images.to(dtype), grid[0] * grid[1]


def look(model, images, target=0, num_patches=6, prefix=range(9)):
    classes = torch.full((len(images),), target)
    return attention_pass(ExplainedModel(model), images, classes, num_patches, prefix)


# --- attention written out --------------------------------------------------------------------


@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 2),
    queries=st.integers(1, 5),
    keys=st.integers(1, 5),
    mask=st.sampled_from(["none", "bool", "float", "causal"]),
    scale=st.sampled_from([None, 0.3]),
    gqa=st.booleans(),
    seed=st.integers(0, 99),
)
def test_attend_is_scaled_dot_product_attention(
    batch, heads, queries, keys, mask, scale, gqa, seed
):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    query_heads = 2 * heads if gqa else heads
    q, k, v = draw(batch, query_heads, queries, 4), draw(batch, heads, keys, 4), None
    v = draw(batch, heads, keys, 3)
    options = {"scale": scale, "enable_gqa": gqa, "is_causal": mask == "causal"}
    if mask == "bool":
        options["attn_mask"] = draw(batch, 1, queries, keys) > -0.3
    if mask == "float":
        options["attn_mask"] = draw(queries, keys)
    expected = functional.scaled_dot_product_attention(q, k, v, **options)
    attended = attend(q, k, v, **options)
    torch.testing.assert_close(attended.output, expected)
    sums = attended.weights.sum(dim=-1)
    assert torch.all(torch.isclose(sums, torch.ones_like(sums)) | (sums == 0))


def test_a_query_without_keys_gets_zeros_and_finite_gradients():
    q, k, v = (torch.randn(1, 1, 3, 4, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[True, True, False], [False, False, False], [True, False, True]])
    attended = attend(q, k, v, attn_mask=mask)
    assert torch.equal(attended.output[0, 0, 1], torch.zeros(4))
    for gradient in torch.autograd.grad(attended.output.sum(), (q, k, v)):
        assert torch.isfinite(gradient).all()


@given(
    batch_first=st.booleans(),
    cross=st.booleans(),
    bias=st.booleans(),
    mask=st.sampled_from(["none", "2d", "3d", "float"]),
    padding=st.booleans(),
    weights=st.sampled_from([None, True, False]),
    seed=st.integers(0, 99),
)
def test_multi_head_attention_is_torchs(batch_first, cross, bias, mask, padding, weights, seed):
    torch.manual_seed(seed)
    options = {"kdim": 5, "vdim": 3} if cross else {}
    layer = nn.MultiheadAttention(8, 2, bias=bias, batch_first=batch_first, **options)
    layer = layer.double().eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    query = torch.randn(3, 4, 8, dtype=torch.float64)
    key, value = query, query
    if cross:
        key = torch.randn(3, 6, 5, dtype=torch.float64)
        value = torch.randn(3, 6, 3, dtype=torch.float64)
    keys = key.shape[1]
    arguments = {"need_weights": weights is not None, "average_attn_weights": bool(weights)}
    # Every query keeps a key, without which torch itself gives NaN.
    if mask != "none":
        shape = (6, 4, keys) if mask == "3d" else (4, keys)
        arguments["attn_mask"] = torch.rand(shape) < 0.4
        arguments["attn_mask"][..., 0] = False
    if mask == "float":
        arguments["attn_mask"] = torch.randn(4, keys, dtype=torch.float64)
    if padding:
        arguments["key_padding_mask"] = torch.rand(3, keys) < 0.4
        arguments["key_padding_mask"][:, 0] = False
        if mask == "float":
            drawn = torch.randn(3, keys, dtype=torch.float64)
            arguments["key_padding_mask"] = drawn
    if not batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    expected, expected_weights = layer(query, key, value, **arguments)
    recorder = AttentionRecorder()
    with recorder:
        output, output_weights = layer(query, key, value, **arguments)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(output_weights, expected_weights)
    assert len(recorder.layers) + len(recorder.poolings) == 1


def test_keys_that_are_no_tokens_are_refused():
    layer = nn.MultiheadAttention(8, 2, add_bias_kv=True).eval()
    tokens = torch.randn(4, 3, 8)
    with pytest.raises(UnsupportedBackboneError, match="bias_k"), AttentionRecorder():
        layer(tokens, tokens, tokens)


# --- what is recorded -------------------------------------------------------------------------


def by_hand(model, images, changes=None):
    """A timm ViT's blocks, step by step; `changes` replaces the attention of a block."""
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    attentions, inputs = [], []
    for index, block in enumerate(model.blocks):
        inputs.append(tokens)
        batch, length, width = tokens.shape
        layer = block.attn
        mixed = layer.qkv(block.norm1(tokens)).reshape(batch, length, 3, layer.num_heads, -1)
        q, k, v = mixed.permute(2, 0, 3, 1, 4)
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / (width // layer.num_heads) ** 0.5
        attention = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
        if changes is not None and index in changes:
            attention = changes[index]
        attentions.append(attention)
        heads = torch.einsum("bhqk,bhkd->bqhd", attention, v).reshape(batch, length, width)
        tokens = tokens + block.ls1(layer.proj(heads))
        tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
    return model.forward_head(model.norm(tokens)), attentions, inputs


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["vit-class-token", "vit-registers", "vit-average"])
def test_what_a_timm_vit_computes(kind, fused):
    model, images, _ = model_and_images(kind)
    for block in model.blocks:
        block.attn.fused_attn = fused
    logits, attentions, inputs = by_hand(model, images.requires_grad_())
    torch.testing.assert_close(logits, model(images))
    score = logits[:, 3].sum()
    gradients = torch.autograd.grad(score, attentions, retain_graph=True)
    token_gradients = torch.autograd.grad(score, inputs)
    seen = look(model, images, target=3)
    assert len(seen.blocks) == 2
    assert seen.num_prefix == model.num_prefix_tokens
    for index, block in enumerate(seen.blocks):
        torch.testing.assert_close(block.weights, attentions[index].detach())
        torch.testing.assert_close(block.gradient, gradients[index])
        torch.testing.assert_close(block.tokens, inputs[index].detach())
        torch.testing.assert_close(block.token_gradient, token_gradients[index])


def test_gradient_is_the_finite_difference():
    model, images, _ = model_and_images("vit-registers", batch=1)
    seen = look(model, images, target=2)
    generator = np.random.default_rng(0)
    for index, block in enumerate(seen.blocks):
        place = tuple(generator.integers(size) for size in block.weights.shape)
        sides = []
        for step in (1e-5, -1e-5):
            changed = block.weights.clone()
            changed[place] += step
            sides.append(by_hand(model, images, {index: changed})[0][0, 2].item())
        slope = (sides[0] - sides[1]) / 2e-5
        assert slope == pytest.approx(block.gradient[place].item(), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_models_own(kind):
    model, images, _ = model_and_images(kind)
    wrapped = ShapleyWrapper(copy.deepcopy(model), image_size=tuple(images.shape[-2:]))
    for each in (model, wrapped.eval()):
        expected = each(images)
        with AttentionRecorder() as recorder:
            logits = each(images)
        assert len(recorder.layers) == 2
        torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_fused_or_not_is_the_same(kind):
    model, images, patches = model_and_images(kind)
    other = copy.deepcopy(model)
    for module in other.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = not module.fused_attn
    one, two = (look(m, images, num_patches=patches) for m in (model, other))
    for first, second in zip(one.blocks, two.blocks, strict=True):
        torch.testing.assert_close(first.weights, second.weights)
        torch.testing.assert_close(first.gradient, second.gradient)
    torch.testing.assert_close(one.read, two.read)
    assert (one.pooling is None) == (two.pooling is None)


def test_what_the_head_reads():
    def read(kind, **options):
        model, images, _ = model_and_images(kind)
        return look(model, images, **options)

    first = [1.0, 0, 0, 0, 0, 0, 0, 0, 0]
    assert read("vit-class-token").read[0].tolist() == first[:7]
    assert read("vit-registers").read[1].tolist() == first
    patches = torch.tensor([0] * 1 + [1 / 6] * 6, dtype=torch.float64)
    torch.testing.assert_close(read("vit-average-class-token").read[0], patches)
    pooling = read("vit-average-map").pooling
    assert pooling is not None
    assert pooling.weights.shape == (2, 3, 1, 6)
    assert pooling.read.tolist() == [[1.0], [1.0]]
    deit = timm.models.deit.VisionTransformerDistilled(
        img_size=(8, 12), patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=NUM_CLASSES
    ).eval()
    nn.init.normal_(deit.head_dist.weight)
    nn.init.normal_(deit.head.weight)
    assert look(deit, torch.randn(1, 3, 8, 12)).read[0].tolist() == [0.5, 0.5] + [0.0] * 6


@pytest.mark.parametrize(
    ("kind", "option", "prefix"),
    [
        ("vit-class-token", "drop", 0),
        ("vit-class-token", "keep", 1),
        ("naflex-class-token", "drop", 2),
        ("eva-mixed-registers", "drop", 3),
        ("eva-mixed-registers", "keep", 3),
        ("torchvision-vit", "drop", 0),
    ],
)
def test_wrapped_models_may_drop_or_hide_their_prefix(kind, option, prefix):
    grid = (3, 3) if kind in SQUARE_KINDS else (2, 3)
    # With the readout left to choose, the head would go on reading the class token.
    readout = {"readout": "affine"} if kind in CLASS_TOKEN_KINDS else {}
    case = make_case(kind, grid, prefix_tokens=option, **readout)
    patches = grid[0] * grid[1]
    seen = look(case.wrapped.eval(), case.images, num_patches=patches)
    assert seen.num_prefix == prefix
    seen_by_patches = seen.blocks[0].weights[:, :, prefix:, :prefix]
    assert torch.all((seen_by_patches > 0) if option == "keep" else (seen_by_patches == 0))
    expected = torch.tensor([0.0] * prefix + [1 / patches] * patches).expand(2, -1)
    torch.testing.assert_close(seen.read, expected)


@pytest.mark.parametrize("batch", [1, 2, 6, 7])
def test_tokens_first_or_batch_first(batch):
    """With as many images as tokens the shapes do not tell."""
    one, two = Sequences().double().eval(), Sequences(batch_first=True).double().eval()
    two.load_state_dict(one.state_dict())
    images = torch.randn(batch, 3, 8, 12, dtype=torch.float64)
    first, second = look(one, images), look(two, images)
    for a, b in zip(first.blocks, second.blocks, strict=True):
        assert a.tokens.shape == (batch, 6, 12)
        torch.testing.assert_close(a.tokens, b.tokens)
        torch.testing.assert_close(a.token_gradient, b.token_gradient)
        torch.testing.assert_close(a.gradient, b.gradient)
    torch.testing.assert_close(first.read, second.read)


def test_attention_written_by_hand():
    own, fused = OwnTransformer().double().eval(), Fused().double().eval()
    fused.load_state_dict(own.state_dict())
    images = torch.randn(3, 3, 8, 12, dtype=torch.float64)
    for a, b in zip(look(own, images).blocks, look(fused, images).blocks, strict=True):
        torch.testing.assert_close(a.weights, b.weights)
        torch.testing.assert_close(a.gradient, b.gradient)
        torch.testing.assert_close(a.token_gradient, b.token_gradient)
        torch.testing.assert_close(a.values, b.values)


# --- what is left behind ----------------------------------------------------------------------


def test_nothing_is_left_after_an_error():
    model, images, _ = model_and_images("vit-class-token")
    flags = [block.attn.fused_attn for block in model.blocks]
    forward = model.blocks[1].mlp.forward

    def fail(tokens):
        raise ValueError("on purpose")

    model.blocks[1].mlp.forward = fail
    with pytest.raises(ValueError, match="on purpose"):
        look(model, images)
    model.blocks[1].mlp.forward = forward
    assert _get_current_function_mode_stack() == []
    assert [block.attn.fused_attn for block in model.blocks] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.is_grad_enabled()
    assert look(model, images).num_prefix == 1


def test_recomputing_models_are_seen_too():
    model, images, _ = model_and_images("vit-class-token")
    expected = look(model, images)
    model.set_grad_checkpointing(True)
    seen = look(model, images)
    assert model.grad_checkpointing
    torch.testing.assert_close(seen.blocks[0].gradient, expected.blocks[0].gradient)


def test_timm_builds_its_models_of_functions_that_are_seen():
    """The guard of this file: were attention computed elsewhere, all of it would be empty."""
    model = timm_vit.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=24, depth=3, num_heads=3, num_classes=2
    )
    with AttentionRecorder() as recorder:
        model.eval()(torch.randn(2, 3, 8, 8))
    assert [tuple(layer.weights.shape) for layer in recorder.layers] == [(2, 3, 5, 5)] * 3
    assert all(len(layer.additions) == 2 for layer in recorder.layers)
