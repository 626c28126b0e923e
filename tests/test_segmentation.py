"""Chefer's protocol against scikit-learn and plain loops."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score
from torch.nn import functional

from shapwrap.errors import ArgumentError
from shapwrap.metrics import (
    average_precision,
    box_localisation,
    segmentation_scores,
    segmentation_statistics,
)


def looped(maps, masks):
    """The protocol, image by image, class by class."""
    correct = labelled = 0
    intersection, union, precisions, f1s = np.zeros(2), np.zeros(2), [], []
    for given_map, mask in zip(maps, masks, strict=True):
        drawn = functional.interpolate(
            given_map[None, None], size=tuple(mask.shape), mode="bilinear", align_corners=False
        )[0, 0].numpy()
        mask = mask.numpy()
        if given_map.min() == given_map.max():
            heights = background = np.zeros_like(drawn)
        else:
            heights = (drawn - drawn.min()) / (drawn.max() - drawn.min())
            background = 1 - heights
        predicted = heights.astype(np.float64) > heights.astype(np.float64).mean()
        kept = mask != -1
        if not kept.any():
            continue
        correct += (predicted == mask)[kept].sum()
        labelled += kept.sum()
        for label in (0, 1):
            found, truth = (predicted == label) & kept, (mask == label) & kept
            intersection[label] += (found & truth).sum()
            union[label] += (found | truth).sum()
        scores = np.concatenate((background[kept], heights[kept]))
        labels = np.concatenate((mask[kept] == 0, mask[kept] == 1))
        precisions.append(average_precision_score(labels, scores))
        f1s.append(f1_score(mask[kept] == 1, predicted[kept], zero_division=0))
    iou = intersection / np.maximum(union, 1)
    return correct / labelled, iou.mean(), np.mean(precisions), np.mean(f1s)


@given(
    batch=st.integers(1, 4),
    items=st.integers(1, 40),
    levels=st.sampled_from([1, 2, 5, 1000]),
    seed=st.integers(0, 2**16),
)
def test_average_precision_is_that_of_scikit_learn(batch, items, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (batch, items), generator=generator) / levels - 0.3
    positive = torch.rand(batch, items, generator=generator) < 0.4
    counted = torch.rand(batch, items, generator=generator) < 0.8
    everything = average_precision(scores, positive)
    some = average_precision(scores, positive, counted)
    for row in range(batch):
        if positive[row].any():
            expected = average_precision_score(positive[row], scores[row])
            assert everything[row] == pytest.approx(expected, abs=1e-12)
        else:
            assert everything[row].isnan()
        kept = counted[row]
        if (positive[row] & kept).any():
            expected = average_precision_score(positive[row][kept], scores[row][kept])
            assert some[row] == pytest.approx(expected, abs=1e-12)
        else:
            assert some[row].isnan()


@given(
    batch=st.integers(1, 4),
    grid=st.tuples(st.integers(1, 4), st.integers(2, 5)),
    cell=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    levels=st.sampled_from([2, 3, 1000]),
    ignored=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 2**16),
)
def test_scores_are_those_of_the_loop(batch, grid, cell, levels, ignored, seed):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randint(levels, (batch, *grid), generator=generator) / 7 - 0.9
    maps[0, 0, 0], maps[0, -1, -1] = 2.0, -2.0
    size = (grid[0] * cell[0], grid[1] * cell[1])
    masks = (torch.rand(batch, *size, generator=generator) < 0.4).long()
    masks[torch.rand(masks.shape, generator=generator) < ignored] = -1
    masks[0, 0, 0] = 1
    statistics = segmentation_statistics(maps, masks, chunk_size=2)
    constant = int((maps.flatten(1).amin(1) == maps.flatten(1).amax(1)).sum())
    unlabelled = int((masks == -1).flatten(1).all(1).sum())
    if constant or unlabelled:
        with pytest.warns(UserWarning, match="constant map"):
            found = statistics.totals().scores()
    else:
        found = statistics.totals().scores()
    np.testing.assert_allclose(found[:4], looped(maps, masks), atol=1e-6)
    assert found.images == batch - unlabelled
    assert statistics.constant.sum() == constant
    single = [segmentation_statistics(maps[i : i + 1], masks[i : i + 1]) for i in range(batch)]
    for column, rows in zip(statistics, zip(*single, strict=True), strict=True):
        torch.testing.assert_close(column, torch.cat(rows), equal_nan=True, rtol=0, atol=1e-12)


def test_a_perfect_map_and_its_opposite():
    masks = torch.zeros(1, 6, 8, dtype=torch.bool)
    masks[:, 2:4, 3:6] = True
    perfect = segmentation_scores(masks.float() - 5, masks)
    assert perfect[:4] == (1.0, 1.0, 1.0, 1.0)
    assert segmentation_scores(-masks.float(), masks)[:2] == (0.0, 0.0)
    assert "min-max" in perfect.protocol


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e-30])
def test_a_constant_map_is_all_background(value):
    """Also where resizing leaves rounding behind."""
    masks = torch.zeros(2, 7, 11, dtype=torch.long)
    masks[:, :3] = 1
    masks[1, 6] = -1
    for maps in (torch.full((2, 3, 5), value), torch.full((2, 7, 11), value).double()):
        statistics = segmentation_statistics(maps, masks)
        assert statistics.constant.all()
        torch.testing.assert_close(statistics.average_precision, torch.full((2,), 0.5).double())
        assert statistics.correct.tolist() == [44, 33]
        assert statistics.f1.tolist() == [0, 0]
        with pytest.warns(UserWarning, match="2 have a constant map"):
            assert statistics.totals().scores().constant == 2


def test_resized_constant_map_has_rounding_that_must_not_rank():
    drawn = functional.interpolate(torch.full((1, 1, 3, 5), 0.1), size=(7, 11), mode="bilinear")
    assert segmentation_statistics(drawn[:, 0], torch.ones(1, 7, 11, dtype=torch.long)).constant


def test_a_map_that_resizing_makes_constant_is_constant():
    """Every third pixel is what is left of 9 x 9 at 3 x 3: the peak falls between."""
    maps, masks = torch.zeros(1, 9, 9), torch.zeros(1, 3, 3, dtype=torch.long)
    maps[:, 0, 0], masks[:, 0] = 1, 1
    statistics = segmentation_statistics(maps, masks)
    assert statistics.constant.all() and statistics.average_precision.item() == 0.5
    box = box_localisation(maps, masks)
    assert box.iou.item() == 0 and box.found.tolist() == [[0, 0, 0, 0]]


def test_images_of_one_class():
    maps = torch.arange(12.0).view(1, 3, 4)
    for label in (0, 1):
        masks = torch.full((1, 3, 4), label)
        found = segmentation_scores(maps, masks)
        np.testing.assert_allclose(found[:4], looped(maps, masks), atol=1e-9)


def test_unlabelled_images_count_nowhere():
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 4, 4, generator=generator)
    masks = torch.randint(2, (2, 4, 4), generator=generator)
    alone = segmentation_scores(maps[:1], masks[:1])
    masks[1] = -1
    with pytest.warns(UserWarning, match="1 no labelled pixel"):
        both = segmentation_scores(maps, masks)
    assert both[:6] == alone[:6] and both.unlabelled == 1
    with pytest.raises(ArgumentError, match="no image has a labelled pixel"):
        segmentation_scores(maps[1:], masks[1:])


def test_half_precision_maps_are_taken():
    maps = torch.randn(2, 3, 4).half()
    masks = torch.randint(2, (2, 3, 4))
    assert segmentation_scores(maps, masks) == segmentation_scores(maps.float(), masks)


MAPS, MASKS = torch.rand(2, 3, 4), torch.ones(2, 6, 8, dtype=torch.long)


@pytest.mark.parametrize(
    ("maps", "masks", "match"),
    [
        (MAPS * torch.nan, MASKS, r"maps \[0, 1\] hold NaN"),
        (MAPS / 0, MASKS, "NaN or infinity"),
        (MAPS[0], MASKS, r"expected \[B, h, w\]"),
        (MAPS.long(), MASKS, "expected a floating-point tensor"),
        (MAPS, MASKS[:1], "one for each of the 2 maps"),
        (MAPS, MASKS.float(), "expected int or bool"),
        (MAPS, MASKS + 1, "hold the label 2"),
    ],
)
def test_errors_say_what_came(maps, masks, match):
    with pytest.raises(ArgumentError, match=match):
        segmentation_statistics(maps, masks)
    with pytest.raises(ArgumentError, match="chunk_size"):
        segmentation_statistics(MAPS, MASKS, chunk_size=0)
