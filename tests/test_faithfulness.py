"""AOPC, log-odds, SaCo, insertion and deletion, against loops; facts that must hold."""

import math

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from shapwrap import ShapleyWrapper, ShapwrapError
from shapwrap.errors import (
    ArgumentError,
    ImageError,
    ImageTypeError,
    MapError,
    TargetError,
    UnsupportedBackboneError,
)
from shapwrap.masking.fillers import blurred
from shapwrap.metrics import (
    ConstantMapWarning,
    faithfulness,
    insertion_deletion,
    predictor,
)
from shapwrap.metrics.fillers import BLUR_RADIUS, BLUR_SIGMA
from shapwrap.metrics.fractions_removed import equal_groups, removed_counts
from tests import faithfulness_reference as slow
from tests.backbones import make_case

HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def make_predict(channels, height, width, classes=4, seed=0):
    """A function of all pixels, evaluated image by image: batching cannot round it differently."""
    generator = torch.Generator().manual_seed(seed)
    shape = (classes, channels, height, width)
    weights = torch.randn(shape, generator=generator, dtype=torch.float64)
    weights = weights * 8 / math.sqrt(channels * height * width)

    def predict(images):
        products = images.double()[:, None] * weights
        return products.sum(dim=(2, 3, 4)) + products.tanh().square().sum(dim=(2, 3, 4))

    return predict


