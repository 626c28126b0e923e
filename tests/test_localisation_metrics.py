"""Classes that collect: batches and processes give what one call gives."""

import subprocess
import sys

import pytest
import torch

from shapwrap import metrics
from shapwrap.errors import ArgumentError
from shapwrap.metrics import (
    BoxIoU,
    PointingGame,
    Segmentation,
    box_localisation,
    pointing_game,
    segmentation_scores,
)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    maps = torch.randn(7, 3, 4, generator=generator)
    masks = torch.randint(-1, 2, (7, 6, 8), generator=generator)
    return maps, masks


def filled(metric, maps, masks):
    for part in zip(maps.split(3), masks.split(3), strict=True):
        metric.update(*part)
    return metric


def reduced(processes):
    """What a synchronisation does: every state summed over processes."""
    merged = processes[0]
    for name, reduction in merged._reductions.items():
        states = torch.stack([getattr(process, name) for process in processes])
        setattr(merged, name, reduction(states))
    merged._computed = None
    return merged


@pytest.mark.parametrize("processes", [1, 2])
def test_segmentation_collects(data, processes):
    maps, masks = data
    shards = [
        filled(Segmentation(chunk_size=2), maps[rank::processes], masks[rank::processes])
        for rank in range(processes)
    ]
    found = reduced(shards).compute()
    expected = segmentation_scores(maps, masks)
    for name, value in found.items():
        assert float(value) == pytest.approx(getattr(expected, name)), name
    assert len(found) == 7


@pytest.mark.parametrize("processes", [1, 2])
def test_pointing_and_boxes_collect(data, processes):
    maps, masks = data
    masks[2] = masks[2].clamp(max=0)

    def collected(make):
        shards = [
            filled(make(), maps[rank::processes], masks[rank::processes])
            for rank in range(processes)
        ]
        with pytest.warns(UserWarning, match="1 images without an object"):
            return reduced(shards).compute()

    kept = [0, 1, 3, 4, 5, 6]
    found = collected(lambda: PointingGame(tolerance=1))
    expected = pointing_game(maps[kept], masks[kept], tolerance=1)
    assert float(found["hit"]) == pytest.approx(float(expected.hit.mean()))
    assert float(found["chance"]) == pytest.approx(float(expected.chance.mean()))
    assert (int(found["images"]), int(found["undefined"])) == (6, 1)
    boxes = collected(lambda: BoxIoU(threshold=0.2, largest_component=False))
    iou = box_localisation(maps[kept], masks[kept], threshold=0.2, largest_component=False).iou
    assert float(boxes["iou"]) == pytest.approx(float(iou.mean()))
    assert float(boxes["correct"]) == pytest.approx(float((iou >= 0.5).float().mean()))


def test_forward_gives_the_batch_and_keeps_the_sum(data):
    maps, masks = data
    metric = Segmentation()
    batch = metric(maps[:3], masks[:3])
    assert float(batch["pixel_accuracy"]) == pytest.approx(
        segmentation_scores(maps[:3], masks[:3]).pixel_accuracy
    )
    metric(maps[3:], masks[3:])
    assert float(metric.compute()["mean_iou"]) == pytest.approx(
        segmentation_scores(maps, masks).mean_iou
    )
    metric.reset()
    assert metric.images == 0


@pytest.mark.parametrize("make", [Segmentation, PointingGame, BoxIoU])
@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_nothing_added_is_an_error(make):
    with pytest.raises(ArgumentError, match="Call update first"):
        make().compute()


def test_torchmetrics_is_imported_only_when_asked_for():
    code = "import sys, shapwrap.metrics as m, shapwrap.data; print('torchmetrics' in sys.modules);"
    code += "m.Segmentation; print('torchmetrics' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = metrics.no_such_name
    for name in metrics.__all__:
        assert getattr(metrics, name) is not None
