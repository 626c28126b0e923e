"""Quantus' own metrics, run on what a wrapped model says."""

import numpy as np
import pytest
import torch

from shapwrap.errors import (
    ArgumentError,
    BackboneTypeError,
    ImageError,
    ImageTypeError,
    TargetError,
)
from shapwrap.interop.quantus import explain_func
from tests.additive import CELL, GRID, additive, images_for
from tests.backbones import make_case

# OpenCV, which Quantus imports, needs a library of the system, libGL: it may be there and broken.
quantus = pytest.importorskip("quantus", exc_type=ImportError)

QUIET = {"disable_warnings": True, "display_progressbar": False}
RAW = {**QUIET, "normalise": False, "abs": False, "perturb_baseline": 0.0}
TARGETS = np.array([1, 4])


def batch(images=None):
    return {"x_batch": (images_for() if images is None else images).numpy(), "y_batch": TARGETS}


@pytest.mark.parametrize("kind", ["vit-average-norm-registers", "resnet", "vit-class-token"])
def test_maps_sum_to_the_logit_above_the_baseline(kind):
    options = {"prefix_tokens": "keep"} if kind == "vit-class-token" else {}
    case = make_case(kind, **options)
    maps = explain_func(case.wrapped, case.images.numpy(), TARGETS)
    assert maps.shape == (2, 1, *case.images.shape[2:])
    assert maps.dtype == np.float32
    with torch.no_grad():
        above = (case.wrapped(case.images) - case.wrapped.baseline).numpy()
    np.testing.assert_allclose(maps.sum((1, 2, 3)), above[[0, 1], TARGETS], atol=2e-4)


def test_precision_is_that_of_the_model():
    case = make_case("vit-average-norm-registers")
    expected = explain_func(case.wrapped, case.images, torch.tensor(TARGETS))
    double = explain_func(case.wrapped, case.images.double().numpy(), TARGETS, device="cpu")
    assert double.dtype == np.float32
    np.testing.assert_array_equal(double, expected)
    one = explain_func(case.wrapped, case.images[:1].numpy(), 1)
    np.testing.assert_allclose(one, expected[:1], atol=1e-6)
    wide = explain_func(case.wrapped.double(), case.images.numpy(), TARGETS)
    assert wide.dtype == np.float64
    np.testing.assert_allclose(wide, expected, atol=1e-5)


def test_pixel_flipping_falls_by_the_value_of_each_patch():
    wrapped, images = additive(), images_for()
    metric = quantus.PixelFlipping(features_in_step=3 * CELL * CELL, **RAW)
    curves = metric(model=wrapped, explain_func=explain_func, softmax=False, **batch())
    values = wrapped.explain(images, torch.tensor(TARGETS)).values.numpy()
    falls = np.cumsum(-np.sort(-values, axis=1), axis=1)
    expected = values.sum(1, keepdims=True) - falls
    np.testing.assert_allclose(np.asarray(curves), expected, atol=1e-5)
    assert np.asarray(curves).shape == (2, GRID[0] * GRID[1])


def test_faithfulness_correlation():
    wrapped = additive()
    maps = explain_func(wrapped, images_for().numpy(), TARGETS)

    def correlation(**options):
        np.random.seed(0)  # noqa: NPY002 (Quantus draws from the global state)
        metric = quantus.FaithfulnessCorrelation(
            nr_runs=12, subset_size=10, return_aggregate=False, **RAW
        )
        return np.asarray(metric(model=wrapped, **batch(), **options))

    found = correlation(explain_func=explain_func)
    assert (np.abs(found) <= 1).all()
    np.testing.assert_allclose(found, correlation(a_batch=maps), atol=1e-6)
    np.testing.assert_allclose(found, correlation(explain_func=explain_func, device="cpu"))
    assert (found > correlation(a_batch=-maps)).all()


def test_a_model_of_random_weights_explains_itself_differently():
    """Quantus copies the model and draws the weights of its layers anew, from the top down."""
    wrapped, images = additive(), images_for()
    before = explain_func(wrapped, images.numpy(), TARGETS)

    def difference(one, other, batched):
        return np.abs(one - other).max(axis=1)

    metric = quantus.MPRT(similarity_func=difference, skip_layers=False, **QUIET)
    with torch.random.fork_rng(devices=[]):
        scores = metric(model=wrapped, explain_func=explain_func, **batch())
    assert max(scores.pop("original")) == 0
    assert len(scores) == 2
    assert all(value > 0.01 for values in scores.values() for value in values)
    np.testing.assert_array_equal(before, explain_func(wrapped, images.numpy(), TARGETS))


def test_sensitivity_asks_again_for_perturbed_images():
    case = make_case("vit-average-norm-registers")
    metric = quantus.MaxSensitivity(nr_samples=2, lower_bound=0.2, **QUIET)
    scores = metric(model=case.wrapped, explain_func=explain_func, **batch(case.images))
    assert len(scores) == 2
    assert all(0 < score < 10 for score in scores)


def test_the_model_is_left_as_it_was():
    case = make_case("resnet")
    modes = [module.training for module in case.wrapped.train().modules()]
    state = {key: tensor.clone() for key, tensor in case.wrapped.state_dict().items()}
    randomness = torch.get_rng_state()
    inputs = case.images.numpy().copy()
    first = explain_func(case.wrapped, inputs, TARGETS)
    np.testing.assert_array_equal(first, explain_func(case.wrapped, inputs, TARGETS))
    np.testing.assert_array_equal(inputs, case.images.numpy())
    assert modes == [module.training for module in case.wrapped.modules()]
    assert all(torch.equal(state[key], part) for key, part in case.wrapped.state_dict().items())
    assert torch.equal(randomness, torch.get_rng_state())


def test_bad_input():
    wrapped, inputs = additive(), images_for().numpy()
    with pytest.raises(BackboneTypeError, match="ShapleyWrapper"):
        explain_func(wrapped.model, inputs, TARGETS)
    with pytest.raises(ArgumentError, match="method"):
        explain_func(wrapped, inputs, TARGETS, method="Saliency")
    with pytest.raises(ImageTypeError):
        explain_func(wrapped, inputs.astype(np.uint8), TARGETS)
    with pytest.raises(ImageTypeError):
        explain_func(wrapped, inputs.tolist(), TARGETS)
    with pytest.raises(ImageError):
        explain_func(wrapped, inputs.transpose(0, 2, 3, 1), TARGETS)
    with pytest.raises(ImageError, match="NaN"):
        explain_func(wrapped, inputs * np.nan, TARGETS)
    for targets in (np.array([1, 5]), np.array([1, 2, 3]), np.array([0.5, 1])):
        with pytest.raises(TargetError):
            explain_func(wrapped, inputs, targets)
