"""captum's contract: shapes, sums, targets, tunnels, metrics and figures."""

import importlib
import sys

import numpy as np
import pytest
import timm.models.vision_transformer
import torch
from hypothesis import given
from hypothesis import strategies as st

captum_attr = pytest.importorskip("captum.attr")

from captum.attr import Attribution, IntegratedGradients, NoiseTunnel  # noqa: E402
from captum.attr import visualization as captum_figures  # noqa: E402
from captum.metrics import infidelity, sensitivity_max  # noqa: E402
from captum.metrics import infidelity_perturb_func_decorator as perturbs  # noqa: E402

from shapwrap import ShapleyWrapper  # noqa: E402
from shapwrap.errors import (  # noqa: E402
    ArgumentError,
    BackboneTypeError,
    GridError,
    ImageError,
    ImageTypeError,
    MapError,
    MissingDependencyError,
    TargetError,
)
from shapwrap.explanation import Explanation  # noqa: E402
from shapwrap.interop.captum import ShapleyAttribution  # noqa: E402
from shapwrap.interop.pixel_maps import owner_of_pixel, pixel_map  # noqa: E402
from shapwrap.masking.pixels import pixel_mask  # noqa: E402
from tests.additive import CELL, additive, images_for  # noqa: E402
from tests.backbones import make_case  # noqa: E402

CASES = {
    "tokens": ("vit-average-norm-registers", {}),
    "map": ("resnet", {}),
    "class token": ("vit-class-token", {"prefix_tokens": "keep"}),
}


def make(name, **options):
    kind, more = CASES[name]
    return make_case(kind, **more, **options)


def unfit(size, **options):
    """A wrapped ViT whose patches of 4 x 4 pixels do not fit the image."""
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=size,
        patch_size=4,
        embed_dim=24,
        depth=1,
        num_heads=3,
        num_classes=5,
        global_pool="avg",
        class_token=False,
        **options,
    )
    return ShapleyWrapper(model.eval(), image_size=size), torch.randn(2, 3, *size)


# --- maps of pixels -------------------------------------------------------------------------


@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    size=st.tuples(st.integers(7, 23), st.integers(7, 23)),
    less=st.tuples(st.integers(-1, 2), st.integers(-1, 2)),
)
def test_maps_by_loops(grid, size, less):
    covered = (size[0] - less[0], size[1] - less[1])
    number = grid[0] * grid[1]
    values = torch.randn(2, number, dtype=torch.float64)
    drawn = pixel_map(_explanation(values, grid, size, covered))
    expected = torch.zeros(2, *size, dtype=torch.float64)
    owner = owner_of_pixel(grid, size, covered)
    for patch in range(number):
        absent = torch.ones(1, 1, number, dtype=torch.bool)
        absent[..., patch] = False
        gone = ~pixel_mask(absent, grid, size, covered)[0, 0]
        assert torch.equal(owner == patch, gone)
        for row, column in gone.nonzero().tolist():
            expected[:, row, column] = values[:, patch] / int(gone.sum())
    torch.testing.assert_close(drawn, expected)
    torch.testing.assert_close(drawn.sum((1, 2)), values.sum(1))


def test_a_patch_without_pixels_is_not_lost():
    with pytest.raises(GridError, match="3 patches of the grid"):
        pixel_map(_explanation(torch.ones(1, 9), (3, 3), (2, 3)))


def _explanation(values, grid, size, covered=None):
    target = torch.zeros(len(values), dtype=torch.int64)
    return Explanation(values, values[:, :1], target, grid, size, covered=covered)


