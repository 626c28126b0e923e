"""Comparisons, on tiny models: numbers, resuming, failures, tables, figures, the command."""

import copy
import csv
import json
import math
import sys

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import Dataset
from typer.testing import CliRunner

from shapwrap import ShapleyWrapper, metrics
from shapwrap.backbones.base import Normalization
from shapwrap.cli.app import app
from shapwrap.comparison import Measured, Sample, compare
from shapwrap.comparison.datasets import ComparisonData
from shapwrap.comparison.training import train
from shapwrap.errors import ArgumentError, ConfigurationError, UnsupportedBackboneError
from shapwrap.explainers import RandomMap
from shapwrap.training import plain
from tests import fake_metrics

STATISTICS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
IMAGES = 7
FAKES = {
    "faithfulness",
    "predictor",
    "segmentation_statistics",
    "pointing_game",
    "cost",
}


def tiny_vit(num_classes, image_size):
    model = VisionTransformer(
        image_size, 16, num_classes=num_classes, embed_dim=16, depth=1, num_heads=2
    )
    model.pretrained_cfg = STATISTICS
    nn.init.normal_(model.head.weight)
    return model


class TinyCNN(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 16, 16)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, images):
        return self.fc(self.conv(images).relu().mean(dim=(2, 3)))


class Counting(RandomMap):
    """A random map that counts its calls, and fails when told to."""

    calls = 0
    error = None
    error_at = 0

    def __init__(self, model, *, grid=None, generator=None, scale=1.0):
        super().__init__(model, grid=grid, generator=generator)
        self.scale = scale

    def attribute(self, images, target):
        type(self).calls += 1
        if self.error is not None and type(self).calls > self.error_at:
            raise self.error
        made = super().attribute(images, target)
        return made._replace(values=made.values * self.scale)


class Learned(Counting):
    """A method that learns one number: how many images it saw."""

    fits = 0

    def __init__(self, model, *, config, grid=None):
        super().__init__(model, grid=grid)
        self.config, self.seen = config, torch.zeros(())

    def fit(self, data, *, resume):
        type(self).fits += 1
        self.seen = torch.tensor(float(sum(len(images) for images, _ in data)))
        self.history = {"only": [{"loss": 1.0}]}
        return self

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]
        return self

    def attribute(self, images, target):
        made = super().attribute(images, target)
        return made._replace(values=made.values * 0 + self.seen)


METHODS = {"counting": Counting, "learned": Learned}


@pytest.fixture(autouse=True)
def _fakes(monkeypatch):
    for name in FAKES:
        monkeypatch.setattr(metrics, name, getattr(fake_metrics, name))
    monkeypatch.setattr(plain, "fine_tune", fake_metrics.fine_tune)
    for name, value in (("calls", 0), ("error", None), ("error_at", 0)):
        monkeypatch.setattr(Counting, name, value)
    monkeypatch.setattr(Learned, "fits", 0)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def settings(out, **changes):
    made = {
        "data": {"kind": "digits", "image_size": [48, 64], "train_images": 8},
        "models": [
            {
                "name": "CNN",
                "model": "tests.test_comparison:TinyCNN",
                "grid": [3, 4],
                **STATISTICS,
                "training": {"epochs": 1, "batch_size": 4},
            },
            {"name": "Ours", "model": "tests.test_comparison:tiny_vit", "kind": "wrapped"},
        ],
        "methods": ["shapley", "counting", "random"],
        "metrics": ["faithfulness", "localisation", "cost"],
        "batch_size": 3,
        "device": "cpu",
        "out": str(out),
        "figures": {"images": 0, "curves": False},
    }
    made["data"]["eval_images"] = IMAGES
    return {**made, **changes}


def run(out, notes=None, *, own=METHODS, **changes):
    notes = [] if notes is None else notes
    return compare(settings(out, **changes), methods=own, notify=notes.append, progress=False)


