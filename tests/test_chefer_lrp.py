"""Transformer attribution equals a slow reference, and refuses what it has no rules for."""

import copy
import gc

import numpy as np
import pytest
import timm.models.swin_transformer
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from shapwrap.errors import ArgumentError, ShapwrapError, UnsupportedBackboneError
from shapwrap.explainers import CheferLRP
from shapwrap.explainers.relevance import Tape, propagation
from shapwrap.explainers.relevance.rules import relevance_of_inputs
from tests.backbones import build, make_case
from tests.small_vits import GRID, as_torchvision, random_images, relative, vit
from tests.transformer_attribution import ReferenceVit

# --- against the reference -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit-class-token", "vit-average"])
@pytest.mark.parametrize("start_layer", [0, 1])
def test_equals_the_reference(kind, start_layer):
    model, size = build(kind, (2, 3))
    images = random_images(size)
    target = torch.tensor([1, 3])
    explanation = CheferLRP(model.double(), start_layer=start_layer)(images, target)
    reference = ReferenceVit(model)
    expected = [
        reference.attribution(image.numpy(), int(c), start_layer)
        for image, c in zip(images, target, strict=True)
    ]
    assert explanation.grid == (2, 3)
    assert explanation.method == "chefer-lrp"
    assert relative(explanation.values, torch.tensor(np.stack(expected))) < 1e-5


def test_relevance_at_attention_equals_the_reference(monkeypatch):
    model, size = build("vit-class-token", (2, 3))
    image = random_images(size, batch=1)
    found = []
    from shapwrap.explainers import chefer_lrp

    original = chefer_lrp.relevance_of_attention
    monkeypatch.setattr(
        chefer_lrp,
        "relevance_of_attention",
        lambda *given: found.append(original(*given)) or found[-1],
    )
    CheferLRP(model.double())(image, 2)
    reference = ReferenceVit(model)
    expected = reference.relevance(reference.embed(image[0].numpy()), 2)
    for ours, theirs in zip(found[0], expected, strict=True):
        assert relative(ours[0], torch.from_numpy(theirs)) < 1e-5


def test_float32_is_close_to_float64():
    model, size = build("vit-class-token", (2, 3))
    images = random_images(size)
    single = CheferLRP(model)(images.float(), 0).values
    assert single.dtype == torch.float32
    inside = CheferLRP(model, double=True)(images.float(), 0).values
    assert inside.dtype == torch.float32
    assert next(model.parameters()).dtype == torch.float32
    outside = CheferLRP(model.double())(images.float().double(), 0).values
    assert relative(single, outside) < 1e-3
    assert relative(inside, outside) < 1e-6


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99), st.booleans())
def test_linear_rule_by_loops(batch, wide, narrow, seed, as_product):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, wide, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(narrow, wide, generator=generator, dtype=torch.float64)
    arriving = torch.randn(batch, narrow, generator=generator, dtype=torch.float64)
    tape = Tape(x)
    with tape:
        x @ weight.T if as_product else functional.linear(x, weight, torch.ones(narrow).double())
    with torch.no_grad():
        (ours,) = relevance_of_inputs(tape.operations[-1], [arriving], batch)
    x = x.detach()
    for b in range(batch):
        for i in range(wide):
            expected = 0.0
            for j in range(narrow):
                same = [(float(x[b, n]), float(weight[j, n])) for n in range(wide)]
                kept = [max(v, 0) * max(w, 0) + min(v, 0) * min(w, 0) for v, w in same]
                if sum(kept):
                    expected += kept[i] / sum(kept) * float(arriving[b, j])
            assert abs(float(ours[b, i]) - expected) < 1e-6


KINDS = ["vit-registers", "eva-class-token", "beit-class-token", "relpos-average", "qwen-average"]