# --- attributions ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_attributions_sum_to_the_logit_above_the_baseline(name, dtype):
    case = make(name, dtype=dtype)
    method = ShapleyAttribution(case.wrapped)
    attributions, delta = method.attribute(case.images, target=3, return_convergence_delta=True)
    assert attributions.shape == case.images.shape
    assert attributions.dtype == dtype
    assert delta.shape == (2,)
    with torch.no_grad():
        logits = case.wrapped(case.images)
    above = (logits - case.wrapped.baseline)[:, 3]
    tolerance = {"atol": 10 * case.tolerance, "rtol": 0}
    torch.testing.assert_close(attributions.sum((1, 2, 3)), above, **tolerance)
    torch.testing.assert_close(delta, torch.zeros_like(delta), **tolerance)
    again = method.compute_convergence_delta(attributions, case.images, target=3)
    torch.testing.assert_close(again, delta, **tolerance)
    off = method.compute_convergence_delta((attributions + 1,), (case.images,), target=3)
    pixels = attributions[0].numel()
    torch.testing.assert_close(off, delta + pixels, atol=1e-3 * pixels, rtol=0)
    # A class token says something of nobody: without its baseline the sum would be wrong.
    assert case.wrapped.has_baseline == (name == "class token")
    if case.wrapped.has_baseline:
        assert abs(float(case.wrapped.baseline[3])) > 100 * case.tolerance


def test_values_of_patches_can_be_read_back():
    case = make("tokens")
    attributions = ShapleyAttribution(case.wrapped).attribute(case.images, target=2)
    cells = attributions.unflatten(2, (3, 4)).unflatten(4, (4, 4)).sum((1, 3, 5)).flatten(1)
    torch.testing.assert_close(cells, case.wrapped.explain(case.images, 2).values)
    assert torch.equal(attributions[:, 0], attributions[:, 2])


@pytest.mark.parametrize(
    "size, options, inside",
    [
        ((14, 19), {}, (12, 16)),
        ((14, 19), {"dynamic_img_pad": True, "dynamic_img_size": True}, (14, 19)),
    ],
)
def test_patches_that_do_not_fit_the_image(size, options, inside):
    wrapped, images = unfit(size, **options)
    attributions, delta = ShapleyAttribution(wrapped).attribute(
        images, target=1, return_convergence_delta=True
    )
    assert attributions.shape == (2, 3, *size)
    torch.testing.assert_close(delta, torch.zeros(2), atol=1e-5, rtol=0)
    read = torch.zeros(size, dtype=torch.bool)
    read[: inside[0], : inside[1]] = True
    assert (attributions[..., ~read] == 0).all()
    assert (attributions[..., read] != 0).all()


def test_sizes_that_the_grid_does_not_divide():
    case = make("map")
    images = torch.randn(1, 3, 61, 77)
    grid = case.wrapped.grid_of(images)
    assert images.shape[2] % grid[0] and images.shape[3] % grid[1]
    _, delta = ShapleyAttribution(case.wrapped).attribute(
        images, target=1, return_convergence_delta=True
    )
    torch.testing.assert_close(delta, torch.zeros(1), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "one", [4, (4,), torch.tensor(4), torch.tensor([4]), [4, 4], [(4,), (4,)], torch.tensor([4, 4])]
)
def test_targets_as_captum_takes_them(one):
    case = make("tokens")
    found = ShapleyAttribution(case.wrapped).attribute(case.images, target=one)
    torch.testing.assert_close(
        found.sum((1, 2, 3)), case.wrapped.explain(case.images, 4).explained()
    )
    # captum itself reads the class of a method of its own in the same way.
    gradients = IntegratedGradients(case.wrapped)
    theirs = gradients.attribute(case.images, target=one, n_steps=1)
    torch.testing.assert_close(theirs, gradients.attribute(case.images, target=4, n_steps=1))


def test_a_class_for_each_image_or_the_predicted_one():
    case = make("tokens")
    method = ShapleyAttribution(case.wrapped)
    expected = case.wrapped.explain(case.images, torch.tensor([1, 3])).values.sum(1)
    for target in ([1, 3], [(1,), (3,)], torch.tensor([1, 3])):
        found = method.attribute(case.images, target=target)
        torch.testing.assert_close(found.sum((1, 2, 3)), expected)
    predicted = case.wrapped(case.images).argmax(1)
    assert torch.equal(method.attribute(case.images), method.attribute(case.images, predicted))