def numbers(done):
    return {(row.model, row.method): row.metrics["faithfulness"].summary for row in done.rows}


# --- one run --------------------------------------------------------------------------------------


def test_a_run(tmp_path):
    state = torch.random.get_rng_state()
    done = run(tmp_path, figures={"images": 2})
    assert torch.equal(torch.random.get_rng_state(), state)
    assert done.failures() == []
    assert [(row.model, row.method) for row in done.rows] == [
        ("CNN", "counting"),
        ("CNN", "random"),
        ("Ours", "shapley"),
        ("Ours", "counting"),
        ("Ours", "random"),
    ]
    for name in ("maps-cnn", "maps-ours", "maps", "curves-cnn", "curves-ours", "curves"):
        for suffix in ("pdf", "png"):
            assert (tmp_path / "figures" / f"{name}.{suffix}").stat().st_size > 3000
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["run"]["versions"]["torch"] == torch.__version__
    assert record["config"]["data"]["image_size"] == [48, 64]
    outcome = record["rows"][0]["metrics"]["faithfulness"]
    assert {"seed", "device", "versions", "command", "fill"} <= outcome["protocol"].keys()
    assert outcome["summary"]["saco"] is None and outcome["undefined"]["saco"] == IMAGES
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 and rows[2]["method"] == "shapley"
    written = done.rows[2].metrics["faithfulness"]
    assert float(rows[2]["faithfulness.aopc"]) == written.summary["aopc"]
    assert float(rows[2]["faithfulness.aopc_error"]) == written.errors["aopc"]
    assert rows[2]["faithfulness.saco"] == ""
    assert rows[2]["localisation.status"] == "finished"
    tables = (tmp_path / "tables.md").read_text()
    for words in (
        "Table 1",
        "Table 2",
        "Table 3",
        "AOPC ↑ | LOdds ↓ | SaCo ↑",
        "mIoU ↑",
        "seed: 0",
    ):
        assert words in tables


