"""Pointing game, components and boxes against loops over pixels."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from shapwrap import Explanation
from shapwrap.errors import ArgumentError
from shapwrap.metrics import box_localisation, localisation, pointing_game
from shapwrap.metrics.components import component_labels, largest_components


def drawn(seed, batch, size, levels=1000, share=0.3):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randint(levels, (batch, *size), generator=generator) / 10 - 2
    masks = (torch.rand(batch, *size, generator=generator) < share).long()
    masks[torch.rand(masks.shape, generator=generator) < 0.2] = -1
    return maps, masks


def pointed(values, mask, tolerance):
    """Hit and chance of one image, pixel by pixel."""
    objects = np.argwhere(mask == 1)
    if len(objects) == 0:
        return np.nan, np.nan
    labelled = np.argwhere(mask != -1)
    on = {tuple(p): ((objects - p) ** 2).sum(axis=1).min() <= tolerance**2 for p in labelled}
    best = max(values[p] for p in on)
    tied = [hit for p, hit in on.items() if values[p] == best]
    return np.mean(tied), np.mean(list(on.values()))


@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 6), st.integers(2, 9)),
    levels=st.sampled_from([1, 3, 1000]),
    share=st.sampled_from([0.02, 0.3]),
    tolerance=st.sampled_from([0, 1, 1.5, 2, 3.7, 20]),
)
def test_pointing_game_is_that_of_the_loop(seed, batch, size, levels, share, tolerance):
    maps, masks = drawn(seed, batch, size, levels, share)
    found = pointing_game(maps, masks, tolerance=tolerance)
    expected = [pointed(m.numpy(), k.numpy(), tolerance) for m, k in zip(maps, masks, strict=True)]
    np.testing.assert_allclose(torch.stack(found, 1).numpy(), expected, atol=1e-6)


def test_a_constant_map_points_as_well_as_chance():
    masks = torch.zeros(1, 7, 11, dtype=torch.long)
    masks[0, :2, :3] = 1
    found = pointing_game(torch.full((1, 3, 5), 0.1), masks)
    torch.testing.assert_close(found.hit, found.chance)
    torch.testing.assert_close(found.chance, torch.tensor([6 / 77]))


def test_patches_that_hold_evidence():
    """On a grid that does not divide the image, and with pixels that no patch covers."""
    evidence = torch.zeros(3, 7, 9, dtype=torch.bool)
    evidence[0, 6, 0] = evidence[1, 3, 8] = evidence[2, 3, 4] = True
    values = torch.zeros(3, 6)
    values[:, 4] = 1.0
    made = Explanation(values, torch.zeros(3, 2), torch.zeros(3).long(), (2, 3), (7, 9))
    # Rows 0-3 and 4-6, columns 0-2, 3-5, 6-8: evidence in patches 3, 2 and 1.
    assert localisation(made, evidence).hit.tolist() == [0, 0, 0]
    values[0], values[1], values[2] = torch.eye(6)[[3, 2, 1]]
    assert localisation(made, evidence).hit.tolist() == [1, 1, 1]
    torch.testing.assert_close(localisation(made, evidence).chance, torch.full((3,), 1 / 6))
    cut = Explanation(
        values, torch.zeros(3, 2), torch.zeros(3).long(), (2, 3), (7, 9), covered=(6, 6)
    )
    # The first two lie where no patch does; the third in row 1, column 2.
    assert localisation(cut, evidence).chance.tolist() == [0, 0, pytest.approx(1 / 6)]
    with pytest.raises(ArgumentError, match=r"torch\.bool"):
        localisation(made, evidence.long())


@given(
    seed=st.integers(0, 2**16),
    size=st.tuples(st.integers(1, 9), st.integers(1, 12)),
    share=st.floats(0, 1),
)
def test_components_are_those_of_scipy(seed, size, share):
    generator = torch.Generator().manual_seed(seed)
    regions = torch.rand(3, *size, generator=generator) < share
    labels = component_labels(regions)
    largest = largest_components(regions)
    for region, label, best in zip(regions, labels, largest, strict=True):
        expected, number = ndimage.label(region.numpy(), structure=np.ones((3, 3)))
        pairs = set(zip(expected.ravel().tolist(), label.flatten().tolist(), strict=True))
        assert len(pairs) == number + (not region.all())
        sizes = [(expected == n).sum() for n in range(1, number + 1)]
        assert best.sum() == max(sizes, default=0)
        if number:
            assert len(set(expected[best.numpy()])) == 1


def test_a_spiral_is_one_component():
    rows = ["#########", "........#", "#######.#", "#.....#.#", "#.###.#.#"]
    rows += ["#.#...#.#", "#.#####.#", "#.......#", "#########"]
    spiral = torch.tensor([[[c == "#" for c in row] for row in rows]])
    assert component_labels(spiral).unique().tolist() == [0, 81]
    assert torch.equal(largest_components(spiral), spiral)


def boxed(region):
    """Left, top, right, bottom by looking at every pixel."""
    points = np.argwhere(region)
    if len(points) == 0:
        return [0, 0, 0, 0]
    (top, left), (bottom, right) = points.min(axis=0), points.max(axis=0)
    return [left, top, right + 1, bottom + 1]


@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 7), st.integers(2, 9)),
    threshold=st.sampled_from(["mean", 0.2, 0.5, 0]),
    largest=st.booleans(),
)
def test_box_iou_is_that_of_painted_boxes(seed, batch, size, threshold, largest):
    maps, masks = drawn(seed, batch, size, share=0.1)
    found = box_localisation(maps, masks, threshold=threshold, largest_component=largest)
    for row in range(batch):
        values = maps[row].numpy()
        heights = (values - values.min()) / max(values.max() - values.min(), 1e-12)
        region = heights > (heights.astype(np.float64).mean() if threshold == "mean" else threshold)
        if largest:
            region = largest_components(torch.from_numpy(region)[None])[0].numpy()
        boxes = boxed(region), boxed(masks[row].numpy() == 1)
        assert [found.found[row].tolist(), found.truth[row].tolist()] == [list(b) for b in boxes]
        painted = np.zeros((2, *size), dtype=bool)
        for canvas, (left, top, right, bottom) in zip(painted, boxes, strict=True):
            canvas[top:bottom, left:right] = True
        if painted[1].any():
            expected = (painted[0] & painted[1]).sum() / (painted[0] | painted[1]).sum()
            assert found.iou[row] == pytest.approx(expected, abs=1e-6)
        else:
            assert found.iou[row].isnan()


def test_the_largest_component_alone():
    maps = torch.zeros(1, 6, 8)
    maps[0, 0, 0], maps[0, 2:5, 3:7] = 1.0, 0.9
    masks = (maps == 0.9).long()
    assert box_localisation(maps, masks).iou.item() == 1
    assert box_localisation(maps, masks, largest_component=False).iou.item() == pytest.approx(
        12 / 35
    )
    assert box_localisation(maps, masks, threshold=0.95).found.tolist() == [[0, 0, 1, 1]]
    assert box_localisation(torch.ones(1, 6, 8), masks).iou.item() == 0


@pytest.mark.parametrize("threshold", ["median", 1.0, 1, -0.1])
def test_thresholds_outside_their_range(threshold):
    with pytest.raises(ArgumentError, match="expected 'mean'"):
        box_localisation(torch.rand(1, 2, 2), torch.ones(1, 2, 2).long(), threshold=threshold)
    for tolerance in (-1, float("inf"), float("nan")):
        with pytest.raises(ArgumentError, match="at least 0"):
            pointing_game(torch.rand(1, 2, 2), torch.ones(1, 2, 2).long(), tolerance=tolerance)
