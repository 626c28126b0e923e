"""Occlusion, KernelSHAP and RISE against loops, definitions and models whose evidence is known."""

import math

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shapwrap import ShapleyWrapper
from shapwrap.backbones.base import Normalization
from shapwrap.errors import ArgumentError, EstimationError
from shapwrap.estimators import ConvergenceWarning
from shapwrap.explainers import RISE, KernelSHAP, Occlusion
from shapwrap.explainers.removal import replacement
from shapwrap.explainers.rise import CoarseMasks
from tests.backbones import make_case
from tests.games import shapley_by_definition

GRID, SIZE = (2, 3), (8, 12)


class Net(nn.Module):
    """Small, nonlinear, in double precision; train mode differs from eval mode."""

    def __init__(self, size=SIZE):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(6, 3 * math.prod(size), generator=generator, dtype=torch.float64)
        self.first = nn.Parameter(weights / 12)
        self.last = nn.Parameter(torch.randn(4, 6, generator=generator, dtype=torch.float64))
        self.drop = nn.Dropout(0.5)

    def forward(self, images):
        return self.drop((images.flatten(1) @ self.first.T).tanh()) @ self.last.T


class Reader(nn.Module):
    """Reads patches 1 and 5 of a 2 x 3 grid, and nothing else: 3 x mean of one + mean of other."""

    def forward(self, images):
        height, width = images.shape[-2] // 2, images.shape[-1] // 3
        first = images[:, :, :height, width : 2 * width].mean(dim=(1, 2, 3))
        second = images[:, :, height:, 2 * width :].mean(dim=(1, 2, 3))
        score = 3 * first + 2 * second
        return torch.stack((score, torch.zeros_like(score)), dim=1)


def _images(batch=2, size=SIZE, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, 3, *size, generator=generator).to(dtype)


def _methods(model, grid=GRID, **options):
    return {
        "occlusion": Occlusion(model, grid=grid, **options),
        "window": Occlusion(model, grid=grid, window=(3, 4), stride=(2, 3), **options),
        "kernelshap": KernelSHAP(model, grid=grid, **options),
        "sampled": KernelSHAP(model, grid=grid, num_coalitions=60, **options),
        "rise": RISE(model, grid=grid, num_masks=50, cells=(2, 3), **options),
    }


NAMES = list(_methods(Net()))


def _hidden(image, patch, filling, grid=GRID):
    """The image with one patch filled, by slices."""
    height, width = image.shape[-2] // grid[0], image.shape[-1] // grid[1]
    row, column = divmod(patch, grid[1])
    where = (
        slice(None),
        slice(row * height, (row + 1) * height),
        slice(column * width, (column + 1) * width),
    )
    changed = image.clone()
    changed[where] = filling.expand_as(image)[where]
    return changed


def _value_table(model, image, filling, target, softmax=False):
    table = []
    for row in range(64):
        masked = image
        for patch in range(6):
            if not row >> patch & 1:
                masked = _hidden(masked, patch, filling)
        logits = model(masked[None])[0]
        table.append(float((logits.softmax(0) if softmax else logits)[target]))
    return np.array(table)


@pytest.mark.parametrize("score", ["logit", "probability"])
@pytest.mark.parametrize("chunk_size", [1, 5, 64])
@torch.no_grad()
def test_occlusion_of_patches_by_a_loop(score, chunk_size):
    model, images, target = Net().eval(), _images(), torch.tensor([2, 0])
    method = Occlusion(model, grid=GRID, fill="mean", score=score, chunk_size=chunk_size)
    found = method(images, target)
    link = (lambda x: x.softmax(-1)) if score == "probability" else (lambda x: x)
    for b, image in enumerate(images):
        filling = image.mean(dim=(1, 2), keepdim=True)
        for patch in range(6):
            drop = link(model(image[None])) - link(model(_hidden(image, patch, filling)[None]))
            assert float(found.values[b, patch]) == pytest.approx(float(drop[0, target[b]]))
    assert found.method == "occlusion"
    assert torch.isnan(found.total).all()


