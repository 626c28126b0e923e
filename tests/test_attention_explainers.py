"""Methods that read attention, against loops over single images in NumPy."""

import copy
import gc

import numpy as np
import pytest
import timm.models.swin_transformer
import timm.models.vision_transformer
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shapwrap import ShapleyWrapper
from shapwrap.errors import ArgumentError, ShapwrapError, UnsupportedBackboneError
from shapwrap.explainers import (
    GAME,
    AttCAT,
    AttentionGradCAM,
    AttentionRollout,
    TokenTM,
    UnverifiedFormulaWarning,
)
from shapwrap.explainers.attention_pass import attention_pass
from shapwrap.explainers.explained_model import ExplainedModel
from tests import attention_models as own
from tests.backbones import SQUARE_KINDS, build, make_case

METHODS = [AttentionRollout, GAME, AttCAT, AttentionGradCAM, TokenTM]
KINDS = [
    "vit-class-token",
    "vit-registers",
    "vit-average-class-token",
    "vit-average-map",
    "vit-average-map-registers",
    "eva-class-token",
    "eva-average-map",
    "eva-mixed-registers",
    "beit-class-token",
    "relpos-average",
    "qwen-average",
    "torchvision-vit",
]
pytestmark = pytest.mark.filterwarnings(
    "ignore::shapwrap.explainers.token_tm.UnverifiedFormulaWarning"
)


def plain(kind, batch=2, grid=(2, 3), dtype=torch.float64):
    if kind in SQUARE_KINDS:
        grid = (grid[0], grid[0])
    model, size = build(kind, grid)
    return model.to(dtype), torch.randn(batch, 3, *size).to(dtype)


def sharing(method, model, known, **options):
    """The method; what is known of the model's parts is found once for all methods."""
    made = method(model, **options)
    made.model = known
    return made


def wrapped(kind, batch=2, dtype=torch.float64):
    case = make_case(kind, (3, 3) if kind in SQUARE_KINDS else (2, 3), batch, dtype)
    return case.wrapped.eval(), case.images


def single(model, image, target, num_patches):
    """What one image shows, in NumPy."""
    seen = attention_pass(
        ExplainedModel(model), image[None], torch.tensor([target]), num_patches, range(20)
    )
    blocks = [
        {
            "A": block.weights[0].numpy(),
            "g": block.gradient[0].numpy(),
            "h": block.tokens[0].numpy(),
            "dh": block.token_gradient[0].numpy(),
        }
        for block in seen.blocks
    ]
    pool = None
    if seen.pooling is not None:
        pool = (seen.pooling.weights[0].numpy(), seen.pooling.gradient[0].numpy())
    return blocks, pool, seen.read[0].numpy(), seen.num_prefix


def head_row(read, pool, tokens, taken_by_pool):
    """Which tokens the head reads: all alike, or as its pooling does (its first query)."""
    if pool is None:
        return read
    row = np.zeros(tokens)
    taken = taken_by_pool(*pool)[0]
    row[tokens - len(taken) :] = taken
    return row


def positive(attention, gradient):
    heads = [np.maximum(a * g, 0) for a, g in zip(attention, gradient, strict=True)]
    return sum(heads) / len(heads)


def rollout_by_loop(blocks, pool, read, num_prefix, start_layer=0):
    tokens = len(read)
    product = np.eye(tokens)
    for block in blocks[start_layer:]:
        mixed = block["A"].mean(axis=0) + np.eye(tokens)
        for row in range(tokens):
            mixed[row] /= mixed[row].sum()
        product = mixed @ product
    return (head_row(read, pool, tokens, lambda a, g: a.mean(axis=0)) @ product)[num_prefix:]


def game_by_loop(blocks, pool, read, num_prefix):
    tokens = len(read)
    relevance = np.eye(tokens)
    for block in blocks:
        relevance = relevance + positive(block["A"], block["g"]) @ relevance
    return (head_row(read, pool, tokens, positive) @ relevance)[num_prefix:]


def attcat_by_loop(blocks, pool, read, num_prefix):
    total = np.zeros(len(read))
    for block in blocks:
        for token in range(len(read)):
            impact = sum(block["dh"][token] * block["h"][token])
            total[token] += block["A"][:, :, token].mean() * impact
    return total[num_prefix:]


