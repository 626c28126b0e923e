"""Integrated gradients, input x gradient and IDGI against slow loops, and their options."""

import builtins
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import timm.models.resnet
import timm.models.vision_transformer
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shapwrap import ShapleyWrapper
from shapwrap.errors import ArgumentError, MissingDependencyError
from shapwrap.explainers import IDGI, InputXGradient, IntegratedGradients
from tests.explained_models import GRID, SIZE, tiny

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


class Smooth(nn.Module):
    """Reads images of any size; sees how many come at a time."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.last = nn.Linear(4, 3)
        self.pretrained_cfg = {"mean": MEAN, "std": STD}
        self.most = 0

    def forward(self, images):
        self.most = max(self.most, len(images))
        return self.last((self.first(images).tanh() * 3).square().mean(dim=(2, 3)))


def _images(batch, size, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64)


def _gradient(model, x, target, output="logit"):
    x = x.clone().requires_grad_()
    logits = model(x[None])[0]
    value = (logits.softmax(0) if output == "probability" else logits)[target]
    return torch.autograd.grad(value, x)[0].numpy(), float(value.detach())


def _baseline(name, image):
    if name == "zero":
        return np.zeros_like(image)
    if name == "black":
        black = [-mean / std for mean, std in zip(MEAN, STD, strict=True)]
        return np.array(black)[:, None, None] * np.ones_like(image)
    assert name == "blur"
    height, width = image.shape[1:]
    deviation = 10 / 224 * min(height, width)
    radius = max(1, int(np.ceil(3 * deviation)))
    blurred = np.zeros_like(image)
    for row in range(height):
        for column in range(width):
            total = 0.0
            for down in range(-radius, radius + 1):
                for right in range(-radius, radius + 1):
                    weight = np.exp(-(down**2 + right**2) / (2 * deviation**2))
                    y, x = np.clip(row + down, 0, height - 1), np.clip(column + right, 0, width - 1)
                    blurred[:, row, column] += weight * image[:, y, x]
                    total += weight
            blurred[:, row, column] /= total
    return blurred


def _patch_sums(pixels, grid):
    sums = np.zeros(grid)
    height, width = pixels.shape
    for row in range(height):
        for column in range(width):
            sums[row * grid[0] // height, column * grid[1] // width] += pixels[row, column]
    return sums.flatten()


sizes = st.tuples(st.integers(3, 7), st.integers(3, 7))
problems = {
    "size": sizes,
    "batch": st.integers(1, 3),
    "chunk": st.sampled_from([1, 2, 5, 1000]),
    "baseline": st.sampled_from(["zero", "black", "blur"]),
    "seed": st.integers(0, 9),
}


@given(**problems, absolute=st.booleans(), steps=st.integers(1, 6))
def test_integrated_gradients(size, batch, chunk, baseline, seed, absolute, steps):
    torch.manual_seed(seed)
    model, images = Smooth().double(), _images(batch, size, seed)
    target = torch.arange(batch) % 3
    explainer = IntegratedGradients(
        model, grid=(2, 3), chunk_size=chunk, baseline=baseline, absolute=absolute, n_steps=steps
    )
    found = explainer(images, target)
    assert model.most <= chunk
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    for index in range(batch):
        image = images[index].numpy()
        start = _baseline(baseline, image)
        mean = sum(
            weight
            / 2
            * _gradient(
                model, torch.tensor(start + (node + 1) / 2 * (image - start)), int(target[index])
            )[0]
            for node, weight in zip(nodes, weights, strict=True)
        )
        expected = (image - start) * mean
        expected = (np.abs(expected) if absolute else expected).sum(axis=0)
        # captum rounds the weights of its steps to float32.
        np.testing.assert_allclose(found.pixels[index].numpy(), expected, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(
            found.values[index].numpy(), _patch_sums(expected, (2, 3)), rtol=1e-5, atol=1e-7
        )
        ends = [_gradient(model, torch.tensor(x), int(target[index]))[1] for x in (image, start)]
        if absolute:
            assert found.total.isnan().all()
        else:
            np.testing.assert_allclose(
                found.total[index].item(), ends[0] - ends[1], rtol=1e-7, atol=1e-12
            )


@given(**problems, output=st.sampled_from(["probability", "logit"]), steps=st.integers(1, 6))
def test_idgi(size, batch, chunk, baseline, seed, output, steps):
    torch.manual_seed(seed)
    model, images = Smooth().double(), _images(batch, size, seed)
    target = torch.arange(batch) % 3
    explainer = IDGI(
        model, grid=(2, 3), chunk_size=chunk, baseline=baseline, output=output, n_steps=steps
    )
    found = explainer(images, target)
    assert model.most <= chunk
    for index in range(batch):
        image = images[index].numpy()
        start = _baseline(baseline, image)
        path = [torch.tensor(start + j / steps * (image - start)) for j in range(steps + 1)]
        made = [_gradient(model, x, int(target[index]), output) for x in path]
        expected = np.zeros(size)
        for (gradient, value), (_, following) in itertools.pairwise(made):
            expected += (gradient**2 * (following - value) / (gradient**2).sum()).sum(axis=0)
        np.testing.assert_allclose(found.pixels[index].numpy(), expected, rtol=1e-7, atol=1e-12)
        np.testing.assert_allclose(
            found.values[index].numpy(), _patch_sums(expected, (2, 3)), rtol=1e-7, atol=1e-12
        )
        gain = made[-1][1] - made[0][1]
        np.testing.assert_allclose(found.total[index].item(), gain, rtol=1e-7, atol=1e-12)
    assert (found.efficiency_gap() < 1e-10).all()


@given(
    size=sizes, batch=st.integers(1, 3), chunk=st.sampled_from([1, 2, 9]), absolute=st.booleans()
)
def test_input_x_gradient(size, batch, chunk, absolute):
    model, images = Smooth().double(), _images(batch, size, batch)
    found = InputXGradient(model, grid=(2, 3), chunk_size=chunk, absolute=absolute)(images, 1)
    assert model.most <= chunk
    for index in range(batch):
        product = images[index].numpy() * _gradient(model, images[index], 1)[0]
        expected = (np.abs(product) if absolute else product).sum(axis=0)
        np.testing.assert_allclose(found.pixels[index].numpy(), expected, rtol=1e-9, atol=1e-12)
    assert found.total.isnan().all()


def test_input_x_gradient_of_a_homogeneous_model_sums_to_its_logit():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 4, stride=4, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3, bias=False),
    )
    images = torch.randn(2, 3, 8, 12)
    found = InputXGradient(model)(images, 2)
    torch.testing.assert_close(found.values.sum(1), model(images)[:, 2].detach())


def test_baseline_as_a_tensor():
    model, images = Smooth(), torch.randn(2, 3, 6, 9)
    colour = torch.tensor([0.3, -1.0, 2.0])[:, None, None]
    for method in (IntegratedGradients, IDGI):
        expected = method(model, grid=(2, 3), baseline=colour.expand(2, 3, 6, 9))(images, 1)
        found = method(model, grid=(2, 3), baseline=colour)(images, 1)
        torch.testing.assert_close(found.values, expected.values)
        # A path from the image to itself.
        nowhere = method(model, grid=(2, 3), baseline=images)(images, 1)
        assert not nowhere.total.any()
        torch.testing.assert_close(nowhere.values, torch.zeros(2, 6))


@pytest.mark.parametrize("method", [IntegratedGradients, IDGI])
def test_baselines_that_are_none(method):
    model, images = Smooth(), torch.randn(2, 3, 6, 9)
    with pytest.raises(ArgumentError, match="'zero', 'black', 'blur'"):
        method(model, baseline="white")
    with pytest.raises(ArgumentError, match=r"\(2, 5\)"):
        method(model, grid=(2, 3), baseline=torch.zeros(2, 5))(images)
    with pytest.raises(ArgumentError, match="NaN"):
        method(model, grid=(2, 3), baseline=torch.tensor(torch.nan))(images)
    with pytest.raises(ArgumentError, match="mean and standard deviation"):
        method(lambda x: model(x), grid=(2, 3), baseline="black")(images)
    with pytest.raises(ArgumentError, match="mean and standard deviation"):
        method(tiny("cnn")[0], baseline="black")(torch.randn(2, 3, *SIZE))
    with pytest.raises(ArgumentError, match="n_steps"):
        method(model, n_steps=0)


def test_other_options_out_of_range():
    with pytest.raises(ArgumentError, match="rule"):
        IntegratedGradients(Smooth(), rule="simpson")
    with pytest.raises(ArgumentError, match="output"):
        IDGI(Smooth(), output="loss")
    with pytest.raises(ArgumentError, match="chunk_size"):
        InputXGradient(Smooth(), chunk_size=0)


def test_rules_converge_to_the_same_integral():
    model, images = Smooth(), torch.randn(2, 3, 6, 9)
    expected = IntegratedGradients(model, grid=(2, 3))(images, 0).values
    for rule, error in (("riemann_middle", 1e-4), ("riemann_left", 0.02), ("riemann_right", 0.02)):
        found = IntegratedGradients(model, grid=(2, 3), rule=rule, n_steps=300)(images, 0).values
        assert (found - expected).abs().max() < error * expected.abs().max()


class Saturated(nn.Module):
    """Its probabilities are 0 and 1 but for the last bits, and its gradients small squares."""

    def forward(self, images):
        shown = images.mean(dim=(1, 2, 3))
        return torch.stack((shown.clamp(min=0) * 50, torch.zeros_like(shown)), dim=1)


def test_idgi_of_a_saturated_model():
    images = torch.ones(1, 3, 4, 6)
    start = torch.tensor(0.01)
    found = IDGI(Saturated(), grid=(2, 3), baseline=start)(images, 0)
    assert (found.efficiency_gap() < 1e-6).all()
    torch.testing.assert_close(found.values, (1 - (50 * start).sigmoid()).expand(1, 6) / 6)


def test_idgi_where_the_gradient_is_zero():
    images = torch.ones(1, 3, 4, 6)
    found = IDGI(Saturated(), grid=(2, 3))(-images, 0)
    assert not found.values.any() and not found.total.any()
    # At zero the gradient is zero too, and what the first of 50 steps gains is missing.
    found = IDGI(Saturated(), grid=(2, 3))(images, 0)
    missing = torch.ones(1).sigmoid() - 0.5
    torch.testing.assert_close(found.efficiency_gap(), missing)
    torch.testing.assert_close(found.values, (0.5 - missing).expand(1, 6) / 6)


def test_functions_and_frozen_models():
    model, _ = tiny("cnn")
    images = torch.randn(2, 3, *SIZE)
    for method in (IntegratedGradients, IDGI, InputXGradient):
        expected = method(model)(images).values
        torch.testing.assert_close(method(lambda x: model(x), grid=GRID)(images).values, expected)
    model.requires_grad_(False)
    torch.testing.assert_close(method(model)(images).values, expected)


def test_patches_that_do_not_cover_the_image():
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=(11, 14), patch_size=4, embed_dim=24, depth=1, num_heads=3, num_classes=3
    )
    images = torch.randn(1, 3, 11, 14)
    for explained in (model, ShapleyWrapper(model)):
        found = IntegratedGradients(explained, n_steps=5)(images, 1)
        assert found.grid == (2, 3) and found.covered == (8, 12)
        cells = found.pixels[:, :8, :12].unflatten(2, (3, 4)).unflatten(1, (2, 4)).sum((2, 4))
        torch.testing.assert_close(found.values, cells.flatten(1))


def test_a_grid_of_ones_own():
    images = torch.randn(1, 3, *SIZE)
    found = IntegratedGradients(tiny("vit")[0], grid=(2, 2))(images)
    halves = found.pixels.unflatten(2, (2, 6)).unflatten(1, (2, 4)).sum((2, 4)).flatten(1)
    torch.testing.assert_close(found.values, halves)


def test_without_captum(monkeypatch):
    real = builtins.__import__

    def missing(name, *rest, **options):
        if name.startswith("captum"):
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    for method in (IntegratedGradients, InputXGradient):
        with pytest.raises(MissingDependencyError, match=r"shapwrap\[explainers\]"):
            method(Smooth())


def test_examples_of_the_page(monkeypatch):
    page = Path(__file__).parents[1] / "docs" / "explainers.md"
    examples = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(examples) == 2
    small = timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=300)
    small.pretrained_cfg = {"mean": MEAN, "std": STD}
    monkeypatch.setattr("timm.create_model", lambda name, pretrained: small)
    names = {}
    for example in examples:
        code = example.replace("224, 224", "64, 64")
        exec(code.replace("chunk_size=32", "chunk_size=32, n_steps=2"), names)
    assert names["heat"].shape == (2, 64, 64)
    assert (names["bagnet"](names["images"], 3).efficiency_gap() < 1e-5).all()
