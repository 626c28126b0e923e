"""The wrapper as a guest in other people's programs: mode, attributes, copies, unwrapping."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from shapwrap import ShapleyWrapper, sample_coalitions, shapley_loss
from shapwrap.errors import BackboneTypeError
from tests.backbones import BUILDERS, build, make_case, random_coalitions


def _structure(model):
    return {
        name: (
            type(module),
            module.training,
            len(module._forward_hooks) + len(module._forward_pre_hooks),
            repr(module),
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("kind", list(BUILDERS))
def test_unwrap_gives_back_the_model_as_it_was(kind):
    model, size = build(kind, (3, 3))
    list(model.modules())[-1].train()
    frozen = next(model.parameters()).requires_grad_(False)
    structure = _structure(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    requires = {name: p.requires_grad for name, p in model.named_parameters()}
    wrapped = ShapleyWrapper(model, image_size=size)
    assert wrapped.model is model
    images = torch.randn(2, 3, *size)
    wrapped.explain(images)
    wrapped.audit(images, num_coalitions=2)
    wrapped.report()
    assert _structure(wrapped.model) == structure
    assert wrapped.unwrap() is model
    assert _structure(model) == structure
    assert requires == {name: p.requires_grad for name, p in model.named_parameters()}
    assert not frozen.requires_grad
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(BackboneTypeError, match="was unwrapped"):
        wrapped(images)
    ShapleyWrapper(model, image_size=size)


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_untouched(training):
    model = timm.create_model("test_resnet", num_classes=3, drop_rate=0.3).train(training)
    wrapped = ShapleyWrapper(model)
    images = torch.randn(2, 3, 160, 160)
    statistics = model.bn1.running_mean.clone()
    for call in (wrapped.explain, wrapped.audit, lambda _: wrapped.report()):
        call(images)
        assert wrapped.training == model.training == model.layer1.training == training
    assert torch.equal(statistics, model.bn1.running_mean), "explaining moved batch statistics"
    wrapped.train(not training)
    assert model.training != training


def test_batch_statistics_come_from_clean_images_alone():
    models = [timm.create_model("test_resnet", num_classes=3).train() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    images = torch.randn(4, 3, 160, 160)
    wrapped = ShapleyWrapper(models[0])
    wrapped(images, sample_coalitions(4, 25))
    models[1](images)
    for name, buffer in models[1].named_buffers():
        torch.testing.assert_close(dict(models[0].named_buffers())[name], buffer)


def test_dropout_is_one_draw_for_both_branches():
    model = timm.create_model("test_efficientnet", num_classes=3, drop_rate=0.5, drop_path_rate=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped = ShapleyWrapper(model.eval())
    # Dropout of the head alone: batch statistics would couple the images otherwise.
    wrapped.training = True
    images = torch.randn(2, 3, 160, 160)
    coalitions = torch.zeros(2, 2, 25, dtype=torch.bool)
    coalitions[:, 0] = True
    first = wrapped(images, coalitions)
    second = wrapped(images, coalitions)
    assert not torch.equal(first.logits, second.logits)
    torch.testing.assert_close(first.values[:, 0], first.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(first.estimates[:, 0], first.logits, atol=1e-5, rtol=1e-5)


def test_random_state_is_untouched():
    model = timm.create_model("test_vit2").eval()
    before = torch.get_rng_state()
    wrapped = ShapleyWrapper(model)
    images = torch.zeros(1, 3, 160, 160)
    wrapped.explain(images)
    wrapped.audit(images)
    wrapped.report()
    assert torch.equal(before, torch.get_rng_state())


def test_unknown_attributes_are_the_models():
    wrapped = ShapleyWrapper(timm.create_model("test_vit2"))
    assert wrapped.pretrained_cfg is wrapped.model.pretrained_cfg
    assert timm.data.resolve_model_data_config(wrapped)["input_size"] == (3, 160, 160)
    wrapped.set_grad_checkpointing(True)
    assert wrapped.model.grad_checkpointing
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = wrapped.no_such_thing
    wrapped.reset_classifier(7)
    assert wrapped.num_classes == 7
    assert wrapped(torch.zeros(1, 3, 160, 160)).shape == (1, 7)


def test_gradient_checkpointing_changes_nothing():
    case = make_case("vit-average")
    coalitions = random_coalitions(case, 2, 0, paired=True)
    gradients = []
    for recompute in (False, True):
        case.wrapped.set_grad_checkpointing(recompute)
        case.wrapped.zero_grad()
        shapley_loss(case.wrapped(case.images, coalitions)).backward()
        gradients.append([p.grad.clone() for p in case.wrapped.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("kind", ["vit-class-token", "eva-mixed-registers", "convnext", "resnet"])
@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies_are_whole_and_apart(kind, how):
    case = make_case(kind)
    clone = (
        pickle.loads(pickle.dumps(case.wrapped)) if how == "pickle" else copy.deepcopy(case.wrapped)
    )
    with torch.no_grad():
        expected = case.wrapped.attribute(case.images)
        for parameter in case.wrapped.parameters():
            parameter.zero_()
        torch.testing.assert_close(clone.attribute(case.images), expected)
        for parameter in clone.parameters():
            parameter.zero_()
        assert clone.attribute(case.images).abs().max() == 0


@pytest.mark.parametrize("kind", list(BUILDERS))
def test_every_trainable_parameter_gets_a_finite_gradient(kind):
    case = make_case(kind)
    case.wrapped.train()
    output = case.wrapped(case.images, random_coalitions(case, 2, 0, paired=True))
    (shapley_loss(output) + output.logits.square().mean()).backward()
    for name, parameter in case.wrapped.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("name", ["test_vit2", "test_convnext", "test_resnet"])
def test_a_replaced_classifier_leaves_nothing_unused(name):
    wrapped = ShapleyWrapper(timm.create_model(name), num_classes=3)
    images = torch.randn(2, 3, 160, 160)
    output = wrapped(images, sample_coalitions(2, wrapped.num_patches))
    (output.logits.sum() + shapley_loss(output)).backward()
    unused = [n for n, p in wrapped.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []
    assert all(parameter.requires_grad for parameter in wrapped.unwrap().parameters())


def test_gradient_checkpointing_beside_batch_norm():
    model = timm.create_model("test_resnet", num_classes=3).train()
    wrapped = ShapleyWrapper(model)
    images = torch.randn(2, 3, 160, 160)
    coalitions = sample_coalitions(2, 25, generator=torch.Generator().manual_seed(0))
    gradients = []
    for recompute in (False, True):
        wrapped.set_grad_checkpointing(recompute)
        wrapped.zero_grad()
        shapley_loss(wrapped(images, coalitions)).backward()
        gradients.append(model.layer1[0].conv1.weight.grad.clone())
        assert model.grad_checkpointing == recompute
    torch.testing.assert_close(gradients[0], gradients[1])


def test_non_square_patches():
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=(32, 64), patch_size=(8, 16), embed_dim=24, depth=1, num_heads=2, num_classes=3
    )
    wrapped = ShapleyWrapper(model)
    assert wrapped.grid == (4, 4)
    assert wrapped.report().masking == "token-removal"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["test_vit2", "test_convnext", "mobilenetv3_small_050"])
def test_half_precision_changes_no_choice(name, dtype):
    model = timm.create_model(name, num_classes=3).eval()
    expected = ShapleyWrapper(model).report()
    model = ShapleyWrapper(model).unwrap().to(dtype)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = ShapleyWrapper(model).report()
    assert (found.masking, found.readout) == (expected.masking, expected.readout)
    assert found.max_logit_difference < 1e-4
    for key, tensor in model.state_dict().items():
        assert tensor.dtype == state[key].dtype
        assert torch.equal(tensor, state[key])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["vit-average", "eva-average", "convnext", "own-nonlinear-head"])
def test_half_precision_models_have_float32_values(kind, dtype):
    case = make_case(kind, dtype=dtype)
    with torch.no_grad():
        values = case.wrapped.attribute(case.images)
        logits = case.wrapped(case.images)
    assert values.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(values.sum(1), logits, atol=1e-4, rtol=1e-4)
    assert case.wrapped.explain(case.images).efficiency_gap().max() < 1e-4


@pytest.mark.parametrize("kind", ["vit-average", "resnet", "own-nonlinear-head"])
def test_autocast_ends_before_the_head(kind):
    case = make_case(kind)
    coalitions = torch.ones(2, 2, case.wrapped.num_patches, dtype=torch.bool)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = case.wrapped(case.images, coalitions)
        values = case.wrapped.attribute(case.images)
        logits = case.wrapped(case.images)
    assert {t.dtype for t in (*output, values, logits)} == {torch.float32}
    torch.testing.assert_close(values.sum(1), logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.logits, logits, atol=1e-5, rtol=1e-5)


COMPILE = """
import torch
from tests.backbones import make_case, random_coalitions
for kind in ("vit-class-token", "eva-average", "resnet"):
    case = make_case(kind)
    coalitions = random_coalitions(case, 2, 0, paired=True)
    compiled = torch.compile(case.wrapped, fullgraph=True, backend="eager")
    expected = case.wrapped(case.images, coalitions, paired=True)
    found = compiled(case.images, coalitions, paired=True)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other)
    found[2].sum().backward()
"""


def test_compiles_without_graph_breaks():
    # In a process of its own: dynamo cannot trace the shape checks of the tests.
    subprocess.run([sys.executable, "-c", COMPILE], check=True, cwd=Path(__file__).parent.parent)


def test_class_names():
    model = timm.create_model("resnet18.a1_in1k")
    assert ShapleyWrapper(model).class_names[0].startswith("tench")
    assert ShapleyWrapper(timm.create_model("test_resnet", num_classes=3)).class_names is None
    wrapped = ShapleyWrapper(nn.Sequential(*build("own-nonlinear-head", (2, 2))[0].children()))
    assert wrapped.class_names is None