def test_tuples_come_back_as_tuples():
    case = make("map", batch=1)
    method = ShapleyAttribution(case.wrapped)
    plain = method.attribute(case.images, target=0)
    (found,), delta = method.attribute((case.images,), target=0, return_convergence_delta=True)
    assert torch.equal(found, plain)
    assert delta.shape == (1,)


def test_half_precision():
    case = make("tokens")
    wrapped, images = case.wrapped.to(torch.bfloat16), case.images.bfloat16()
    found, delta = ShapleyAttribution(wrapped).attribute(
        images, target=1, return_convergence_delta=True
    )
    assert found.dtype == torch.float32
    torch.testing.assert_close(delta, torch.zeros(2), atol=1e-4, rtol=0)


def test_the_model_is_left_as_it_was():
    case = make("map")
    wrapped = case.wrapped.train()
    next(iter(wrapped.model.children())).eval()
    images = case.images.requires_grad_()
    modes = [module.training for module in wrapped.modules()]
    asks = [parameter.requires_grad for parameter in wrapped.parameters()]
    state = {key: tensor.clone() for key, tensor in wrapped.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in wrapped.modules()]
    randomness = torch.get_rng_state()
    method = ShapleyAttribution(wrapped)
    first = method.attribute(images, target=1)
    assert torch.equal(first, method.attribute(images, target=1))
    method.compute_convergence_delta(first, images, target=1)
    assert not first.requires_grad
    assert images.grad is None
    assert modes == [module.training for module in wrapped.modules()]
    assert asks == [parameter.requires_grad for parameter in wrapped.parameters()]
    assert all(torch.equal(state[key], tensor) for key, tensor in wrapped.state_dict().items())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in wrapped.modules()]
    assert torch.equal(randomness, torch.get_rng_state())