@pytest.mark.parametrize("kind", [*KINDS, "vit-average-map"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_every_rule_conserves_the_relevance_of_each_image(kind, wrapped, monkeypatch):
    case = make_case(kind, (2, 3), batch=2, dtype=torch.float64)
    names = set()

    def checked(operation, relevance, batch):
        assert batch == 2
        # Of one sign, so that its sum is no small difference.
        arriving = [None if r is None else torch.rand_like(r) for r in relevance]
        passed = [r for r in relevance_of_inputs(operation, arriving, batch) if r is not None]
        arriving = [r for r in arriving if r is not None]
        total = sum(float(r.sum()) for r in arriving)
        assert sum(float(r.sum()) for r in passed) == pytest.approx(total, rel=1e-5)
        if operation.name == "add":
            for image in range(2):
                total = float(arriving[0][image].sum())
                assert sum(float(r[image].sum()) for r in passed) == pytest.approx(total, rel=1e-5)
        names.add(operation.name)
        return relevance_of_inputs(operation, relevance, batch)

    monkeypatch.setattr(propagation, "relevance_of_inputs", checked)
    explainer = CheferLRP(case.wrapped if wrapped else case.wrapped.model)
    if wrapped and kind == "vit-average-map":
        with pytest.raises(UnsupportedBackboneError, match="softmax"):
            explainer(case.images)
        return
    explainer(case.images)
    assert {"linear", "matmul", "add", "layer_norm", "softmax", "reshape"} <= names


# --- batches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit-class-token", "eva-average", "torchvision-vit"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_batch_equals_loop(kind, wrapped):
    case = make_case(kind, (2, 3), batch=5, dtype=torch.float64)
    model = case.wrapped if wrapped else case.wrapped.model
    target = torch.tensor([0, 1, 2, 3, 4])
    explainer = CheferLRP(model)
    together = explainer(case.images, target).values
    alone = [explainer(case.images[i : i + 1], i).values for i in range(5)]
    chunked = CheferLRP(model, chunk_size=2)(case.images, target).values
    assert relative(together, torch.cat(alone)) < 1e-6
    assert relative(chunked, together) < 1e-6


class TokensFirst(nn.Module):
    """The same ViT with the axis of images second between its blocks."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        model = self.model
        tokens = model._pos_embed(model.patch_embed(images)).transpose(0, 1)
        for block in model.blocks:
            tokens = tokens + block.attn(block.norm1(tokens).transpose(0, 1)).transpose(0, 1)
            tokens = tokens + block.mlp(block.norm2(tokens))
        return model.head(model.norm(tokens)[0])


@pytest.mark.parametrize("batch", [3, 10])
def test_tokens_may_come_first_even_as_many_as_images(batch):
    model = vit().double()
    images = random_images((12, 12), batch=batch)
    expected = CheferLRP(model, **GRID)(images).values
    ours = CheferLRP(TokensFirst(model), grid=(3, 3))(images).values
    assert relative(ours, expected) < 1e-6


# --- known answer ----------------------------------------------------------------------------


class ReadsSome(nn.Module):
    """A ViT in which nobody can look at some of the patches."""

    def __init__(self, model, readable):
        super().__init__()
        self.model = model
        self.register_buffer("mask", torch.cat((torch.ones(1, dtype=torch.bool), readable)))

    def forward(self, images):
        mask = self.mask.expand(len(self.mask), -1) | torch.eye(len(self.mask), dtype=torch.bool)
        return self.model.forward_head(self.model.forward_features(images, attn_mask=mask))


def test_patches_that_are_never_read_come_last():
    readable = torch.tensor([1, 0, 0, 1, 0, 0, 0, 1, 0], dtype=torch.bool)
    model = ReadsSome(vit(), readable)
    values = CheferLRP(model, grid=(3, 3))(random_images((12, 12), 6, torch.float32)).values
    assert (values[:, ~readable] == 0).all()
    assert (values[:, readable] > 0).all()


# --- precision, gradients, state -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    model = vit().to(dtype)
    images = random_images((12, 12)).to(dtype)
    values = CheferLRP(model, **GRID)(images, 1).values
    assert values.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {dtype}
    expected = CheferLRP(copy.deepcopy(model).float(), **GRID)(images.float(), 1).values
    assert torch.equal(values, expected)


def test_under_autocast():
    model = vit()
    images = random_images((12, 12)).float()
    expected = CheferLRP(model, **GRID)(images, 1).values
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(CheferLRP(model, **GRID)(images, 1).values, expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_may_be_off_and_parameters_frozen(context, frozen):
    model = vit()
    images = random_images((12, 12)).float()
    expected = CheferLRP(model, **GRID)(images, 1).values
    model.requires_grad_(not frozen)
    with context():
        assert torch.equal(CheferLRP(model, **GRID)(images, 1).values, expected)


def state_of(model):
    return {
        "dtypes": [p.dtype for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "fused": [getattr(m, "fused_attn", None) for m in model.modules()],
        "recomputed": [getattr(m, "grad_checkpointing", None) for m in model.modules()],
        "trainable": [p.requires_grad for p in model.parameters()],
        "gradients": [p.grad for p in model.parameters()],
        "versions": [p._version for p in model.parameters()],
        "buffers": [b.clone().tolist() for b in model.buffers()],
        "random": torch.get_rng_state().tolist(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "grad": torch.is_grad_enabled(),
        "modules": [type(m) for m in model.modules()],
    }


@pytest.mark.parametrize("other", [vit, lambda: as_torchvision(vit())])
def test_model_is_left_as_it_was(other):
    model = other()
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing()
    model.train()
    next(model.children()).eval()
    next(model.parameters()).requires_grad_(False)
    images = random_images((12, 12)).float().requires_grad_()
    before = state_of(model)
    CheferLRP(model)(images)
    assert state_of(model) == before
    CheferLRP(model, double=True, **GRID)(images)
    assert state_of(model) == before
    assert images.grad is None
    with pytest.raises(ArgumentError, match="2 attentions"):
        CheferLRP(model, start_layer=2, **GRID)(images)
    assert state_of(model) == before
    with pytest.raises(ShapwrapError):
        CheferLRP(model, grid=(9, 9))(images)
    assert state_of(model) == before


def test_calls_leave_no_tensors_behind():
    explainer = CheferLRP(vit(), **GRID)
    images = random_images((12, 12)).float()

    def alive():
        gc.collect()
        # isinstance would wake deprecated objects of torch.
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    explainer(images)
    before = alive()
    for _ in range(3):
        explainer(images)
    assert alive() == before


def test_values_claim_no_sum():
    explanation = CheferLRP(vit(), **GRID)(random_images((12, 12)).float())
    assert (explanation.values >= 0).all()
    assert explanation.efficiency_gap().isnan().all()
    assert explanation.heatmap().shape == (2, 12, 12)


def test_function_with_a_grid():
    model = vit()
    images = random_images((12, 12)).float()
    function = CheferLRP(lambda images: model(images), grid=(3, 3))
    assert torch.equal(function(images).values, CheferLRP(model, **GRID)(images).values)


# --- refusals --------------------------------------------------------------------------------


def test_windows_are_refused():
    swin = timm.models.swin_transformer.SwinTransformer(
        img_size=32, patch_size=4, embed_dim=12, depths=(2, 2), num_heads=(2, 2), window_size=4
    )
    with pytest.raises(UnsupportedBackboneError, match="windows"):
        CheferLRP(swin)(random_images((32, 32)).float())


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("resnet", "no attention"),
        ("cait-class-token", "softmax"),
        ("convit-class-token", "softmax"),
        ("deepseek-average-align", "come from the image too"),
        ("whole-class-token", "pyramid"),
    ],
)
def test_other_models_are_refused(kind, match):
    model, size = build(kind, (3, 3))
    with pytest.raises(UnsupportedBackboneError, match=match):
        CheferLRP(model)(random_images(size).float())


class Ending(nn.Module):
    """A ViT with something between its last block and its head."""

    def __init__(self, between):
        super().__init__()
        self.model = vit()
        self.between = between

    def forward(self, images):
        return self.model.head(self.between(self.model.forward_features(images)[:, 0]))


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens):
        return tokens * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


@pytest.mark.parametrize(
    ("between", "match"),
    [
        (lambda tokens: tokens.cumsum(-1), "'cumsum'"),
        (lambda tokens: tokens.mul_(2), "'mul_'.*in place"),
        (lambda tokens: torch.add(tokens, tokens.relu(), alpha=2), "'add'"),
        (lambda tokens: tokens - tokens.relu(), "'sub'"),
        (Hidden.apply, "expected an eager"),
        (lambda tokens: tokens.detach(), "expected an eager"),
        (torch.jit.trace(lambda tokens: tokens * 2, torch.ones(2, 24)), "expected an eager"),
        (lambda tokens: tokens + Hidden.apply(tokens), "hidden"),
    ],
    ids=[
        "cumsum",
        "in-place",
        "alpha",
        "difference",
        "function",
        "detached",
        "traced",
        "partly hidden",
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_operations_without_a_rule_are_named(between, match):
    with pytest.raises(UnsupportedBackboneError, match=match):
        CheferLRP(Ending(between), grid=(3, 3))(random_images((12, 12)).float())


def test_arguments():
    model = vit()
    with pytest.raises(ArgumentError, match="start_layer"):
        CheferLRP(model, start_layer=-1)
    with pytest.raises(ArgumentError, match="double"):
        CheferLRP(lambda images: model(images), double=True, grid=(3, 3))
    with pytest.raises(ArgumentError, match="9 x 9"):
        CheferLRP(model, grid=(9, 9))(random_images((12, 12)).float())
    with pytest.raises(UnsupportedBackboneError, match="come from the image too"):
        CheferLRP(model, grid=(2, 2))(random_images((12, 12)).float())
