"""Operations counted by hand and by torch's own counter; time as a ratio."""

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from shapwrap.errors import ArgumentError
from shapwrap.explainers import RandomMap, SelfExplaining
from shapwrap.flops import count_operations
from shapwrap.metrics import cost
from tests.backbones import make_case


class Gradient:
    """Forward and backward, `steps` times; a network of its own on top."""

    def __init__(self, model, steps=1, further=None):
        self.model, self.steps, self.further = model, steps, further

    def __call__(self, images, target=None):
        for _ in range(self.steps):
            inputs = images.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(self.model(inputs).sum(), inputs)
        return gradient


def convolution():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 8, 5)
    )


@pytest.mark.parametrize("steps", [1, 3])
def test_counted_by_hand(steps):
    model = convolution()
    images = torch.randn(2, 3, 6, 8)
    found = cost(Gradient(model, steps, nn.Linear(7, 2)), images)
    forward = 3 * 4 * 9 * 48 + 4 * 48 * 5
    # The gradient of the images alone takes as much again; parameters' gradients are not asked for.
    assert found.forward_multiply_adds == forward
    assert found.explanation_multiply_adds == 2 * steps * forward
    assert found.forward_equivalents == 2 * steps
    assert found.parameters == 4 * 28 + 5 * (4 * 48 + 1)
    assert found.explainer_parameters == 16
    assert found.seconds_ratio is None and found.forward_seconds is None


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", ["vit-class-token", "torchvision-vit", "own-nonlinear-head"])
def test_operations_are_those_of_torchs_counter(kind, grad):
    case = make_case(kind)
    model = case.wrapped.unwrap().eval()

    def call():
        with torch.set_grad_enabled(grad):
            loss = model(case.images).sum()
            if grad:
                torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    kernel = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with kernel, FlopCounterMode(display=False) as counter:
            call()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert count_operations(call) == counter.get_total_flops() // 2 > 0
    assert torch.backends.mha.get_fastpath_enabled()


def test_torchvisions_fused_attention_is_counted():
    """Without gradients it is one kernel, which has no formula."""
    model = torchvision.models.VisionTransformer(16, 8, 1, 2, 8, 16, num_classes=3).eval()
    images = torch.randn(1, 3, 16, 16)
    with_gradients = count_operations(lambda: model(images))
    with torch.no_grad():
        assert count_operations(lambda: model(images)) == with_gradients


def test_a_wrapped_model_explains_itself_in_about_one_pass():
    case = make_case("vit-average")
    training = {module: module.training for module in case.wrapped.modules()}
    state = torch.get_rng_state()
    found = cost(SelfExplaining(case.wrapped), case.images, repeats=3)
    assert 1 <= found.forward_equivalents < 1.1
    report = case.wrapped.report()
    assert found.forward_multiply_adds == report.flops_logits
    assert found.parameters == report.params.after
    assert found.explainer_parameters == 0
    assert found.seconds_ratio == pytest.approx(found.explanation_seconds / found.forward_seconds)
    assert training == {module: module.training for module in case.wrapped.modules()}
    assert torch.equal(state, torch.get_rng_state())


def test_an_explainer_pays_for_the_pass_that_predicts():
    model = convolution().train()
    found = cost(RandomMap(model, grid=(2, 2)), torch.randn(2, 3, 6, 8), repeats=1)
    assert found.forward_equivalents == 1
    assert model.training and found.seconds_ratio > 0


def test_a_function_has_no_parameters_to_count():
    found = cost(RandomMap(lambda images: images.mean((2, 3)), grid=(2, 2)), torch.rand(1, 3, 4, 4))
    assert found.parameters is None
    assert found.forward_multiply_adds == 0 and found.forward_equivalents != 0


def test_errors():
    with pytest.raises(ArgumentError, match=r"explainer\.model"):
        cost(lambda images, target: None, torch.rand(1, 3, 4, 4))
    with pytest.raises(ArgumentError, match=r"explainer\.model"):
        cost(Gradient("resnet50"), torch.rand(1, 3, 4, 4))
    with pytest.raises(ArgumentError, match="repeats"):
        cost(Gradient(convolution()), torch.rand(1, 3, 6, 8), repeats=-1)