def grad_cam_by_loop(blocks, pool, read, num_prefix):
    attention, gradient = blocks[-1]["A"], blocks[-1]["g"]
    patches = len(read) - num_prefix
    if pool is not None:
        (attention, gradient), read = pool, np.ones(1)
    cam = np.zeros(patches)
    for head in range(len(attention)):
        for query, share in enumerate(read):
            row = attention[head, query, -patches:]
            cam += share * gradient[head, query, -patches:].mean() * row / len(attention)
    return np.maximum(cam, 0)


LOOPS = {
    AttentionRollout: rollout_by_loop,
    GAME: game_by_loop,
    AttCAT: attcat_by_loop,
    AttentionGradCAM: grad_cam_by_loop,
}


# --- formulas ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [plain, wrapped])
@pytest.mark.parametrize("kind", [*KINDS, "naflex-class-token"])
def test_methods_are_their_loops(kind, make):
    if kind == "naflex-class-token" and make is plain:
        pytest.skip("its own default size has 3,136 patches")
    model, images = make(kind)
    targets, known = [3, 1], ExplainedModel(model)
    for method, loop in LOOPS.items():
        explanation = sharing(method, model, known)(images, torch.tensor(targets))
        patches = explanation.grid[0] * explanation.grid[1]
        for image, target, values in zip(images, targets, explanation.values, strict=True):
            expected = loop(*single(model, image, target, patches))
            np.testing.assert_allclose(values.numpy(), expected, rtol=1e-9, atol=1e-14)
        assert explanation.values.dtype == torch.float64
        assert explanation.method == method.name
        assert torch.isnan(explanation.total).all()


@pytest.mark.parametrize("kind", ["vit-class-token", "vit-average-map"])
def test_rollout_from_a_later_layer(kind):
    model, images = plain(kind)
    values = AttentionRollout(model, start_layer=1)(images, 0).values
    for image, row in zip(images, values, strict=True):
        expected = rollout_by_loop(*single(model, image, 0, 6), start_layer=1)
        np.testing.assert_allclose(row.numpy(), expected, rtol=1e-9)
    with pytest.raises(ArgumentError, match="start_layer is -1"):
        AttentionRollout(model, start_layer=-1)
    with pytest.raises(UnsupportedBackboneError, match="2 blocks"):
        AttentionRollout(model, start_layer=2)(images)


def token_weight(before, after):
    """W of each token, from full vectors."""
    cosines = [
        float(e @ t / (np.linalg.norm(e) * np.linalg.norm(t)))
        for e, t in zip(before, after, strict=True)
    ]
    total = sum(np.exp(cosine) for cosine in cosines)
    return np.array(
        [
            np.linalg.norm(t) / np.linalg.norm(e) * len(before) * np.exp(cosine) / total
            for e, t, cosine in zip(before, after, cosines, strict=True)
        ]
    )


@pytest.mark.parametrize("kind", ["vit-registers", "vit-average", "vit-average-map"])
def test_token_tm_is_its_loop(kind):
    """From the weights of the model's own layers, layer scale included, token by token."""
    model, images = plain(kind)
    values = TokenTM(model)(images, 2).values
    for image, row in zip(images, values, strict=True):
        blocks, pool, read, num_prefix = single(model, image, 2, 6)
        tokens = len(read)
        with torch.no_grad():
            state = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))
            relevance = np.diag(np.linalg.norm(state[0].numpy(), axis=1))
            for block, seen in zip(model.blocks, blocks, strict=True):
                layer, before = block.attn, state[0].numpy()
                width = before.shape[1] // layer.num_heads
                values_of_all = layer.qkv(block.norm1(state))[0, :, 2 * before.shape[1] :].numpy()
                matrix = layer.proj.weight.numpy()
                gamma = getattr(block.ls1, "gamma", torch.ones(before.shape[1])).numpy()
                taken = np.zeros((tokens, tokens))
                for head in range(layer.num_heads):
                    part = slice(head * width, (head + 1) * width)
                    after = gamma * (values_of_all[:, part] @ matrix[:, part].T)
                    weight = token_weight(before, after)
                    taken += np.maximum(seen["A"][head] * seen["g"][head], 0) @ np.diag(weight)
                relevance = relevance + taken / layer.num_heads @ relevance
                state = state + block.ls1(block.attn(block.norm1(state)))
                branch = block.ls2(block.mlp(block.norm2(state)))
                weight = token_weight(state[0].numpy(), branch[0].numpy())
                relevance = (np.eye(tokens) + np.diag(weight)) @ relevance
                state = state + branch
        expected = (head_row(read, pool, tokens, positive) @ relevance)[num_prefix:]
        np.testing.assert_allclose(row.numpy(), expected, rtol=1e-8)


