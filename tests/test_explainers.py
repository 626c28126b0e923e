"""What every compared method keeps to. A new one is one line in METHODS."""

import gc
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from shapwrap import Explanation, ShapleyWrapper
from shapwrap.errors import BackboneTypeError, ImageError, TargetError
from shapwrap.explainers import (
    GAME,
    IDGI,
    RISE,
    AttCAT,
    AttentionGradCAM,
    AttentionRollout,
    CheferLRP,
    GradCAM,
    InputXGradient,
    IntegratedGradients,
    KernelSHAP,
    Occlusion,
    RandomMap,
    SelfExplaining,
    TokenTM,
    UnverifiedFormulaWarning,
)
from tests.explained_models import EVIDENCE, GRID, NUM_CLASSES, SIZE, reader, tiny


def _wrapped(model):
    return SelfExplaining(ShapleyWrapper(model, image_size=SIZE))


def _tokentm(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnverifiedFormulaWarning)
        return TokenTM(model)


def _rise(model, **draws):
    # Masks of single patches, and the logit: less noise than in the probability of finer masks.
    return RISE(model, num_masks=1500, cells=GRID, score="logit", **draws)


@dataclass(frozen=True)
class Method:
    """How a method is made, and what it promises."""

    make: Callable[..., Any]
    """From a model, and a `generator` where it draws."""
    kinds: tuple[str, ...] = ("cnn", "vit")
    """Models that it works on."""
    faithful: bool = True
    """Ranks evidence first."""
    draws: bool = False
    alone: bool = True
    """An image's values do not depend on the rest of its batch."""
    gap: float = 1e-5
    """Error of the sum that it claims, as a share of the sum of magnitudes."""
    rounded: bool = False
    """In half precision, values are differences of two rounded scores."""
    changes_model: bool = False
    """What makes it may freeze what nothing reads any more."""


METHODS = {
    "random": Method(RandomMap, faithful=False, draws=True, alone=False),
    "shapley": Method(_wrapped, faithful=False, changes_model=True),
    "integrated-gradients": Method(IntegratedGradients, gap=0.02),
    "input-x-gradient": Method(InputXGradient),
    "idgi": Method(IDGI),
    "grad-cam": Method(GradCAM),
    "grad-cam (tokens)": Method(lambda model: GradCAM(model, variant="tokens"), kinds=("vit",)),
    "grad-cam (attention)": Method(AttentionGradCAM, kinds=("vit",)),
    "attention rollout": Method(AttentionRollout, kinds=("vit",)),
    "game": Method(GAME, kinds=("vit",)),
    "chefer-lrp": Method(CheferLRP, kinds=("vit",)),
    # A norm does not change with the scale of its input, so that the product of tokens and their
    # gradients, which AttCAT reads, is near zero along the evidence.
    "attcat": Method(AttCAT, kinds=("vit",), faithful=False),
    "tokentm": Method(_tokentm, kinds=("vit",)),
    "occlusion": Method(Occlusion, rounded=True),
    "kernelshap": Method(KernelSHAP, draws=True),
    "rise": Method(_rise, draws=True),
}
CASES = [(name, kind) for name, method in METHODS.items() for kind in method.kinds]
each = pytest.mark.parametrize(("name", "kind"), CASES)


def make(name, model):
    method = METHODS[name]
    draws = {"generator": torch.Generator().manual_seed(4)} if method.draws else {}
    return method.make(model, **draws)


def as_new(name, model):
    """A function that explains as a method does that was just made."""
    if METHODS[name].draws:
        return lambda *given: make(name, model)(*given)
    return make(name, model)


@cache
def of_tiny(name, kind):
    """An explainer for tests that only look at what it returns."""
    return make(name, tiny(kind)[0])


def draw(batch, seed=0):
    return torch.randn(batch, 3, *SIZE, generator=torch.Generator().manual_seed(seed))