@torch.no_grad()
def test_occlusion_with_a_window_by_a_loop():
    model, images = Net().eval(), _images()
    found = Occlusion(model, grid=GRID, window=(3, 5), stride=(2, 4), chunk_size=7)(images, 1)
    for b, image in enumerate(images):
        total, visits = np.zeros(SIZE), np.zeros(SIZE)
        for top in (0, 2, 4, 5):
            for left in (0, 4, 7):
                changed = image.clone()
                changed[:, top : top + 3, left : left + 5] = 0
                drop = float((model(image[None]) - model(changed[None]))[0, 1])
                total[top : top + 3, left : left + 5] += drop / 15
                visits[top : top + 3, left : left + 5] += 1
        np.testing.assert_allclose(found.pixels[b].numpy(), total / visits, atol=1e-12)
        patches = (total / visits).reshape(2, 4, 3, 4).sum((1, 3)).ravel()
        np.testing.assert_allclose(found.values[b].numpy(), patches, atol=1e-12)


@torch.no_grad()
def test_a_window_like_a_patch_is_the_patch():
    model, images = Net().eval(), _images()
    patches = Occlusion(model, grid=GRID)(images, 0)
    window = Occlusion(model, grid=GRID, window=(4, 4), stride=(4, 4))(images, 0)
    torch.testing.assert_close(patches.values, window.values)


@pytest.mark.parametrize("score", ["logit", "probability"])
@torch.no_grad()
def test_few_patches_are_enumerated(score):
    model, images, target = Net().eval(), _images(), torch.tensor([3, 1])
    found = KernelSHAP(model, grid=GRID, fill=0.5, score=score, chunk_size=9)(images, target)
    filling = torch.tensor(0.5, dtype=torch.float64)
    for b, image in enumerate(images):
        table = _value_table(model, image, filling, target[b], score == "probability")
        expected = shapley_by_definition(table)
        np.testing.assert_allclose(found.values[b].numpy(), expected, atol=1e-12)
        assert float(found.total[b]) == pytest.approx(table[-1] - table[0])
    assert found.efficiency_gap().max() < 1e-12


@pytest.mark.parametrize("options", [{}, {"paired": False}, {"exact_matrix": True}])
def test_sampled_values_are_efficient_and_come_close(options):
    model, images = Net().eval(), _images()
    exact = KernelSHAP(model, grid=GRID)(images, 0)
    errors = []
    # Below 2^6 coalitions it samples.
    for number in (24, 60):
        made = [
            KernelSHAP(
                model,
                grid=GRID,
                num_coalitions=number,
                generator=torch.Generator().manual_seed(seed),
                **options,
            )(images, 0)
            for seed in range(12)
        ]
        assert max(float(m.efficiency_gap().max()) for m in made) < 1e-10
        errors.append(torch.stack([m.values - exact.values for m in made]).square().mean())
    assert errors[1] < errors[0]
    if not options:
        assert errors[1].sqrt() < 0.3 * exact.values.std()


@torch.no_grad()
def test_kernelshap_with_shapiq():
    import shapiq

    model, images = Net((8, 20)).eval(), _images(1, (8, 20))
    grid = (2, 5)
    found = KernelSHAP(model, grid=grid, num_coalitions=1024)(images, 1)
    sampled = KernelSHAP(model, grid=grid, num_coalitions=900)(images, 1)
    zero = torch.zeros((), dtype=torch.float64)

    def game(masks):
        values = []
        for mask in np.atleast_2d(masks):
            image = images[0]
            for patch in np.flatnonzero(~mask):
                image = _hidden(image, int(patch), zero, grid)
            values.append(float(model(image[None])[0, 1]))
        return np.array(values)

    exact = shapiq.ExactComputer(game, 10)("SV", 1)
    expected = np.array([exact[(i,)] for i in range(10)])
    np.testing.assert_allclose(found.values[0].numpy(), expected, atol=1e-10)
    assert np.abs(sampled.values[0].numpy() - expected).max() < 0.1 * np.ptp(expected)