def test_numbers_by_hand(tmp_path):
    """Weights and maps as they were written, the rest with NumPy alone."""
    done = run(tmp_path)
    model = TinyCNN()
    model.load_state_dict(load_file(tmp_path / "models" / "cnn.safetensors"))
    data = compare_data(tmp_path)
    images, labels, masks = (torch.stack([torch.as_tensor(s[i]) for s in data]) for i in range(3))
    assert images.shape == (IMAGES, 3, 48, 64)
    assert 0 <= images.min() < images.max() <= 1
    mean, std = (torch.tensor(STATISTICS[name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        logits = model((images - mean) / std)
    correct = (logits.argmax(1) == labels).double().numpy()
    row = done.models[0]
    assert row.accuracy == pytest.approx(correct.mean())
    assert row.accuracy_error == pytest.approx(correct.std(ddof=1) / math.sqrt(IMAGES))
    # Each of the 3 x 4 cells of 16 x 16 x 3 pixels goes to 8 channels, and these to 10 classes.
    assert row.multiply_adds == 12 * 16 * 16 * 3 * 8 + 8 * 10
    assert row.parameters == 16 * 16 * 3 * 8 + 8 + 8 * 10 + 10

    maps = load_file(tmp_path / "maps" / "cnn" / "random.safetensors")
    assert torch.equal(maps["target"], logits.argmax(1))
    drawn = nn.functional.interpolate(
        maps["values"].view(IMAGES, 1, 3, 4), (48, 64), mode="bilinear"
    )[:, 0].double()
    found = next(r for r in done.rows if r.model == "CNN" and r.method == "random").metrics
    probability = logits.softmax(1).max(1).values.double().numpy()
    means = drawn.mean(dim=(1, 2)).numpy()
    said = found["faithfulness"]
    for name, values in (("aopc", probability), ("log_odds", means)):
        assert said.summary[name] == pytest.approx(values.mean(), abs=1e-6)
        error = values.std(ddof=1) / math.sqrt(IMAGES)
        assert said.errors[name] == pytest.approx(error, rel=1e-4)
    assert math.isnan(said.summary["saco"]) and said.undefined["saco"] == IMAGES
    curve = said.curves["aopc"]
    assert curve["x"] == pytest.approx([0.1, 0.9])
    assert curve["y"] == pytest.approx([probability.mean(), probability.mean() + 1])

    above = drawn > drawn.mean(dim=(1, 2), keepdim=True)
    right = (above == (masks == 1)).sum((1, 2)).numpy()
    size = 48 * 64
    left_out = [(right.sum() - r) / ((IMAGES - 1) * size) for r in right]
    spread = np.sqrt((IMAGES - 1) / IMAGES * np.sum((left_out - np.mean(left_out)) ** 2))
    located = found["localisation"]
    assert located.summary["pixel_accuracy"] == pytest.approx(right.sum() / (IMAGES * size))
    assert located.errors["pixel_accuracy"] == pytest.approx(spread)
    overlaps = []
    for side in (False, True):
        ours, real = (above == side).numpy(), ((masks == 1) == side).numpy()
        overlaps.append((ours & real).sum() / (ours | real).sum())
    assert located.summary["mean_iou"] == pytest.approx(np.mean(overlaps))


def compare_data(tmp_path):
    from shapwrap.comparison.config import parse_config
    from shapwrap.comparison.datasets import digits

    return digits(parse_config(settings(tmp_path)).data, 0).evaluation


def test_batches_do_not_change_numbers(tmp_path):
    first = numbers(run(tmp_path / "a", own={"counting": Counting}))
    again = numbers(run(tmp_path / "b", own={"counting": Counting}, batch_size=IMAGES))
    for row, summary in first.items():
        # A generator gives other numbers in batches of another size, so random maps differ.
        names = ("aopc", "log_odds") if row[1] == "shapley" else ("aopc",)
        for name in names:
            assert again[row][name] == pytest.approx(summary[name], abs=1e-6)


# --- resuming -------------------------------------------------------------------------------------


def test_a_second_run_makes_nothing(tmp_path, monkeypatch):
    first = run(tmp_path)
    calls = Counting.calls

    def not_measured_again(*arguments, **options):
        raise AssertionError("measured again")

    monkeypatch.setattr(metrics, "faithfulness", not_measured_again)
    monkeypatch.setattr(plain, "fine_tune", None)
    notes = []
    again = run(tmp_path, notes)
    assert Counting.calls == calls and notes == []
    assert again.models == first.models
    assert json.dumps(again.records()) == json.dumps(first.records())


@pytest.mark.parametrize("killed_at", [0, 2, 3, 5])
def test_a_killed_run_goes_on_where_it_stopped(tmp_path, monkeypatch, killed_at):
    whole = numbers(run(tmp_path / "whole"))
    total, Counting.calls = Counting.calls, 0
    monkeypatch.setattr(Counting, "error", KeyboardInterrupt())
    monkeypatch.setattr(Counting, "error_at", killed_at)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed")
    assert Counting.calls == killed_at + 1
    finished = {path: path.read_bytes() for path in (tmp_path / "killed").rglob("*.json")}
    assert len(finished) > 0
    monkeypatch.setattr(Counting, "error", None)
    notes = []
    assert str(numbers(run(tmp_path / "killed", notes))) == str(whole)
    assert notes == []
    # A method on a model is explained in 3 batches, and measured for cost in one call more.
    begun = (killed_at // 4) * 4 + (3 if killed_at % 4 == 3 else 0)
    assert Counting.calls == killed_at + 1 + total - begun
    for path, content in finished.items():
        assert path.read_bytes() == content


def test_training_goes_on_where_it_was_killed(tmp_path):
    class Impatient(torch.utils.data.Dataset):
        left = -1

        def __len__(self):
            return 8

        def __getitem__(self, index):
            type(self).left -= 1
            if type(self).left == 0:
                raise KeyboardInterrupt
            image = torch.rand(3, 48, 64, generator=torch.Generator().manual_seed(index))
            return image, index % 2

    class Same(Impatient):
        def __getitem__(self, index):
            return Sample(super().__getitem__(index)[0], index % 2)

    def data(config, seed):
        return ComparisonData(Impatient(), Same(), ["a", "b"])

    trained = {
        "name": "Ours",
        "model": "tests.test_comparison:tiny_vit",
        "kind": "wrapped",
        "training": [
            {"epochs": 1, "batch_size": 4, "shapley_weight": 0, "masked_cross_entropy": 0},
            {"epochs": 2, "batch_size": 4, "learning_rate": "1e-2"},
        ],
    }
    changes = {
        "data": {"kind": "mine", "image_size": [48, 64]},
        "models": [trained],
        "methods": ["shapley"],
        "metrics": ["cost"],
    }
    kwargs = {"data": {"mine": data}, "progress": False, "notify": lambda line: None}
    done = compare(settings(tmp_path / "whole", **changes), **kwargs)
    assert done.failures() == []
    # The second epoch of the second stage.
    Impatient.left = 8 + 8 + 6
    with pytest.raises(KeyboardInterrupt):
        compare(settings(tmp_path / "killed", **changes), **kwargs)
    assert (tmp_path / "killed" / "models" / "ours.unfinished" / "stage-2").is_dir()
    done = compare(settings(tmp_path / "killed", **changes), **kwargs)
    assert done.failures() == []
    weights = [
        load_file(tmp_path / part / "models" / "ours.safetensors") for part in ("whole", "killed")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    start = tiny_vit(2, (48, 64)).state_dict()
    assert not torch.equal(
        weights[0]["model.blocks.0.mlp.fc1.weight"], start["blocks.0.mlp.fc1.weight"]
    )
    assert not (tmp_path / "killed" / "models" / "ours.unfinished").exists()


def test_automatic_weight_holds_accuracy_on_images_that_are_not_trained_on(tmp_path):
    class Counted(Dataset):
        def __init__(self):
            self.reads = [0] * 20

        def __len__(self):
            return 20

        def __getitem__(self, index):
            self.reads[index] += 1
            image = torch.rand(3, 48, 64, generator=torch.Generator().manual_seed(index))
            return image, index % 2

    images = Counted()
    data = ComparisonData(images, images, ["a", "b"])
    still = Normalization((0.0,) * 3, (1.0,) * 3)
    records = train(
        ShapleyWrapper(tiny_vit(2, (48, 64))),
        [{"epochs": 1, "batch_size": 4, "shapley_weight": "auto", "log_every": 2}],
        lambda size: data.training_batches(still, size),
        lambda size: data.training_and_control_batches(still, size),
        folder=tmp_path,
        seed=0,
        progress=False,
    )
    assert records[0]["kind"] == "budget"
    # Once by the reference, once by the run; held-out ones by each validation.
    trained = [index for index in range(20) if index % 10]
    assert [images.reads[index] for index in trained] == [2] * 18
    assert images.reads[0] == images.reads[10] >= 3


def test_changed_settings_make_their_pieces_again_and_no_others(tmp_path):
    first = run(tmp_path)
    assert Counting.calls == 8
    scaled = {"name": "counting", "options": {"scale": 3.0}}
    notes = []
    again = run(tmp_path, notes, methods=["shapley", scaled, "random"])
    assert Counting.calls == 16
    assert len(notes) == 8 and all("counting" in note for note in notes)
    assert any("method.options.scale" in note for note in notes)
    for row, before in numbers(first).items():
        factor = 3 if row[1] == "counting" else 1
        assert numbers(again)[row]["log_odds"] == pytest.approx(factor * before["log_odds"])


@pytest.mark.parametrize(
    ("changes", "made"),
    [
        ({"seed": 1}, 8),
        ({"chunk_size": 2}, 0),
        ({"figures": {"images": 1}}, 0),
        ({"metrics": ["faithfulness"]}, 0),
        ({"metrics": {"localisation": {"images": 4}}}, 0),
        ({"data": {"kind": "digits", "image_size": [48, 64], "eval_images": 3}}, 4),
    ],
)
def test_what_a_setting_decides(tmp_path, changes, made):
    run(tmp_path)
    before = Counting.calls
    done = run(tmp_path, **changes)
    assert done.failures() == []
    assert Counting.calls - before == made


def test_a_metric_on_the_first_images(tmp_path):
    done = run(tmp_path, metrics={"few": {"metric": "faithfulness", "images": 4, "fill": "mean"}})
    piece = json.loads((tmp_path / "metrics" / "ours" / "shapley" / "few.json").read_text())
    assert len(piece["result"]["images"]["aopc"]) == 4
    assert done.rows[0].metrics["few"].protocol["fill"] == "mean"
    assert "Faithfulness (the paper's Table 2): few" in (tmp_path / "tables.md").read_text()


def test_restart(tmp_path):
    run(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    compare(settings(tmp_path), methods=METHODS, restart=True, progress=False)
    assert Counting.calls == 16
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_damaged_piece_is_made_again(tmp_path):
    run(tmp_path)
    (tmp_path / "maps" / "cnn" / "counting.json").write_text('{"status": ')
    notes = []
    run(tmp_path, notes)
    assert Counting.calls == 8 + 3
    assert len(notes) == 1 and "damaged" in notes[0]


def test_other_weights_are_another_model(tmp_path):
    torch.manual_seed(3)
    torch.save(TinyCNN().state_dict(), tmp_path / "weights.pth")
    model = {"name": "CNN", "model": "tests.test_comparison:TinyCNN", "grid": 3, **STATISTICS}
    model |= {"checkpoint": str(tmp_path / "weights.pth")}
    changes = {"models": [model], "metrics": ["faithfulness"]}
    first = run(tmp_path / "out", **changes)
    assert Counting.calls == 3
    torch.save(TinyCNN().state_dict(), tmp_path / "weights.pth")
    notes = []
    again = run(tmp_path / "out", notes, **changes)
    assert Counting.calls == 6
    assert any("files.checkpoint" in note or "model" in note for note in notes)
    assert numbers(first) != numbers(again)


def test_a_model_that_starts_from_another(tmp_path):
    vit = {"model": "tests.test_comparison:tiny_vit"}
    models = [
        {"name": "plain", **vit, "training": {"epochs": 1, "batch_size": 4}},
        {"name": "ours", **vit, "kind": "wrapped", "start": "plain"},
    ]
    changes = {"models": models, "methods": ["random", "shapley"], "metrics": ["cost"]}
    done = run(tmp_path, **changes)
    assert done.failures() == []
    trained = load_file(tmp_path / "models" / "plain.safetensors")
    wrapped = ShapleyWrapper(tiny_vit(10, (48, 64)))
    wrapped.model.load_state_dict(trained)
    said = load_file(tmp_path / "maps" / "ours" / "shapley.safetensors")
    mean, std = (torch.tensor(STATISTICS[name])[:, None, None] for name in ("mean", "std"))
    images = torch.stack([sample.image for sample in compare_data(tmp_path)])
    expected = wrapped.explain((images - mean) / std)
    assert torch.allclose(said["values"], expected.values, atol=1e-5)
    # Another training of the first one changes the second one too.
    models[0]["training"]["epochs"] = 2
    notes = []
    run(tmp_path, notes, **changes)
    assert any("maps / ours / shapley" in note and "model" in note for note in notes)
    models[1]["model"] = "tests.test_comparison:TinyCNN"
    models[1].update(STATISTICS)
    failures = run(tmp_path, **changes).failures()
    assert len(failures) == 1 and "expected the same model" in failures[0]


# --- what does not work ---------------------------------------------------------------------------


def test_not_applicable_and_failed(tmp_path, monkeypatch):
    class Refusing(Counting):
        error = UnsupportedBackboneError("no attention here | sorry")

    monkeypatch.setattr(Counting, "error", RuntimeError("out of memory"))
    changes = {"methods": ["random", "counting", "tests.test_comparison:Absent", "refusing"]}
    with pytest.raises(ConfigurationError, match="has no 'Absent'"):
        run(tmp_path, **changes)
    changes["methods"].pop(2)
    methods = {"counting": Counting, "refusing": Refusing}
    notes = []
    done = run(tmp_path, notes, own=methods, **changes)
    status = {(row.model, row.method): row.status for row in done.rows}
    for model in ("CNN", "Ours"):
        assert status[model, "random"] == "finished"
        assert status[model, "counting"] == "failed"
        assert status[model, "refusing"] == "not applicable"
    assert len(done.failures()) == 2
    assert all("RuntimeError: out of memory" in failure for failure in done.failures())
    assert sum("failed" in note for note in notes) == 2
    tables = (tmp_path / "tables.md").read_text()
    assert "- CNN, refusing; Ours, refusing: not applicable: no attention here | sorry" in tables
    assert "- CNN, counting; Ours, counting: failed: RuntimeError: out of memory" in tables
    piece = json.loads((tmp_path / "maps" / "cnn" / "counting.json").read_text())
    assert "in attribute" in piece["protocol"]["traceback"]

    monkeypatch.setattr(Counting, "error", None)
    monkeypatch.setattr(Refusing, "error", RuntimeError("not asked again"))
    notes = []
    again = run(tmp_path, notes, own=methods, **changes)
    assert again.failures() == []
    assert {(r.model, r.method): r.status for r in again.rows} == status | {
        ("CNN", "counting"): "finished",
        ("Ours", "counting"): "finished",
    }
    assert len(notes) == 2 and all("tried again" in note for note in notes)


def test_a_model_that_cannot_be_built(tmp_path):
    models = copy.deepcopy(settings(tmp_path)["models"])
    models[0]["model"] = "resnet_of_my_dreams"
    done = run(tmp_path, models=models)
    assert done.models[0].status == "failed" and done.models[1].status == "finished"
    assert len(done.failures()) == 1 and "is no timm model" in done.failures()[0]
    assert [row.status for row in done.rows] == ["failed"] * 2 + ["finished"] * 3
    assert "resnet_of_my_dreams" in (tmp_path / "tables.md").read_text()


def test_a_metric_that_fails_leaves_the_others(tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise ValueError("broken metric")

    monkeypatch.setattr(metrics, "faithfulness", broken)
    done = run(tmp_path)
    assert len(done.failures()) == 5 and "broken metric" in done.failures()[0]
    row = done.rows[0]
    assert row.metrics["faithfulness"].status == "failed"
    assert row.metrics["localisation"].status == "finished"
    assert "No result." in (tmp_path / "tables.md").read_text()


def test_warnings_are_recorded_once(tmp_path, monkeypatch):
    import warnings

    real = fake_metrics.faithfulness

    def warning(*arguments, **options):
        warnings.warn("constant maps", stacklevel=2)
        return real(*arguments, **options)

    monkeypatch.setattr(metrics, "faithfulness", warning)
    notes = []
    done = run(tmp_path, notes)
    assert len(notes) == 5
    said = done.rows[0].metrics["faithfulness"].protocol["warnings"]
    assert said == ["UserWarning: constant maps"]


def test_values_that_are_not_finite(tmp_path):
    class Wrong(Counting):
        def attribute(self, images, target):
            made = super().attribute(images, target)
            return made._replace(values=made.values / 0)

    done = run(tmp_path, own={"wrong": Wrong}, methods=["wrong"])
    assert all(row.status == "failed" and "not finite" in row.reason for row in done.rows)


# --- one's own ------------------------------------------------------------------------------------


def test_a_method_that_learns(tmp_path):
    method = {"name": "learned", "models": "plain", "training": {"batch_size": 3, "depth": 2}}
    changes = {"metrics": ["faithfulness", "cost"]}
    kwargs = {"methods": METHODS, "notify": lambda line: None, "progress": False}
    done = compare(settings(tmp_path, **{**changes, "methods": [method]}), **kwargs)
    assert done.failures() == []
    assert Learned.fits == 1
    assert load_file(tmp_path / "explainers" / "cnn" / "learned.safetensors")["seen"] == 8
    maps = load_file(tmp_path / "maps" / "cnn" / "learned.safetensors")
    assert (maps["values"] == 8).all()
    # A further metric calls the method again, and loads what it learned.
    changes["metrics"].append({"name": "again", "metric": "cost", "options": {"repeats": 1}})
    compare(settings(tmp_path, **{**changes, "methods": [method]}), **kwargs)
    assert Learned.fits == 1
    method["training"]["depth"] = 3
    compare(settings(tmp_path, **{**changes, "methods": [method]}), **kwargs)
    assert Learned.fits == 2
    with pytest.raises(ConfigurationError, match="learns nothing"):
        bad = {"name": "counting", "training": {"epochs": 1}}
        compare(settings(tmp_path, methods=[bad]), **kwargs)


def test_own_models_metrics_and_data(tmp_path):
    def positive(subject):
        measured = Measured(protocol={"what": "share of positive values"})
        values = torch.cat([batch.explanation.values for batch in subject.batches()])
        measured.add_images({"positive": (values > 0).double().mean(dim=1)})
        return measured

    def data(config, seed):
        pairs = [(torch.full((3, 48, 64), i / 10), i % 3) for i in range(6)]
        return ComparisonData(pairs, [Sample(*pair) for pair in pairs], ["a", "b", "c"])

    done = compare(
        settings(
            tmp_path,
            data={"kind": "mine", "image_size": [48, 64]},
            models=[{"name": "mine", "grid": 2, **STATISTICS}],
            methods=["random"],
            metrics=["positive"],
        ),
        models={"mine": lambda num_classes: TinyCNN(num_classes)},
        metrics={"positive": positive},
        data={"mine": data},
        notify=lambda line: None,
        progress=False,
    )
    metrics = done.rows[0].metrics
    values = load_file(tmp_path / "maps" / "mine" / "random.safetensors")["values"]
    assert values.shape == (6, 4)
    assert metrics["positive"].summary["positive"] == pytest.approx(
        float((values > 0).float().mean())
    )
    assert "share of positive values" in (tmp_path / "tables.md").read_text()


# --- the command ----------------------------------------------------------------------------------


def command(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def test_command(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    changes = {"methods": ["random"], "metrics": ["faithfulness"]}
    config = json.loads(json.dumps(settings(tmp_path / "unused", **changes)))
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "argv", ["shapwrap", "compare", "--config", str(path)])
    result = command("--config", path, "--out", tmp_path / "out")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "results in" in result.output and not (tmp_path / "unused").exists()
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["run"]["command"] == f"shapwrap compare --config {path}"
    assert record["config"]["out"] == str(tmp_path / "out")
    config["models"][0]["model"] = "nothing_like_it"
    path.write_text(yaml.safe_dump(config))
    result = command("--config", path, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "failed: CNN" in result.stderr
    result = command()
    assert isinstance(result.exception, ArgumentError)
    listed = command("--list")
    assert listed.exit_code == 0
    for name in ("shapley", "grad-cam", "tokentm", "localisation", "imagenette", "digits"):
        assert name in listed.output