def state_of(model):
    """All that a call must leave as it was."""
    hooks = ["_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"]
    return {
        "modes": [m.training for m in model.modules()],
        "hooks": [len(getattr(m, name)) for m in model.modules() for name in hooks],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "fused": [getattr(m, "fused_attn", None) for m in model.modules()],
        "modules": [(name, id(m)) for name, m in model.named_modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [p.grad for p in model.parameters()],
        "tensors": [t.detach().tolist() for t in model.state_dict().values()],
        "random": torch.get_rng_state().tolist(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


@each
@pytest.mark.parametrize("batch", [1, 3])
def test_returns_an_explanation(name, kind, batch):
    found = of_tiny(name, kind)(draw(batch))
    assert isinstance(found, Explanation)
    assert found.values.shape == (batch, GRID[0] * GRID[1])
    assert found.values.dtype == torch.float32
    assert found.grid == GRID and found.image_size == SIZE
    assert found.logits.shape == (batch, NUM_CLASSES)
    assert not found.values.requires_grad and not found.logits.requires_grad
    assert found.method == of_tiny(name, kind).name
    assert torch.isfinite(found.values).all()
    assert found.heatmap().shape == (batch, *SIZE)
    if found.pixels is not None:
        cells = found.pixels.unflatten(1, (GRID[0], 4)).unflatten(3, (GRID[1], 4)).sum((2, 4))
        torch.testing.assert_close(found.values, cells.flatten(1))


@each
def test_target(name, kind):
    images, method = draw(3), METHODS[name]
    predicted = of_tiny(name, kind)(images)
    assert predicted.target.tolist() == predicted.logits.argmax(dim=1).tolist()
    same = of_tiny(name, kind)(images, 2)
    assert same.target.tolist() == [2, 2, 2]
    each_its_own = of_tiny(name, kind)(images, torch.tensor([2, 0, 2]))
    assert each_its_own.target.tolist() == [2, 0, 2]
    if method.alone and not method.draws:
        torch.testing.assert_close(each_its_own.values[::2], same.values[::2])
    for wrong in (NUM_CLASSES, -1, torch.tensor([0, 1]), torch.ones(3)):
        with pytest.raises(TargetError):
            of_tiny(name, kind)(images, wrong)


@each
def test_batch_equals_loop(name, kind):
    if not METHODS[name].alone:
        pytest.skip("draws anew for each image")
    model, images = tiny(kind)[0], draw(3)
    target = torch.tensor([4, 0, 1])
    explain = as_new(name, model)
    together = explain(images, target)
    for index in range(3):
        alone = explain(images[index : index + 1], target[index : index + 1])
        torch.testing.assert_close(together.values[index], alone.values[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            together.explained()[index], alone.explained()[0], equal_nan=True, rtol=1e-4, atol=1e-6
        )


@each
@pytest.mark.parametrize("train", [False, True])
def test_leaves_no_trace(name, kind, train):
    model, _ = tiny(kind)
    if train:
        model.train()
        next(model.children()).eval()
    parameter = next(model.parameters())
    parameter.requires_grad_(False)
    images = draw(2)
    copy = images.clone()
    if METHODS[name].changes_model:
        make(name, model)
    before = state_of(model)
    explainer = make(name, model)
    for _ in range(2):
        explainer(images)
        assert state_of(model) == before
    assert torch.equal(images, copy) and not images.requires_grad and images.grad is None


@each
@pytest.mark.parametrize("calls", [0, 1])
def test_leaves_no_trace_where_the_model_fails(name, kind, calls):
    model, fuse = tiny(kind)
    model.train()
    images, explainer = draw(2), make(name, model)
    explainer(images)
    before = state_of(model)
    fuse.calls_left = calls
    try:
        explainer(images)
        failed = False
    except RuntimeError as error:
        failed = "the model failed" in str(error)
    assert failed or calls > 0
    del fuse.calls_left
    assert state_of(model) == before


@each
def test_same_in_all_modes(name, kind):
    model, images = tiny(kind)[0], draw(2)
    explain = as_new(name, model)
    expected = explain(images).values
    model.train()
    torch.testing.assert_close(explain(images).values, expected)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(explain(images).values, expected)
    with torch.inference_mode():
        torch.testing.assert_close(explain(draw(2)).values, expected)
    found = explain(images.requires_grad_())
    assert images.grad is None and images.requires_grad and not found.values.requires_grad
    torch.testing.assert_close(found.values, expected)


@each
def test_reproducible(name, kind):
    first, second = (make(name, tiny(kind)[0])(draw(3)) for _ in range(2))
    assert torch.equal(first.values, second.values)


@each
def test_half_precision_model_gives_full_precision_values(name, kind):
    model = tiny(kind)[0].to(torch.bfloat16)
    before = [p.dtype for p in model.parameters()]
    found = make(name, model)(draw(2).bfloat16())
    assert found.values.dtype == torch.float32
    assert [p.dtype for p in model.parameters()] == before
    # Rounded to numbers of 8 bits, no sum of values would have as many different ones.
    same = torch.equal(found.values, found.values.bfloat16().float())
    assert METHODS[name].rounded or not same


@each
def test_no_memory_leaks(name, kind):
    explainer = of_tiny(name, kind)
    images = draw(2)

    explainer(images)
    explainer(images)
    gc.collect()
    gc.freeze()
    try:
        for _ in range(3):
            explainer(images)
        gc.collect()
        made = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    finally:
        gc.unfreeze()
    assert not made


@each
def test_sums_to_what_it_claims(name, kind):
    found = of_tiny(name, kind)(draw(3))
    gap, claimed = found.efficiency_gap(), found.explained()
    assert claimed.isnan().all() or not claimed.isnan().any()
    allowed = METHODS[name].gap * found.values.abs().sum(dim=1)
    assert claimed.isnan().all() or (gap <= allowed).all()


@pytest.mark.parametrize(("name", "kind"), [c for c in CASES if METHODS[c[0]].faithful])
def test_ranks_evidence_first(name, kind):
    images = torch.rand(3, 3, *SIZE, generator=torch.Generator().manual_seed(5)) + 0.5
    values = make(name, reader(kind))(images, 1).values
    assert (values[:, list(EVIDENCE)] > 0).all()
    ranked = values.argsort(dim=1, descending=True)[:, : len(EVIDENCE)]
    assert ranked.sort(dim=1).values.tolist() == [list(EVIDENCE)] * 3


@each
def test_bad_images(name, kind):
    explainer = of_tiny(name, kind)
    with pytest.raises(ImageError, match="NaN"):
        explainer(draw(2).index_fill(0, torch.tensor([1]), torch.nan))
    with pytest.raises(ImageError, match="expected"):
        explainer(draw(2)[0])


@pytest.mark.parametrize("name", METHODS)
def test_a_class_is_no_model(name):
    with pytest.raises(BackboneTypeError):
        make(name, nn.Linear)


@pytest.mark.parametrize(("name", "kind"), [c for c in CASES if c[0] != "shapley"])
def test_takes_a_wrapped_model(name, kind):
    model, images = tiny(kind)[0], draw(2)
    wrapped = ShapleyWrapper(model, image_size=SIZE)
    if wrapped.patch_layer is not None:
        nn.init.normal_(wrapped.patch_layer.weight)
    before = state_of(wrapped)
    found = make(name, wrapped)(images, 1)
    assert state_of(wrapped) == before
    assert found.grid == GRID
    torch.testing.assert_close(found.logits, wrapped(images))
