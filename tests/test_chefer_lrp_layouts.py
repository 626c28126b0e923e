"""Transformer attribution is the same for each library's layout of the same ViT."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from shapwrap import ShapleyWrapper
from shapwrap.explainers import CheferLRP
from shapwrap.explainers.relevance import Tape
from tests.backbones import NUM_CLASSES, make_case
from tests.small_vits import GRID, as_torchvision, random_images, relative, renamed, vit


def test_torchvision_gives_the_same():
    model = vit().double()
    other = as_torchvision(model).double()
    images = random_images((12, 12), batch=3)
    expected, ours = CheferLRP(model, **GRID)(images), CheferLRP(other)(images)
    assert torch.allclose(ours.logits, expected.logits)
    assert relative(ours.values, expected.values) < 1e-6
    wrapped = [CheferLRP(ShapleyWrapper(m, image_size=(12, 12)))(images) for m in (model, other)]
    assert relative(wrapped[1].values, wrapped[0].values) < 1e-6


def test_open_clip_gives_the_same():
    open_clip = pytest.importorskip("open_clip")
    model = vit(pre_norm=True).double()
    tower = open_clip.transformer.VisionTransformer(
        image_size=12,
        patch_size=4,
        width=24,
        layers=2,
        heads=3,
        mlp_ratio=2,
        output_dim=NUM_CLASSES,
    ).double()
    for layer in tower.modules():
        if isinstance(layer, nn.LayerNorm):
            layer.eps = 1e-6
    state = model.state_dict()
    pairs = {"ln_pre": "norm_pre", "ln_post": "norm"}
    names = ("ln_1", "ln_2", "attn", "mlp.c_fc", "mlp.c_proj")
    given = renamed(state, pairs, "transformer.resblocks.{}.", names)
    given |= {
        "class_embedding": state["cls_token"][0, 0],
        "positional_embedding": state["pos_embed"][0],
        "conv1.weight": state["patch_embed.proj.weight"],
        "proj": state["head.weight"].T,
    }
    tower.load_state_dict(given)
    images = random_images((12, 12), batch=3)
    target = torch.tensor([0, 4, 2])
    expected = CheferLRP(model, **GRID)(images, target).values
    ours = CheferLRP(tower.eval(), grid=(3, 3))(images, target).values
    assert relative(ours, expected) < 1e-6


def test_tower_with_a_new_head():
    open_clip = pytest.importorskip("open_clip")
    tower = open_clip.transformer.VisionTransformer(
        image_size=(12, 16), patch_size=4, width=24, layers=2, heads=3, mlp_ratio=2, output_dim=20
    )
    wrapped = ShapleyWrapper(tower, head=nn.Linear(20, NUM_CLASSES), image_size=(12, 16))
    explanation = CheferLRP(wrapped)(random_images((12, 16), dtype=torch.float32))
    assert explanation.values.shape == (2, 12)
    assert (explanation.values > 0).any(dim=1).all()


@pytest.mark.parametrize("kind", ["vit-average", "relpos-average", "qwen-average"])
def test_wrapped_equals_plain_where_the_forward_pass_is_the_same(kind):
    case = make_case(kind, (2, 3), dtype=torch.float64)
    wrapped, plain = CheferLRP(case.wrapped), CheferLRP(case.wrapped.model)
    assert relative(wrapped(case.images).values, plain(case.images).values) < 1e-6


def test_fused_and_single_steps_are_the_same():
    model = vit().double()
    images = random_images((12, 12))
    fused_values = CheferLRP(model, **GRID)(images).values
    for block in model.blocks:
        block.attn.fused_attn = not block.attn.fused_attn
    assert relative(CheferLRP(model, **GRID)(images).values, fused_values) < 1e-6


@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_unfused_attention_equals_torch(mask):
    q, k, v = torch.randn(3, 2, 3, 5, 4, dtype=torch.float64)
    given = torch.rand(2, 1, 5, 5) > 0.3
    given[..., 0] = True
    masks = {None: None, "bool": given, "float": torch.randn(5, 5).double()}
    for options in ({"attn_mask": masks[mask], "scale": 0.3}, {"is_causal": True}):
        expected = functional.scaled_dot_product_attention(q, k, v, **options)
        query = q.clone().requires_grad_()
        with Tape(query) as tape:
            ours = functional.scaled_dot_product_attention(query, k, v, **options)
        assert tape.is_live(ours)
        assert any(operation.name == "softmax" for operation in tape.operations)
        torch.testing.assert_close(ours, expected)
    layer = nn.MultiheadAttention(12, 3, batch_first=True).double().eval()
    tokens = torch.randn(2, 5, 12, dtype=torch.float64)
    forbidden = {None: None, "bool": ~given[0, 0], "float": masks["float"]}[mask]
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    options = {"attn_mask": forbidden, "key_padding_mask": padding if mask == "bool" else None}
    for others in ((tokens, tokens), (tokens.flip(1), tokens.flip(1)), (tokens.flip(0), tokens)):
        recorded = tokens.clone().requires_grad_()
        expected = layer(tokens, *others, **options)
        others = tuple(recorded if other is tokens else other for other in others)
        with Tape(recorded) as tape:
            ours = layer(recorded, *others, **options)
        assert any(operation.name == "softmax" for operation in tape.operations)
        torch.testing.assert_close(ours, expected)