def test_token_tm_says_that_it_is_unverified():
    model, images = plain("vit-class-token")
    with pytest.warns(UnverifiedFormulaWarning, match="unverified") as caught:
        method = TokenTM(model)
    assert len(caught) == 1
    method(images)
    assert "unverified" in method.name
    assert issubclass(UnverifiedFormulaWarning, UserWarning)


@pytest.mark.parametrize("method", METHODS)
def test_patches_that_alone_are_read_come_first(method):
    """Brightness is the evidence of class 1, and nothing else can reach the head."""
    images = torch.zeros(2, 3, 8, 12)
    images[0, :, 0:4, 4:8] = 1.0
    images[1, :, 4:8, 8:12] = 0.9
    images[1, :, 4:8, 0:4] = 0.6
    values = method(own.MarkedPatches(), grid=(2, 3))(images, 1).values
    assert values[0].argmax() == 1
    assert values[1].topk(2).indices.tolist() == [5, 3]


# --- batches, sizes, precision ----------------------------------------------------------------


@settings(max_examples=8)
@given(
    kind=st.sampled_from(KINDS),
    method=st.sampled_from(METHODS),
    grid=st.tuples(st.integers(2, 4), st.integers(2, 4)),
    batch=st.integers(1, 4),
    chunk=st.integers(1, 3),
    wrap=st.booleans(),
)
def test_batched_is_looped(kind, method, grid, batch, chunk, wrap):
    torch.manual_seed(0)
    model, images = plain(kind, batch, grid)
    if wrap:
        model = ShapleyWrapper(model, image_size=tuple(images.shape[-2:]))
        if model.patch_layer is not None:
            nn.init.normal_(model.patch_layer.weight)
    target = torch.arange(batch) % 5
    each = method(model)
    together = each(images, target)
    chunked = sharing(method, model, each.model, chunk_size=chunk)(images, target)
    alone = [each(image[None], int(k)) for image, k in zip(images, target, strict=True)]
    assert together.values.shape == (batch, together.grid[0] * together.grid[1])
    torch.testing.assert_close(chunked.values, together.values)
    torch.testing.assert_close(torch.cat([one.values for one in alone]), together.values)
    torch.testing.assert_close(together.logits, model.eval()(images))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision(method, dtype):
    model, images = plain("vit-registers", dtype=torch.float32)
    explainer = method(model)
    expected = explainer(images, 1).values
    with torch.autocast("cpu", dtype=dtype):
        mixed = explainer(images, 1).values
    model.to(dtype)
    values = explainer(images.to(dtype), 1).values
    assert values.dtype == torch.float32
    for each in (mixed, values):
        assert torch.corrcoef(torch.stack((each.flatten(), expected.flatten())))[0, 1] > 0.95


@pytest.mark.parametrize("method", METHODS)
def test_frozen_parameters_and_callers_without_gradients(method):
    model, images = plain("vit-class-token")
    explainer = method(model)
    expected = explainer(images).values
    model.requires_grad_(False)
    torch.testing.assert_close(explainer(images).values, expected)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(explainer(images.clone()).values, expected)


@pytest.mark.parametrize("kind", ["vit-registers", "torchvision-vit", "eva-average-map"])
def test_the_model_is_as_it_was(kind):
    model, images = plain(kind)
    model.train()
    model.get_submodule(next(n for n, _ in model.named_modules() if n.endswith("1"))).eval()
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    given = images.clone()

    def state():
        modules = dict(model.named_modules())
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules.values()]
        flags = [getattr(m, "fused_attn", None) for m in modules.values()]
        wants = [(p.requires_grad, p.grad is None) for p in model.parameters()]
        return [m.training for m in modules.values()], hooks, flags, wants, torch.get_rng_state()

    before, weights, known = state(), copy.deepcopy(model.state_dict()), ExplainedModel(model)
    for method in METHODS:
        sharing(method, model, known)(images)
    after = state()
    assert before[:4] == after[:4]
    assert torch.equal(before[4], after[4])
    assert all(torch.equal(weights[name], v) for name, v in model.state_dict().items())
    assert torch.equal(images, given)
    assert not images.requires_grad


