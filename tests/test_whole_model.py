"""Heads that no mean describes: the model's own output, shared out."""

import pytest
import timm
import torch
import torchvision
from torch import nn

from shapwrap import ShapleyWrapper
from shapwrap.errors import MissingHeadError, ReadoutError
from tests.backbones import OwnConvolutions, make_case, random_coalitions

KINDS = ["whole-class-token", "whole-two-heads", "traced-whole"]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_values_are_those_of_the_model_on_masked_images(kind):
    """v(s) = (|s| / N) f(x_s), with the model called on an image masked by hand."""
    case = make_case(kind)
    coalitions = random_coalitions(case, 3, 1, paired=False)
    values = case.wrapped.value(case.images, coalitions)
    (rows, columns), (height, width) = case.wrapped.grid, case.images.shape[-2:]
    for index in range(3):
        cells = coalitions[:, index].view(-1, 1, rows, columns)
        pixels = cells.repeat_interleave(height // rows, 2).repeat_interleave(width // columns, 3)
        share = coalitions[:, index].float().mean(dim=1, keepdim=True)
        expected = case.wrapped.model(case.images * pixels) * share
        torch.testing.assert_close(values[:, index], expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_shares_start_equal_and_are_learnt(kind):
    case = make_case(kind)
    nn.init.zeros_(case.wrapped.patch_layer.weight)
    values = case.wrapped.attribute(case.images)
    equal = values.mean(dim=1, keepdim=True).expand_as(values)
    torch.testing.assert_close(values, equal)
    coalitions = random_coalitions(case, 2, 0, paired=True)
    output = case.wrapped(case.images, coalitions)
    (output.values - output.estimates).square().mean().backward()
    gradient = case.wrapped.patch_layer.weight.grad
    assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0
    assert any(p is case.wrapped.patch_layer.weight for p in case.wrapped.head_parameters())
    report = case.wrapped.report()
    added = case.wrapped.patch_layer.weight.numel()
    assert report.params.after == report.params.before + added
    assert "equal share of its output until a layer of its own" in report.note


@pytest.mark.parametrize("name", ["efficientvim_m1", "crossvit_tiny_240"])
def test_a_model_of_several_maps_takes_the_last(name):
    model = timm.create_model(name, num_classes=3).eval()
    wrapped = ShapleyWrapper(model)
    images = torch.randn(1, 3, *wrapped.image_size)
    with torch.no_grad():
        maps = model.forward_intermediates(images, intermediates_only=True)
        torch.testing.assert_close(wrapped(images), model(images), atol=1e-5, rtol=1e-5)
    assert wrapped.grid == tuple(maps[-1].shape[-2:])


def test_any_model_can_keep_its_head():
    wrapped = ShapleyWrapper(timm.create_model("test_vit").eval(), readout="efficiency-gap")
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(wrapped(images), wrapped.model(images), atol=1e-5, rtol=1e-5)
    assert wrapped.report().readout == "efficiency-gap"


def test_several_classifiers_cannot_be_replaced_by_one():
    model = timm.create_model("efficientvim_m1", num_classes=3)
    with pytest.raises(ReadoutError, match="cannot replace the classifier of EfficientViM"):
        ShapleyWrapper(model, num_classes=4)


def test_one_classifier_of_a_whole_model_can_be_replaced():
    model = timm.create_model("pit_ti_224", num_classes=3).eval()
    wrapped = ShapleyWrapper(model, head=nn.Linear(model.num_features, 4)).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        hidden = model.forward_head(model.forward_features(images), pre_logits=True)
        torch.testing.assert_close(wrapped(images), wrapped.new_head(hidden), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "readout"),
    [
        ("mobilenet_v2", "affine"),
        ("shufflenet_v2_x0_5", "affine"),
        ("squeezenet1_1", "affine"),
        ("alexnet", "efficiency-gap"),
    ],
)
def test_torchvision_models_whose_children_do_not_run_in_order(name, readout):
    model = torchvision.models.get_model(name, num_classes=4).eval()
    wrapped = ShapleyWrapper(model, image_size=(96, 64))
    images = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        torch.testing.assert_close(wrapped(images), model(images), atol=1e-5, rtol=1e-5)
        values = wrapped.attribute(images)
    torch.testing.assert_close(values.sum(1), wrapped(images), atol=1e-5, rtol=1e-5)
    assert wrapped.report().readout == readout
    assert wrapped.report().note != ""
    wrapped.train()
    coalitions = torch.rand(2, 2, wrapped.patches_of(images)) < 0.5
    wrapped(images, coalitions).values.sum().backward()


def test_auxiliary_heads_are_frozen_and_train_mode_works():
    model = torchvision.models.googlenet(init_weights=False, num_classes=3)
    wrapped = ShapleyWrapper(model, image_size=(96, 96)).train()
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen and all(name.startswith("aux") for name in frozen)
    images = torch.randn(2, 3, 96, 96)
    coalitions = torch.rand(2, 2, wrapped.num_patches) < 0.5
    output = wrapped(images, coalitions)
    output.logits.sum().backward()
    assert all(p.grad is not None for p in wrapped.parameters() if p.requires_grad)
    assert all(p.requires_grad for p in wrapped.unwrap().parameters())


def test_a_traced_encoder_asks_for_its_head():
    model = torchvision.models.mobilenet_v2()
    model.classifier = nn.Identity()
    model.num_classes = None
    with pytest.raises(MissingHeadError, match="num_classes="):
        ShapleyWrapper(model, image_size=(64, 64))
    assert ShapleyWrapper(model, num_classes=4, image_size=(64, 64)).num_classes == 4
    scores = ShapleyWrapper(model, head=nn.Identity(), image_size=(64, 64))
    assert scores.num_classes == 1280


def test_tracing_leaves_no_hook():
    model = OwnConvolutions("amax").eval()
    wrapped = ShapleyWrapper(model, image_size=(16, 16))
    wrapped.explain(torch.randn(1, 3, 16, 16))
    assert not any(module._forward_hooks for module in model.modules())