@pytest.mark.parametrize("kind", ["vit-average-norm-registers", "resnet"])
def test_native_masking_is_the_game_of_the_wrapped_model(kind):
    case = make_case(kind, grid=(2, 3))
    target = torch.tensor([1, 3])
    found = KernelSHAP(case.wrapped, masking="native", chunk_size=10)(case.images, target)
    masks = torch.arange(64)[:, None] >> torch.arange(6) & 1 == 1
    with torch.no_grad():
        values = case.wrapped.value(case.images, masks.expand(2, 64, 6)).double()
    for b in range(2):
        expected = shapley_by_definition(values[b, :, target[b]].numpy())
        np.testing.assert_allclose(found.values[b].numpy(), expected, atol=1e-5)
    logits = found.logits.gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(found.total, logits, atol=1e-5, rtol=1e-5)
    sampled = KernelSHAP(case.wrapped, masking="native", num_coalitions=60)(case.images, target)
    assert sampled.efficiency_gap().max() < 1e-5


@torch.no_grad()
def test_rise_by_a_loop():
    """The masks of the paper, one by one; only the random numbers are those of the method."""
    model, images = Net().eval(), _images()
    number, cells, keep = 11, (2, 5), 0.4
    method = RISE(model, grid=GRID, num_masks=number, cells=cells, keep=keep, chunk_size=4)
    found = method(images, 2)
    drawn = CoarseMasks.drawn(number, SIZE, cells, keep, torch.Generator().manual_seed(0))
    step = (4, 3)
    expected = np.zeros((2, *SIZE))
    for m in range(number):
        coarse = drawn.kept[m, 0].numpy()
        assert set(np.unique(coarse)) <= {0.0, 1.0}
        top, left = int(drawn.top[m]), int(drawn.left[m])
        assert 0 <= top < step[0]
        assert 0 <= left < step[1]
        mask = np.zeros(SIZE)
        for y in range(SIZE[0]):
            for x in range(SIZE[1]):
                mask[y, x] = _bilinear(coarse, y + top, x + left, step)
        for b, image in enumerate(images):
            masked = image * torch.from_numpy(mask)
            expected[b] += mask * float(model(masked[None]).softmax(1)[0, 2]) / (number * keep)
    np.testing.assert_allclose(found.pixels.numpy(), expected, atol=1e-6)


def _bilinear(coarse, y, x, step):
    """Value of a grid drawn (n + 1) / n times n cells of `step` pixels large, at one pixel."""
    rows, columns = coarse.shape
    v = (y + 0.5) * rows / ((rows + 1) * step[0]) - 0.5
    u = (x + 0.5) * columns / ((columns + 1) * step[1]) - 0.5
    v, u = min(max(v, 0), rows - 1), min(max(u, 0), columns - 1)
    i, j = min(int(v), rows - 2), min(int(u), columns - 2)
    a, b = v - i, u - j
    above = coarse[i, j] * (1 - b) + coarse[i, j + 1] * b
    below = coarse[i + 1, j] * (1 - b) + coarse[i + 1, j + 1] * b
    return above * (1 - a) + below * a


@given(st.tuples(st.integers(5, 20), st.integers(5, 20)), st.integers(1, 5), st.integers(1, 5))
def test_masks_of_rise_fit_any_image(size, rows, columns):
    generator = torch.Generator().manual_seed(0)
    masks = CoarseMasks.drawn(40, size, (rows, columns), 0.5, generator).masks(size)
    assert masks.shape == (40, *size)
    assert masks.min() >= 0
    assert masks.max() <= 1
    assert abs(float(masks.mean()) - 0.5) < 0.25