@pytest.mark.parametrize("bias", [None, -2.0])
def test_texts_are_classes_of_an_image_text_model(bias):
    pytest.importorskip("open_clip")
    from shapwrap import ShapleyCLIP
    from tests.clip_models import clip_model, images_of, tokens

    clip = ShapleyCLIP(clip_model(bias=bias))
    images, texts = images_of(clip), tokens(3)
    with pytest.raises(BackboneTypeError, match=r"clip\.classifier\(texts\)"):
        ShapleyAttribution(clip)
    method = ShapleyAttribution(clip.classifier(texts))
    found, delta = method.attribute(images, target=[2, 0], return_convergence_delta=True)
    logits, _ = clip.get_logits(images, texts)
    expected = torch.stack([logits[0, 2], logits[1, 0]]).detach()
    torch.testing.assert_close(found.sum((1, 2, 3)), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(delta, torch.zeros(2), atol=1e-4, rtol=0)


# --- captum's own tools ---------------------------------------------------------------------


def test_facts_that_captum_asks_for():
    method = ShapleyAttribution(additive())
    assert isinstance(method, Attribution)
    assert method.has_convergence_delta()
    assert method.multiplies_by_inputs
    assert method.get_name() == "Shapley Attribution"


def test_noise_tunnel():
    case = make("tokens")
    method = ShapleyAttribution(case.wrapped)
    tunnel = NoiseTunnel(method)
    silent = tunnel.attribute(case.images, nt_samples=2, stdevs=0.0, target=2)
    torch.testing.assert_close(silent, method.attribute(case.images, target=2))
    torch.manual_seed(4)
    found, delta = tunnel.attribute(
        case.images, nt_samples=3, stdevs=0.3, target=[1, 2], return_convergence_delta=True
    )
    torch.manual_seed(4)
    noisy = case.images.repeat_interleave(3, 0)
    noisy = noisy + torch.normal(0, torch.full_like(noisy, 0.3))
    logits = case.wrapped(noisy).unflatten(0, (2, 3)).mean(1)
    expected = torch.stack([logits[0, 1], logits[1, 2]]).detach()
    torch.testing.assert_close(found.sum((1, 2, 3)), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(delta, torch.zeros(6), atol=1e-4, rtol=0)
    assert torch.isfinite(tunnel.attribute(case.images, "vargrad", nt_samples=2, target=2)).all()


@perturbs(multiply_by_inputs=True)
def blacken(inputs, _baselines):
    """Whole patches of each image turned black."""
    cells = torch.rand(len(inputs), 1, inputs.shape[2] // CELL, inputs.shape[3] // CELL) < 0.5
    return inputs * cells.repeat_interleave(CELL, 2).repeat_interleave(CELL, 3)


def test_infidelity_of_an_additive_model_is_zero():
    wrapped, images = additive(), images_for()
    found = ShapleyAttribution(wrapped).attribute(images, target=[1, 4])
    options = {"target": [1, 4], "baselines": torch.zeros_like(images), "n_perturb_samples": 8}
    none = infidelity(wrapped, blacken, images, found, **options)
    torch.testing.assert_close(none, torch.zeros(2), atol=1e-6, rtol=0)
    wrong = infidelity(wrapped, blacken, images, found.roll(CELL, dims=3), **options)
    assert (wrong > 1e-2).all()


def test_sensitivity():
    case = make("tokens")
    method = ShapleyAttribution(case.wrapped)
    still = sensitivity_max(method.attribute, case.images, lambda images: images, target=[0, 1])
    torch.testing.assert_close(still, torch.zeros(2))
    moved = sensitivity_max(method.attribute, case.images, n_perturb_samples=3, target=[0, 1])
    assert moved.shape == (2,)
    assert ((moved > 0) & (moved < 10)).all()


def test_figures():
    wrapped, images = additive(), images_for()
    found = ShapleyAttribution(wrapped).attribute(images, target=1)[0].permute(1, 2, 0)
    picture = images[0].sigmoid().permute(1, 2, 0).numpy()
    figure, axes = captum_figures.visualize_image_attr(
        found.numpy(), picture, "heat_map", sign="all", outlier_perc=0, use_pyplot=False
    )
    drawn = axes.get_images()[-1].get_array()
    expected = found.sum(2) / found.sum(2).abs().max()
    np.testing.assert_allclose(drawn, expected, atol=1e-5)
    figure.clear()
    captum_figures.visualize_image_attr(
        found.numpy(), picture, "blended_heat_map", sign="positive", use_pyplot=False
    )


# --- what is refused ------------------------------------------------------------------------


def test_bad_input():
    wrapped, images = additive(), images_for()
    method = ShapleyAttribution(wrapped)
    with pytest.raises(BackboneTypeError, match="ShapleyWrapper"):
        ShapleyAttribution(wrapped.model)
    for inputs in ((images, images), ()):
        with pytest.raises(ArgumentError, match=f"tuple of {len(inputs)} tensors"):
            method.attribute(inputs, target=1)
    with pytest.raises(ArgumentError, match="additional_forward_args"):
        method.attribute(images, target=1, additional_forward_args=images)
    several = (5, -1, (1, 2), [1], [(1, 2), (0, 1)], torch.zeros(3).long(), torch.ones(2))
    for target in (*several, True, 1.5, "cat", [1.0, 2], [1, "cat"], [None, 1], object()):
        with pytest.raises(TargetError, match="target"):
            method.attribute(images, target=target)
    with pytest.raises(ImageTypeError):
        method.attribute(images.int(), target=1)
    with pytest.raises(ImageTypeError):
        method.attribute([images], target=1)
    with pytest.raises(ImageError, match="NaN"):
        method.attribute(images * torch.nan, target=1)
    with pytest.raises(MapError, match="attributions have shape"):
        method.compute_convergence_delta(images[:, :1], images, target=1)


def test_captum_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    monkeypatch.delitem(sys.modules, "shapwrap.interop.captum")
    with pytest.raises(MissingDependencyError, match=r"shapwrap\[explainers\]"):
        importlib.import_module("shapwrap.interop.captum")