def uniform(*shape, seed=0, dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def normal(*shape, seed=1, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@st.composite
def setups(draw):
    channels, batch = draw(st.sampled_from([1, 3])), draw(st.integers(1, 3))
    size = draw(st.tuples(st.integers(6, 9), st.integers(6, 9)))
    grid = draw(st.tuples(st.integers(2, 4), st.integers(2, 4)))
    ranking = draw(st.sampled_from(["pixel", "patch"]))
    of_pixels = draw(st.booleans())
    seed = draw(st.integers(0, 1000))
    images = uniform(batch, channels, *size, seed=seed)
    maps = normal(batch, *(size if of_pixels else grid), seed=seed + 1)
    fill = draw(st.sampled_from(["black", "mean", "colour", "image"]))
    fill = {
        "colour": uniform(channels, seed=5),
        "image": uniform(batch, channels, *size, seed=6),
    }.get(fill, fill)
    target = draw(st.sampled_from(["none", "one", "each"]))
    target = {"none": None, "one": 2, "each": torch.arange(batch) % 4}[target]
    chunk = draw(st.sampled_from([1, 5, 64]))
    own_grid = grid if ranking == "patch" and of_pixels else None
    predict = make_predict(channels, *size, seed=seed)
    return predict, images, maps, fill, target, ranking, own_grid, chunk


def filler_of(fill, image, index):
    """[C, H, W]."""
    if isinstance(fill, str):
        one = {"black": 0.0, "mean": image.mean(axis=(1, 2), keepdims=True)}[fill]
        return np.zeros_like(image) + one
    fill = fill.numpy()
    return np.zeros_like(image) + (fill[:, None, None] if fill.ndim == 1 else fill[index])


def one_by_one(setup):
    """Each image with what a loop needs to know about it."""
    predict, images, maps, fill, target, ranking, grid, _ = setup
    for index, (image, one_map) in enumerate(zip(images.numpy(), maps.numpy(), strict=True)):
        logits = slow.ask(predict, image)
        chosen = (
            int(logits.argmax())
            if target is None
            else int(torch.as_tensor(target).expand(len(images))[index])
        )
        values, pixels = slow.cells_of(one_map, *image.shape[1:], ranking, grid)

        def p_filled(cells, filler, image=image, pixels=pixels, chosen=chosen):
            return slow.probability(
                slow.ask(predict, slow.filled(image, filler, pixels, cells)), chosen
            )

        yield image, filler_of(fill, image, index), values, p_filled


@given(setups(), st.integers(1, 5), st.integers(2, 4), st.booleans())
def test_faithfulness_equals_the_loop(setup, steps, num_groups, absolute):
    predict, images, maps, fill, target, ranking, grid, chunk = setup
    scores = faithfulness(
        predict,
        images,
        maps,
        fill=fill,
        target=target,
        ranking=ranking,
        grid=grid,
        chunk_size=chunk,
        steps=steps,
        num_groups=num_groups,
        absolute=absolute,
    )
    assert list(scores) == ["aopc", "log_odds", "saco"]
    for index, (image, filler, values, p_filled) in enumerate(one_by_one(setup)):
        mean = filler_of("mean", image, index)
        expected = slow.faithfulness_of_one(
            lambda cells, p=p_filled, f=filler: p(cells, f),
            p_filled([], filler),
            values,
            slow.default_counts(len(values), steps),
            num_groups,
            lambda cells, p=p_filled, f=mean: p(cells, f),
            absolute,
        )
        for name, number in expected.items():
            assert scores[name][index].item() == pytest.approx(number, abs=1e-9), name


@given(setups(), st.integers(1, 6), st.booleans())
def test_insertion_and_deletion_equal_the_loop(setup, steps, other_start):
    predict, images, maps, fill, target, ranking, grid, chunk = setup
    start = uniform(images.shape[1], seed=9) if other_start else None
    scores = insertion_deletion(
        predict,
        images,
        maps,
        fill=fill,
        insertion_fill=start,
        target=target,
        ranking=ranking,
        grid=grid,
        chunk_size=chunk,
        steps=steps,
    )
    assert scores.curves["insertion"].shape == (len(images), steps + 1)
    for index, (image, filler, values, p_filled) in enumerate(one_by_one(setup)):
        order = slow.most_relevant_first(values)
        counts = [len(order) * k // steps for k in range(steps + 1)]
        fractions = [count / len(order) for count in counts]
        into = filler if start is None else filler_of(start, image, index)
        expected = {
            "deletion": [p_filled(order[:count], filler) for count in counts],
            "insertion": [p_filled(order[count:], into) for count in counts],
        }
        np.testing.assert_allclose(scores.fractions.numpy(), fractions, atol=1e-7)
        for name, points in expected.items():
            np.testing.assert_allclose(scores.curves[name][index].numpy(), points, atol=1e-9)
            assert scores[name][index].item() == pytest.approx(
                slow.area(points, fractions), abs=1e-6
            )


@pytest.mark.parametrize("kind", ["vit-class-token", "vit-average", "resnet"])
@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_native_masking_equals_one_coalition_at_a_time(kind, chunk_size):
    case = make_case(kind, (2, 3), batch=2, dtype=torch.float64)
    images, maps = uniform(*case.images.shape), normal(2, *case.wrapped.grid)
    predict = predictor(case.wrapped, HALVES)
    normalized = (images - 0.5) / 0.5
    num = case.wrapped.num_patches
    scores = faithfulness(
        predict, images, maps, fill="native", steps=4, num_groups=3, chunk_size=chunk_size
    )
    curves = insertion_deletion(
        predict, images, maps, fill="native", steps=5, chunk_size=chunk_size
    ).curves
    for index in range(2):

        def p_without(cells, index=index):
            present = torch.tensor([[[n not in cells for n in range(num)]]])
            with torch.no_grad():
                value = case.wrapped.value(normalized[index : index + 1], present)[0, 0]
                logits = value + case.wrapped.baseline
                clean = case.wrapped(normalized[index : index + 1])[0]
            return slow.probability(logits, int(clean.argmax()))

        values = list(maps[index].flatten().numpy())
        counts = slow.default_counts(num, 4)
        expected = slow.faithfulness_of_one(p_without, p_without([]), values, counts, 3, p_without)
        for name, number in expected.items():
            assert scores[name][index].item() == pytest.approx(number, abs=1e-8), name
        order = slow.most_relevant_first(values)
        points = [num * k // 5 for k in range(6)]
        deleted = [p_without(order[:n]) for n in points]
        inserted = [p_without(order[n:]) for n in points]
        np.testing.assert_allclose(curves["deletion"][index], deleted, atol=1e-8)
        np.testing.assert_allclose(curves["insertion"][index], inserted, atol=1e-8)
    assert "v(s)" in str(scores.protocol)


def test_native_pixel_maps_are_summed_over_patches():
    case = make_case("vit-average", (2, 3))
    predict = predictor(case.wrapped, HALVES)
    images = uniform(*case.images.shape, dtype=torch.float32)
    pixels = normal(2, *images.shape[2:])
    values = pixels.unflatten(2, (3, 4)).unflatten(1, (2, 4)).sum(dim=(2, 4))
    by_pixels = faithfulness(predict, images, pixels, fill="native", num_groups=3)
    by_patches = faithfulness(predict, images, values, fill="native", num_groups=3)
    for name in by_pixels:
        torch.testing.assert_close(by_pixels[name], by_patches[name])


# --- SaCo -----------------------------------------------------------------------------------------


def saco_of(maps, predict=None, images=None, **options):
    images = uniform(len(maps), 3, *maps.shape[1:]) if images is None else images
    predict = predict or make_predict(3, *maps.shape[1:])
    return faithfulness(predict, images, maps, metrics="saco", **options)["saco"]


def test_saco_ignores_scale_and_offset_but_not_the_shape_of_values():
    maps = normal(3, 4, 6, seed=2)
    plain = saco_of(maps, num_groups=4)
    assert plain.abs().max() < 1
    torch.testing.assert_close(saco_of(3 * maps + 7, num_groups=4), plain)
    assert (saco_of(maps**3, num_groups=4) - plain).abs().min() > 1e-3


def test_saco_of_unequal_groups_depends_on_the_offset():
    maps = normal(3, 4, 6)
    assert equal_groups(24, 5) == [(0, 4), (4, 9), (9, 14), (14, 19), (19, 24)]
    assert (saco_of(maps + 7, num_groups=5) - saco_of(maps, num_groups=5)).abs().max() > 1e-3


def test_saco_counts_ties_as_agreement():
    torch.testing.assert_close(
        saco_of(normal(2, 4, 4), lambda images: images.new_zeros(len(images), 3), num_groups=4),
        torch.ones(2, dtype=torch.float64),
    )


def test_saco_of_the_right_and_the_reversed_order():
    weights = torch.arange(16.0).reshape(4, 4)

    def predict(images):
        # The mean filler leaves the other pixels as they are, so each drop grows with its weight.
        return torch.stack(
            [
                (images[:, 0] * weights).sum(dim=(1, 2)) / 60,
                images.new_zeros(1).expand(len(images)),
            ],
            dim=1,
        )

    images = torch.full((1, 3, 4, 4), 0.4)
    images[:, :, ::2] = 0.6
    drops = (images[0, 0] - 0.5) * weights
    right = saco_of(drops[None], predict, images, target=0, num_groups=16)
    wrong = saco_of(-drops[None], predict, images, target=0, num_groups=16)
    assert right.item() == pytest.approx(1) and wrong.item() == pytest.approx(-1)


@pytest.mark.parametrize("value", [0.0, 0.3])
@pytest.mark.parametrize("size", [(3, 2), (7, 8)])
def test_constant_maps_have_no_saco(value, size):
    maps = torch.cat((torch.full((1, *size), value), normal(1, *size, dtype=torch.float32)))
    images, predict = uniform(2, 3, 7, 8), make_predict(3, 7, 8)
    with pytest.warns(ConstantMapWarning, match="1 of 2 maps are constant"):
        scores = faithfulness(predict, images, maps)
    assert scores["saco"].isnan().tolist() == [True, False]
    assert scores.undefined() == {"aopc": 0, "log_odds": 0, "saco": 1}
    assert scores.mean()["saco"] == pytest.approx(scores["saco"][1].item())
    assert "1 undefined" in str(scores)
    with pytest.warns(ConstantMapWarning, match="SaCo is 0/0: 0"):
        zeros = faithfulness(predict, images, maps, on_constant="zero")
    assert zeros["saco"][0] == 0 and zeros["saco"][1] == scores["saco"][1]
    with pytest.raises(ArgumentError, match=r"maps \[0\] are constant"):
        faithfulness(predict, images, maps, on_constant="raise")
    # Row by row, whatever interpolation rounds.
    rows = -torch.arange(56.0).reshape(1, 7, 8)
    expected = faithfulness(predict, images[:1], rows)["aopc"][0]
    assert scores["aopc"][0] == expected
    with pytest.warns(ConstantMapWarning):
        insertion_deletion(predict, images, maps)


def test_a_constant_map_that_was_resized_is_constant():
    drawn = functional.interpolate(torch.full((1, 1, 3, 5), 0.1), size=(12, 20), mode="bilinear")
    maps = drawn[:, 0]
    assert maps.amin() < maps.amax()
    images, predict = uniform(1, 3, 12, 20), make_predict(3, 12, 20)
    rows = -torch.arange(240.0).reshape(1, 12, 20)
    with pytest.warns(ConstantMapWarning):
        scores = faithfulness(predict, images, maps)
    assert scores["saco"].isnan().all()
    assert scores["aopc"] == faithfulness(predict, images, rows)["aopc"]
    with pytest.warns(ConstantMapWarning):
        faithfulness(predict, images, maps, ranking="patch", grid=(3, 5))


@pytest.mark.parametrize("scale", [2.0**-120, 2.0**124])
def test_saco_of_tiny_and_huge_maps(scale):
    images, maps, predict = uniform(2, 3, 7, 8), normal(2, 7, 8).float(), make_predict(3, 7, 8)
    expected = faithfulness(predict, images, maps)["saco"]
    torch.testing.assert_close(faithfulness(predict, images, maps * scale)["saco"], expected)


def test_constant_pixel_maps_stay_constant_over_unequal_patches():
    with pytest.warns(ConstantMapWarning):
        scores = faithfulness(
            make_predict(3, 7, 8),
            uniform(1, 3, 7, 8),
            torch.ones(1, 7, 8),
            ranking="patch",
            grid=(2, 3),
            num_groups=2,
        )
    assert scores["saco"].isnan().all()


# --- order, fractions, fillers --------------------------------------------------------------------


def test_ties_are_taken_row_by_row():
    images, predict = uniform(1, 3, 4, 6), make_predict(3, 4, 6)
    tied = torch.zeros(1, 4, 6)
    tied[0, 1] = 1
    distinct = tied * 100 - torch.arange(24.0).reshape(1, 4, 6)
    one, other = (insertion_deletion(predict, images, m, steps=24).curves for m in (tied, distinct))
    assert torch.equal(one["deletion"], other["deletion"])
    assert torch.equal(one["insertion"], other["insertion"])


def test_a_model_that_reads_some_patches():
    """The map that marks them beats all others."""
    read = torch.zeros(1, 3, 4)
    read[0, 1, 1:3] = torch.tensor([1.0, 0.5])
    weights = nn.functional.interpolate(read[None], size=(6, 8))

    def predict(images):
        evidence = (images * weights).sum(dim=(1, 2, 3))
        return torch.stack((evidence, evidence.new_full((), 9.0).expand(len(images))), dim=1)

    images = torch.ones(1, 3, 6, 8)
    true = faithfulness(predict, images, read, ranking="patch", target=0, steps=4)
    deletion = insertion_deletion(predict, images, read, ranking="patch", target=0)
    for seed in range(5):
        other = normal(1, 3, 4, seed=seed, dtype=torch.float32)
        random = faithfulness(predict, images, other, ranking="patch", target=0, steps=4)
        curves = insertion_deletion(predict, images, other, ranking="patch", target=0)
        assert true["aopc"] > random["aopc"] and true["log_odds"] < random["log_odds"]
        assert deletion["deletion"] < curves["deletion"]
        assert deletion["insertion"] > curves["insertion"]


def test_counts():
    tenths = [n * 50176 // 10 for n in range(1, 10)]
    assert removed_counts(50176, 9, None) == tenths
    assert removed_counts(50176, 17, None)[::2] == tenths
    assert removed_counts(196, 9, None) == [19, 39, 58, 78, 98, 117, 137, 156, 176]
    assert removed_counts(100, 1, None) == [10]
    assert removed_counts(100, 9, [0.29, 0.57, 1.0]) == [29, 57, 100]
    for cells in (7, 49, 196, 225, 50176):
        parts = range(0, cells + 1, max(1, cells // 50))
        assert removed_counts(cells, 9, [part / cells for part in parts]) == list(parts)
    assert removed_counts(10, 9, [0.1999]) == [1]
    # In float32, 0.7 of 240 cells is 167.999997.
    tenths = torch.tensor([0.1, 0.3, 0.7])
    assert removed_counts(240, 9, tenths) == [24, 72, 168]
    assert removed_counts(240, 9, tenths.half()) == [24, 72, 168]
    for cells in (196, 240, 50176):
        parts = removed_counts(cells, 9, None)
        assert removed_counts(cells, 9, torch.tensor(parts) / cells) == parts
    for wrong in (0.5, ["half"]):
        with pytest.raises(ArgumentError, match="at least one share"):
            removed_counts(100, 9, wrong)
    assert removed_counts(196, 9, "attcat") == [22, 44, 65, 87, 109, 131, 152, 174, 196]
    assert removed_counts(4, 9, "attcat") == [0, 1, 2, 3, 4]
    assert equal_groups(50176, 10)[:2] == [(0, 5017), (5017, 10035)]


def test_fraction_options():
    images, maps, predict = uniform(2, 3, 5, 6), normal(2, 5, 6), make_predict(3, 5, 6)
    given_fractions = faithfulness(predict, images, maps, fractions=[i / 10 for i in range(1, 10)])
    default = faithfulness(predict, images, maps)
    torch.testing.assert_close(given_fractions["aopc"], default["aopc"])
    attcat = faithfulness(predict, images, maps, fractions="attcat")
    black = (
        predict(torch.zeros_like(images)).softmax(1).gather(1, predict(images).argmax(1)[:, None])
    )
    clean = predict(images).softmax(1).amax(1)
    torch.testing.assert_close(attcat.curves["aopc"][:, -1], clean - black[:, 0])
    assert "attcat" in str(attcat.protocol)


@pytest.mark.parametrize("fill", ["black", "mean", "zero_normalised", "blur", "random"])
def test_fillers(fill):
    """With everything gone the model sees the filler alone."""
    images, maps = uniform(2, 3, 7, 9, dtype=torch.float32), normal(2, 7, 9)
    seen = []

    def model(normalized):
        seen.append(normalized.clone())
        return normalized.mean(dim=(2, 3))

    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    predict = predictor(model, (mean, std))
    generator = torch.Generator().manual_seed(4)
    scores = faithfulness(
        predict, images, maps, fill=fill, fractions=[1.0], metrics=["aopc"], generator=generator
    )
    shown = predict.unnormalize(seen[-1]).numpy()
    pixels = images.numpy()
    expected = {
        "black": np.zeros_like(pixels),
        "mean": np.broadcast_to(pixels.mean(axis=(2, 3), keepdims=True), pixels.shape),
        "zero_normalised": np.broadcast_to(np.reshape(mean, (1, 3, 1, 1)), pixels.shape),
        "blur": slow_blur(pixels),
        "random": torch.rand(2, 3, 7, 9, generator=torch.Generator().manual_seed(4)).numpy(),
    }[fill]
    np.testing.assert_allclose(shown, expected, atol=1e-5)
    assert list(scores) == ["aopc"]
    seed = "4" if fill == "random" else "none"
    assert scores.protocol.settings["seed"].startswith(seed)


def slow_blur(images):
    blurry = np.zeros_like(images)
    height, width = images.shape[2:]
    offsets = range(-5, 6)
    weights = np.array([math.exp(-(o**2) / 50) for o in offsets])
    weights /= weights.sum()
    for r in range(height):
        for c in range(width):
            for i, dr in enumerate(offsets):
                for j, dc in enumerate(offsets):
                    row, column = min(max(r + dr, 0), height - 1), min(max(c + dc, 0), width - 1)
                    blurry[:, :, r, c] += weights[i] * weights[j] * images[:, :, row, column]
    return blurry


def test_blur_keeps_precision():
    images = uniform(1, 3, 6, 5, dtype=torch.float16)
    assert blurred(images, BLUR_SIGMA, BLUR_RADIUS).dtype == torch.float16
    np.testing.assert_allclose(
        blurred(images, BLUR_SIGMA, BLUR_RADIUS).float(),
        slow_blur(images.float().numpy()),
        atol=1e-3,
    )


def test_random_pixels_follow_the_seed_and_the_default_is_zero():
    images, maps, predict = uniform(2, 3, 5, 6), normal(2, 5, 6), make_predict(3, 5, 6)
    before = torch.random.get_rng_state()
    default, zero, one = (
        faithfulness(
            predict,
            images,
            maps,
            fill="random",
            metrics="aopc",
            generator=generator,
            chunk_size=chunk,
        )["aopc"]
        for generator, chunk in (
            (None, 64),
            (torch.Generator().manual_seed(0), 5),
            (torch.Generator().manual_seed(1), 64),
        )
    )
    assert torch.equal(default, zero) and not torch.equal(zero, one)
    assert torch.equal(torch.random.get_rng_state(), before)


# --- models, precision, state ---------------------------------------------------------------------


def test_results_do_not_depend_on_chunks_and_batches():
    case = make_case("resnet", (2, 3), batch=3)
    predict = predictor(case.wrapped, HALVES)
    images, maps = uniform(*case.images.shape, dtype=torch.float32), normal(3, 2, 3)
    whole = faithfulness(predict, images, maps)
    for chunk in (1, 7):
        for name, values in faithfulness(predict, images, maps, chunk_size=chunk).items():
            torch.testing.assert_close(values, whole[name], atol=1e-5, rtol=1e-5)
    single = [faithfulness(predict, images[i : i + 1], maps[i : i + 1]) for i in range(3)]
    for name, values in whole.items():
        torch.testing.assert_close(
            torch.cat([one[name] for one in single]), values, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images_give_float32(dtype):
    images, maps, exact = uniform(2, 3, 5, 6), normal(2, 5, 6), make_predict(3, 5, 6)

    def predict(images):
        assert images.dtype == dtype
        return exact(images).to(dtype)

    scores = faithfulness(predict, images.to(dtype), maps.to(dtype))
    assert {values.dtype for values in scores.values()} == {torch.float32}
    expected = faithfulness(
        lambda images: exact(images).to(dtype).double(), images.to(dtype), maps.to(dtype)
    )
    for name in ("aopc", "log_odds"):
        torch.testing.assert_close(scores[name].double(), expected[name], atol=1e-5, rtol=1e-4)
    areas = insertion_deletion(predict, images.to(dtype), maps.to(dtype))
    assert areas["insertion"].dtype == torch.float32


def test_probabilities_of_zero_stay_finite():
    def predict(images):
        dark = (images.sum(dim=(1, 2, 3)) < 10)[:, None]
        return torch.where(dark, torch.tensor([-math.inf, 0.0]), torch.tensor([1.0, 0.0]))

    scores = faithfulness(predict, torch.ones(1, 3, 4, 4), normal(1, 4, 4), fractions=[0.9, 1.0])
    assert scores["log_odds"].item() == torch.finfo(torch.float32).min
    assert scores["aopc"].item() == pytest.approx(1 / (1 + math.exp(-1)))


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    model[2].eval()
    modes = [module.training for module in model.modules()]
    model[0].weight.grad = torch.ones_like(model[0].weight)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images, maps = uniform(2, 3, 8, 8, dtype=torch.float32), normal(2, 4, 4)
    random = torch.random.get_rng_state()
    first = faithfulness(model, images, maps)
    second = faithfulness(predictor(model, ((0.0,) * 3, (1.0,) * 3)), images, maps)
    insertion_deletion(model, images.requires_grad_(), maps.requires_grad_())
    for name, values in first.items():
        torch.testing.assert_close(values, second[name])
        assert not values.requires_grad
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert torch.is_grad_enabled()


def test_inference_mode_gives_the_same():
    images, maps, predict = uniform(2, 3, 5, 6), normal(2, 5, 6), make_predict(3, 5, 6)
    expected = faithfulness(predict, images, maps)
    with torch.inference_mode():
        scores = faithfulness(predict, images.clone(), maps.clone())
    assert all(torch.equal(scores[name], expected[name]) for name in expected)


def test_predictor_normalises_as_the_model_tells():
    model = timm.create_model("test_vit", num_classes=3).eval()
    mean = torch.tensor(model.pretrained_cfg["mean"])[:, None, None]
    std = torch.tensor(model.pretrained_cfg["std"])[:, None, None]
    images = uniform(2, 3, 160, 160, dtype=torch.float32)
    with torch.no_grad():
        expected = model((images - mean) / std)
    model.train()
    predict = predictor(model)
    torch.testing.assert_close(predict(images), expected)
    assert model.training and not predict(images).requires_grad
    torch.testing.assert_close(predict.unnormalize(predict.normalize(images)), images)
    wrapped = predictor(ShapleyWrapper(model))
    assert wrapped.wrapped is not None and predict.wrapped is None
    assert wrapped.normalization == predict.normalization
    half = predictor(timm.create_model("test_vit", num_classes=3).bfloat16())
    assert half(images.half()).dtype == torch.bfloat16
    assert "VisionTransformer" in repr(wrapped) and "0.5" in repr(wrapped)
    with pytest.warns(UserWarning, match="predict is a VisionTransformer that tells"):
        faithfulness(model, images[:1], normal(1, 2, 2), metrics="aopc", steps=1)


def test_predictor_of_torchvision_knows_imagenet():
    from torchvision.models import resnet18

    assert predictor(resnet18()).normalization.mean == (0.485, 0.456, 0.406)


def test_protocol_says_everything():
    images, maps, predict = uniform(2, 3, 5, 6), normal(2, 2, 3), make_predict(3, 5, 6)
    said = str(faithfulness(predict, images, maps, fill="mean", absolute=True).protocol)
    for word in (
        "predicted on the clean image",
        "softmax probability",
        "pixels, 2 x 3 maps upsampled bilinearly, N = 30",
        "mean of each channel of the image in [0, 1]",
        "[3, 6, 9, 12, 15, 18, 21, 24, 27] cells",
        "|p - p_k|",
        "K = 10",
        f"torch {torch.__version__}",
        "shapwrap ",
        "seed",
    ):
        assert word in said, word
    random = insertion_deletion(predict, images, maps, insertion_fill="random").protocol
    assert random.settings["seed"] == "0"
    said = str(insertion_deletion(predict, images, maps, insertion_fill="blur", target=0))
    for word in ("given", "Gaussian", "black", "trapezoids", "insertion 0.", "deletion 0."):
        assert word in said, word


# --- errors ---------------------------------------------------------------------------------------

IMAGES, MAPS = uniform(2, 3, 6, 8), normal(2, 3, 4)


def _call(function=faithfulness, predict=None, images=IMAGES, maps=MAPS, **options):
    return function(predict or make_predict(3, 6, 8), images, maps, **options)


def _with_nan(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[0] = torch.nan
    return tensor


ERRORS = {
    "normalised images": ({"images": IMAGES * 4 - 2}, ImageError, "unnormalize"),
    "integer images": ({"images": (IMAGES * 255).byte()}, ImageTypeError, "Divide by 255"),
    "one image": ({"images": IMAGES[0]}, ImageError, "expected"),
    "images with NaN": ({"images": _with_nan(IMAGES)}, ImageError, "NaN"),
    "maps with NaN": ({"maps": _with_nan(MAPS)}, MapError, r"maps \[0\] contain NaN"),
    "infinite maps": ({"maps": MAPS / 0}, MapError, "infinity"),
    "flat maps": ({"maps": MAPS.flatten(1)}, MapError, "unflatten"),
    "too few maps": ({"maps": MAPS[:1]}, MapError, "expected"),
    "integer maps": ({"maps": MAPS.long()}, MapError, "float"),
    "maps finer than pixels": ({"maps": normal(2, 7, 8)}, MapError, "at most one a pixel"),
    "class": ({"target": 4}, TargetError, "classes 0 to 3"),
    "images in another precision than the model": (
        {"predict": nn.Sequential(nn.Flatten(), nn.Linear(144, 4))},
        ImageTypeError,
        r"images\.to\(torch\.float32\)",
    ),
    "fill": ({"fill": "white"}, ArgumentError, "zero_normalised"),
    "fill of another size": ({"fill": torch.zeros(3, 6, 7)}, ArgumentError, "each size 1"),
    "normalised fill": ({"fill": torch.tensor([-2.0, 0.0, 2.0])}, ArgumentError, r"-2 .* 2;"),
    "fill with NaN": ({"fill": torch.tensor(torch.nan)}, ArgumentError, "finite"),
    "unknown statistics": ({"fill": "zero_normalised"}, ArgumentError, "predictor"),
    "native without wrapper": ({"fill": "native"}, ArgumentError, "ShapleyWrapper"),
    "ranking": ({"ranking": "row"}, ArgumentError, "'pixel' or 'patch'"),
    "pixel maps without grid": (
        {"maps": normal(2, 6, 8), "ranking": "patch"},
        ArgumentError,
        "grid is None",
    ),
    "grid of another size": ({"ranking": "patch", "grid": (2, 2)}, ArgumentError, "one a patch"),
    "grid": ({"ranking": "patch", "grid": (2,)}, ArgumentError, "two positive"),
    "grid finer than pixels": (
        {"ranking": "patch", "maps": normal(2, 6, 8), "grid": (7, 8)},
        ArgumentError,
        "at most one patch a pixel",
    ),
    "chunk": ({"chunk_size": 0}, ArgumentError, "at least 1"),
    "steps": ({"steps": 0}, ArgumentError, "at least 1"),
    "logits": ({"predict": lambda images: images}, UnsupportedBackboneError, "logits"),
    "NaN logits": (
        {"predict": lambda images: images.mean(dim=(2, 3)) * torch.nan},
        ShapwrapError,
        "softmax",
    ),
}
OF_FAITHFULNESS = {
    "fractions": ({"fractions": [0.5, 1.2]}, ArgumentError, "share"),
    "NaN fractions": ({"fractions": [float("nan")]}, ArgumentError, "at least one share"),
    "no fraction": ({"fractions": []}, ArgumentError, "at least one"),
    "named fractions": ({"fractions": "deciles"}, ArgumentError, "attcat"),
    "one group": ({"num_groups": 1}, ArgumentError, "at least 2"),
    "too many groups": ({"num_groups": 49}, ArgumentError, "one group a cell"),
    "on_constant": ({"on_constant": "skip"}, ArgumentError, "nan_skip"),
    "metrics": ({"metrics": ["auc"]}, ArgumentError, "saco"),
    "no metrics": ({"metrics": []}, ArgumentError, "saco"),
}


@pytest.mark.parametrize("name", [*ERRORS, *OF_FAITHFULNESS])
def test_errors(name):
    options, kind, message = (ERRORS | OF_FAITHFULNESS)[name]
    with pytest.raises(kind, match=message) as raised:
        _call(**options)
    assert isinstance(raised.value, ShapwrapError)
    if name in ERRORS:
        with pytest.raises(kind, match=message):
            _call(insertion_deletion, **options)


def test_errors_of_native_masking_and_predictor():
    wrapped = make_case("vit-average", (2, 3)).wrapped
    predict = predictor(wrapped, HALVES)
    images, maps = uniform(1, 3, 8, 12, dtype=torch.float32), normal(1, 2, 3)
    for options in ({"ranking": "pixel"}, {"grid": (3, 3)}):
        with pytest.raises(ArgumentError, match="whole patches are removed"):
            faithfulness(predict, images, maps, fill="native", **options)
    with pytest.raises(ArgumentError, match="both or none"):
        insertion_deletion(predict, images, maps, fill="native", insertion_fill="blur")
    with pytest.raises(ArgumentError, match="one a patch"):
        faithfulness(predict, images, normal(1, 3, 3), fill="native")
    with pytest.raises(ArgumentError, match="not made of a ShapleyWrapper"):
        unwrapped = predictor(lambda images: images.mean(dim=(2, 3)), HALVES)
        unwrapped.coalition_logits(images, torch.ones(1, 1, 6, dtype=torch.bool))
    with pytest.raises(ArgumentError, match=r"normalization=\(mean, std\)"):
        predictor(lambda images: images)
    for wrong in (((0.5,), (0.0,)), ((0.5, 0.5), (1.0,))):
        with pytest.raises(ArgumentError, match="one number a channel"):
            predictor(lambda images: images, wrong)
    with pytest.raises(ImageError, match="one channel for each number"):
        predict(images[:, :1])
    with pytest.raises(ImageTypeError, match="Divide by 255"):
        predict(images.byte())
