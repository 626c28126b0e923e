"""The classes over torchmetrics: batches, processes, and what happens without it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import shapwrap.metrics
from shapwrap.errors import ArgumentError
from shapwrap.metrics import (
    ConstantMapWarning,
    Faithfulness,
    InsertionDeletion,
    faithfulness,
    insertion_deletion,
    predictor,
)

ROOT = Path(__file__).parent.parent


def make_predict():
    """A small random network in train mode, on images of 6 x 8 pixels."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 8, 4), nn.Dropout(0.5))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(4, 144, generator=generator))
        model[1].bias.zero_()
    return predictor(model, ((0.5,) * 3, (0.5,) * 3))


def make_data(num=7):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.rand(num, 3, 6, 8, generator=generator),
        torch.randn(num, 3, 4, generator=generator),
    )


def test_means_over_batches_are_those_of_all_images():
    images, maps = make_data()
    maps[3] = 1.0
    predict, target = make_predict(), torch.arange(7) % 4
    metric = Faithfulness(predict, fill="mean", steps=4, num_groups=5)
    areas = InsertionDeletion(predict, steps=6)
    with pytest.warns(ConstantMapWarning):
        for part in torch.arange(7).split(3):
            metric.update(images[part], maps[part], target[part])
            areas.update(images[part], maps[part])
        whole = faithfulness(
            predict, images, maps, target=target, fill="mean", steps=4, num_groups=5
        )
        expected = insertion_deletion(predict, images, maps, steps=6)
    result = metric.compute()
    assert (result["num_images"], result["undefined_saco"], result["undefined_aopc"]) == (7, 1, 0)
    for name, mean in whole.mean().items():
        assert result[name].item() == pytest.approx(mean, abs=1e-5)
    for name, mean in expected.mean().items():
        assert areas.compute()[name].item() == pytest.approx(mean, abs=1e-5)
    assert "mean of each channel" in str(metric.protocol)
    assert list(metric.children()) == [] and metric.state_dict() == {}


def test_forward_gives_the_batch_and_collects():
    images, maps = make_data()
    metric = Faithfulness(make_predict(), metrics="aopc")
    batch = metric(images[:3], maps[:3])
    metric(images[3:], maps[3:])
    expected = faithfulness(make_predict(), images, maps)["aopc"]
    assert batch["aopc"].item() == pytest.approx(expected[:3].mean().item(), abs=1e-5)
    assert metric.compute()["aopc"].item() == pytest.approx(expected.mean().item(), abs=1e-5)
    metric.reset()
    metric.update(images[:3], maps[:3])
    assert metric.compute()["num_images"] == 3


def test_merged_states_are_those_of_all_images():
    images, maps = make_data()
    metrics = [Faithfulness(make_predict()) for _ in range(2)]
    metrics[0].update(images[:2], maps[:2])
    metrics[1].update(images[2:], maps[2:])
    metrics[0].merge_state(metrics[1])
    merged = metrics[0].compute()
    for name, mean in faithfulness(make_predict(), images, maps).mean().items():
        assert merged[name].item() == pytest.approx(mean, abs=1e-5)
    assert merged["num_images"] == 7


SCRIPT = """
import torch
import torch.distributed as dist

from shapwrap.metrics import Faithfulness, faithfulness
from tests.test_collected_faithfulness import make_data, make_predict

torch.set_num_threads(1)
dist.init_process_group("gloo")
images, maps = make_data()
own = slice(0, 3) if dist.get_rank() == 0 else slice(3, 7)
metric = Faithfulness(make_predict(), chunk_size=5)
metric.update(images[own], maps[own])
result = metric.compute()
for name, mean in faithfulness(make_predict(), images, maps).mean().items():
    assert abs(result[name].item() - mean) < 1e-5, (name, result, mean)
assert result["num_images"] == 7
dist.destroy_process_group()
print("fine")
"""


@pytest.mark.slow
def test_two_processes_agree(tmp_path):
    script = tmp_path / "processes.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(script)], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("fine") == 2


def test_means_of_clamped_log_odds_are_finite():
    def predict(images):
        dark = (images.sum(dim=(1, 2, 3)) < 10)[:, None]
        return torch.where(dark, torch.tensor([-torch.inf, 0.0]), torch.tensor([1.0, 0.0]))

    metric = Faithfulness(predict, metrics="log_odds", fractions=[1.0])
    images, maps = torch.ones(3, 3, 6, 8), make_data(3)[1]
    for _ in range(2):
        metric.update(images, maps)
    lowest = torch.finfo(torch.float32).min
    assert metric.compute()["log_odds"].item() == pytest.approx(lowest)
    scores = faithfulness(predict, images, maps, fractions=[1.0])
    assert scores.mean()["log_odds"] == pytest.approx(lowest)


def test_unknown_metrics_are_told_at_once():
    with pytest.raises(ArgumentError, match="expected some of aopc"):
        Faithfulness(make_predict(), metrics=["auc"])


def test_options_that_nothing_takes():
    for options in ({"chunks": 3}, {"target": 1}):
        with pytest.raises(ValueError, match=r"[Uu]nexpected keyword"):
            Faithfulness(make_predict(), **options)


def test_without_torchmetrics():
    code = """
import sys
import shapwrap.metrics
assert "torchmetrics" not in sys.modules
sys.modules["torchmetrics"] = None
shapwrap.metrics.faithfulness
try:
    shapwrap.metrics.Faithfulness
except shapwrap.errors.MissingDependencyError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert "pip install 'shapwrap[metrics]'" in done.stdout


def test_unknown_names():
    with pytest.raises(AttributeError, match="no_such_metric"):
        _ = shapwrap.metrics.no_such_metric