def test_calls_keep_no_tensors():
    model, images = plain("vit-class-token")
    known = ExplainedModel(model)
    methods = [sharing(method, model, known) for method in METHODS]

    def living():
        for method in methods:
            method(images)
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    assert living() == living()


# --- other libraries --------------------------------------------------------------------------


@pytest.mark.parametrize("pooled", [False, True])
def test_open_clip_towers(pooled):
    open_clip = pytest.importorskip("open_clip.transformer")
    options = {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 4}
    tower = open_clip.VisionTransformer(
        image_size=(8, 12),
        patch_size=4,
        width=24,
        layers=2,
        heads=3,
        mlp_ratio=2,
        output_dim=20,
        **(options if pooled else {}),
    ).double()
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    probe = nn.Sequential(copy.deepcopy(tower), nn.Linear(20, 5)).double().eval()
    around = ShapleyWrapper(tower, num_classes=5).eval()
    with pytest.raises(UnsupportedBackboneError, match="zero at first"):
        GAME(around)(images)
    nn.init.normal_(around.new_head.weight)
    for model, grid in ((probe, (2, 3)), (around, None)):
        for method, loop in LOOPS.items():
            values = method(model, grid=grid)(images, 4).values
            for image, row in zip(images, values, strict=True):
                expected = loop(*single(model, image, 4, 6))
                np.testing.assert_allclose(row.numpy(), expected, rtol=1e-9, atol=1e-14)
        assert TokenTM(model, grid=grid)(images).values.shape == (2, 6)


# --- refusals ---------------------------------------------------------------------------------


def swin():
    return timm.models.swin_transformer.SwinTransformer(
        img_size=32, patch_size=2, window_size=4, embed_dim=8, depths=(1, 1), num_heads=(2, 2)
    ).eval(), torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("method", METHODS)
def test_windows_are_refused(method):
    model, images = swin()
    with pytest.raises(UnsupportedBackboneError, match=r"16, 16.*windows.*work: integrated"):
        method(model)(images)
    with pytest.raises(UnsupportedBackboneError, match="several resolutions"):
        method(model, grid=(8, 8))(images)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("hiera-average", "windows"),
        ("whole-class-token", "several resolutions"),
        ("tnt-average", "expected"),
        ("cait-class-token", "no attention among tokens"),
        ("convit-class-token", "gated positions"),
        ("resnet", "no attention among tokens"),
        ("convnext", "no attention among tokens"),
        ("clip-resnet", "added to its tokens"),
        ("deepseek-average-align", "24, 24"),
    ],
)
def test_other_architectures_are_refused(kind, message):
    model, images = plain(kind, dtype=torch.float32)
    with pytest.raises(UnsupportedBackboneError, match=message):
        GAME(model)(images)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (own.DroppedWeights, "dropout_p=0.1"),
        (own.TalkingHeads, "talking heads"),
        (own.InPlace, "in place"),
        (own.WithoutShortcut, "in no way"),
        (own.PostNorm, "no post-norm"),
        (own.Cut, "does not reach"),
        (own.TwoPoolings, "at most one"),
    ],
)
@pytest.mark.parametrize("method", [AttentionRollout, AttCAT])
def test_what_has_no_such_map_is_refused(model, message, method):
    torch.manual_seed(0)
    with pytest.raises(UnsupportedBackboneError, match=message):
        method(model().eval(), grid=(2, 3))(torch.randn(2, 3, 8, 12))


def test_token_tm_needs_one_linear_layer_after_the_heads():
    model, images = plain("relpos-average-class-token")
    with pytest.raises(UnsupportedBackboneError, match="a norm or a gate"):
        TokenTM(model)(images)
    assert GAME(model)(images).values.shape == (2, 6)


def test_grids():
    model, images = plain("vit-class-token")
    expected = GAME(model)(images).values
    torch.testing.assert_close(GAME(model, grid=(2, 3))(images).values, expected)
    torch.testing.assert_close(GAME(lambda x: model(x), grid=(2, 3))(images).values, expected)
    with pytest.raises(ArgumentError, match=r"\(3, 2\).*form \(2, 3\)"):
        GAME(model, grid=(3, 2))(images)
    with pytest.raises(ArgumentError, match="pass grid"):
        GAME(lambda x: model(x))(images)
    with pytest.raises(UnsupportedBackboneError, match="10 patches"):
        GAME(lambda x: model(x), grid=(2, 5))(images)
    with pytest.raises(ShapwrapError, match="target"):
        GAME(model)(images, 99)