@pytest.mark.parametrize("name", NAMES)
def test_evidence_is_ranked_first(name):
    """Patches 1 and 5 are all that the model reads; others get nothing where that is exact."""
    images = 1 + 0.1 * _images(2, dtype=torch.float32)
    methods = _methods(Reader()) | {
        "rise": RISE(Reader(), grid=GRID, num_masks=3000, cells=(4, 6), score="logit")
    }
    found = methods[name](images, 0).values
    order = found.argsort(dim=1, descending=True)[:, :2].tolist()
    assert order == [[1, 5], [1, 5]]
    if name in ("occlusion", "kernelshap", "sampled"):
        others = found[:, [0, 2, 3, 4]]
        torch.testing.assert_close(others, torch.zeros_like(others), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk_size", [3, 64])
def test_a_batch_is_its_images_one_by_one(name, chunk_size):
    model, images = Net().eval(), _images(4)
    target = torch.tensor([0, 1, 2, 3])
    method = _methods(model, chunk_size=chunk_size)[name]
    together = method(images, target)
    for index in range(4):
        alone = method(images[index, None], target[index, None])
        torch.testing.assert_close(alone.values[0], together.values[index])
    whole = _methods(model, chunk_size=1000)[name](images, target)
    torch.testing.assert_close(whole.values, together.values)


@pytest.mark.parametrize("name", ["sampled", "rise"])
def test_seeds_reproduce_and_differ(name):
    images = _images()

    def explain(seed):
        generator = torch.Generator().manual_seed(seed)
        return _methods_with(generator)[name](images, 0).values

    def _methods_with(generator):
        model = Net().eval()
        return {
            "sampled": KernelSHAP(model, grid=GRID, num_coalitions=40, generator=generator),
            "rise": RISE(model, grid=GRID, num_masks=20, cells=(2, 2), generator=generator),
        }

    assert torch.equal(explain(1), explain(1))
    assert not torch.equal(explain(1), explain(2))
    method = _methods_with(torch.Generator().manual_seed(1))[name]
    assert torch.equal(method(images, 0).values, method(images, 0).values)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_left_as_it_was(name):
    model = Net()
    model.drop.eval()
    randomness = torch.get_rng_state()
    first = _methods(model)[name](_images(), 1)
    assert (model.training, model.drop.training) == (True, False)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not model._forward_hooks
    assert torch.equal(randomness, torch.get_rng_state())
    assert not first.values.requires_grad
    torch.testing.assert_close(first.values, _methods(model.eval())[name](_images(), 1).values)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_precision(name, dtype):
    found = _methods(Net().to(dtype).eval())[name](_images(1, dtype=dtype), 0)
    assert found.values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    reference = _methods(Net().eval())[name](_images(1, dtype=dtype).double(), 0).values
    error = (found.values - reference).abs().max() / reference.abs().max()
    assert error < (0.2 if dtype == torch.bfloat16 else 1e-4)


def test_a_wrapped_model_and_its_own_grid():
    case = make_case("vit-average-norm-registers", grid=(2, 3))
    for method in (
        Occlusion(case.wrapped),
        KernelSHAP(case.wrapped),
        RISE(case.wrapped, num_masks=4),
    ):
        found = method(case.images)
        assert found.grid == (2, 3)
        assert torch.equal(found.target, case.wrapped(case.images).argmax(1))
    assert isinstance(case.wrapped, ShapleyWrapper)


def test_convergence_threshold_of_kernelshap():
    images = _images(2, (16, 20))
    options = {"grid": (4, 5), "num_coalitions": 8000}
    model = Net((16, 20)).eval()
    whole = KernelSHAP(model, **options)(images, 0)
    early = KernelSHAP(model, threshold=0.2, **options)(images, 0)
    span = whole.values.amax() - whole.values.amin()
    assert 0 < (whole.values - early.values).abs().max() < 0.3 * span
    with pytest.warns(ConvergenceWarning, match="2 of 2"):
        KernelSHAP(model, threshold=1e-9, grid=(4, 5), num_coalitions=2000)(images, 0)


def test_fillings():
    images = _images(2)
    torch.testing.assert_close(replacement(images, "zero", None), torch.zeros_like(images))
    means = images.mean((2, 3), keepdim=True).expand_as(images)
    torch.testing.assert_close(replacement(images, "mean", None), means)
    normalization = Normalization((0.5, 0.4, 0.3), (0.2, 0.25, 0.5))
    black = replacement(images, "black", normalization)
    assert black[1, :, 3, 4].tolist() == pytest.approx([-2.5, -1.6, -0.6])
    assert torch.equal(replacement(images, images[:1], None), images[:1].expand_as(images))
    assert torch.equal(replacement(images, -1.5, None), torch.full_like(images, -1.5))
    flat = torch.full((1, 3, 40, 30), 2.0)
    torch.testing.assert_close(replacement(flat, "blur", None), flat)
    dot = torch.zeros(1, 1, 64, 48, dtype=torch.float64)
    dot[..., 32, 24] = 1
    blurred = replacement(dot, "blur", None)[0, 0]
    offsets = np.arange(-9, 10)
    weights = np.exp(-0.5 * (offsets / 3) ** 2)
    expected = np.outer(weights, weights) / weights.sum() ** 2
    np.testing.assert_allclose(blurred[23:42, 15:34].numpy(), expected, atol=1e-7)


def test_bad_input():
    model, images = Net().eval(), _images()
    for make in (Occlusion, KernelSHAP, RISE):
        with pytest.raises(ArgumentError, match="fill is 'grey'"):
            make(model, grid=GRID, fill="grey")
        with pytest.raises(ArgumentError, match="fill is nan"):
            make(model, grid=GRID, fill=math.nan)
        with pytest.raises(ArgumentError, match="score is 'loss'"):
            make(model, grid=GRID, score="loss")
        with pytest.raises(ArgumentError, match="black"):
            make(model, grid=GRID, fill="black")(images)
        with pytest.raises(ArgumentError, match="broadcasts"):
            make(model, grid=GRID, fill=torch.zeros(5))(images)
        with pytest.raises(ArgumentError, match="chunk_size"):
            make(model, grid=GRID, chunk_size=0)
    with pytest.raises(ArgumentError, match="window is"):
        Occlusion(model, grid=GRID, window=(0, 2))
    with pytest.raises(ArgumentError, match="within the images"):
        Occlusion(model, grid=GRID, window=(9, 2))(images)
    with pytest.raises(ArgumentError, match="never"):
        Occlusion(model, grid=GRID, window=(2, 2), stride=(3, 2))(images)
    with pytest.raises(ArgumentError, match="without a window"):
        Occlusion(model, grid=GRID, stride=(3, 2))
    with pytest.raises(ArgumentError, match="masking is"):
        KernelSHAP(model, grid=GRID, masking="grey")
    with pytest.raises(ArgumentError, match="wrapped model"):
        KernelSHAP(model, masking="native")
    with pytest.raises(ArgumentError, match="num_coalitions is 1"):
        KernelSHAP(model, grid=GRID, num_coalitions=1)
    with pytest.raises(EstimationError, match="num_coalitions"):
        KernelSHAP(model, grid=(4, 6), num_coalitions=4)(images)
    wrapped = make_case("vit-average-norm-registers", grid=(2, 3)).wrapped
    with pytest.raises(ArgumentError, match="the model's own"):
        KernelSHAP(wrapped, masking="native", grid=(1, 3))
    with pytest.raises(ArgumentError, match="for pixels"):
        KernelSHAP(wrapped, masking="native", score="probability")
    for options in ({"num_masks": 0}, {"cells": (0, 7)}, {"keep": 1.0}):
        with pytest.raises(ArgumentError, match=f"{next(iter(options))} is"):
            RISE(model, grid=GRID, **options)


def test_black_is_known_for_models_of_torchvision():
    model = torchvision.models.resnet18()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = Occlusion(model, fill="black")(images)
    mean, std = (torch.tensor(n)[:, None, None] for n in found.normalization)
    torch.testing.assert_close(found.values, Occlusion(model, fill=-mean / std)(images).values)
