"""Comparison: what is refused before anything is trained, and who may write where."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image
from torch import nn

from shapwrap.comparison import compare, parse_config
from shapwrap.comparison.config import slug
from shapwrap.comparison.store import Piece, Store
from shapwrap.errors import ConfigurationError

STATISTICS = {"mean": [0.5] * 3, "std": [0.5] * 3}


class Small(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 16, 16)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, images):
        return self.fc(self.conv(images).relu().mean(dim=(2, 3)))


def never_trained(*arguments, **options):
    raise AssertionError("training has started")


@pytest.fixture(autouse=True)
def _no_training(monkeypatch):
    monkeypatch.setattr("shapwrap.comparison.models.train", never_trained)


def settings(out, **changes):
    model = {"name": "CNN", "model": "small", "grid": [3, 4], **STATISTICS}
    made = {
        "data": {"kind": "digits", "image_size": [48, 64], "train_images": 4, "eval_images": 2},
        "models": [{**model, "training": {"epochs": 1}}],
        "methods": ["random"],
        "metrics": ["faithfulness"],
        "out": str(out),
        "device": "cpu",
        "figures": {"images": 0, "curves": False},
    }
    return {**made, **changes}


def run(out, notes=None, **changes):
    notes = [] if notes is None else notes
    return compare(
        settings(out, **changes), models={"small": Small}, notify=notes.append, progress=False
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": [{"name": "occlusion", "options": {"fill": "purple"}}]}, "'purple'"),
        ({"methods": [{"name": "occlusion", "options": {"window": [0, 4]}}]}, "window"),
        ({"methods": [{"name": "grad-cam", "options": {"layer": "nope"}}]}, "'nope'"),
        ({"methods": [{"name": "rise", "options": {"num_masks": 0}}]}, "num_masks"),
        ({"metrics": {"faithfulness": {"fil": "black"}}}, "did you mean 'fill'"),
        ({"metrics": {"faithfulness": {"fill": "purple"}}}, "'purple'"),
        ({"metrics": {"faithfulness": {"steps": 0}}}, "steps is 0"),
        ({"metrics": {"faithfulness": {"chunk_size": 4}}}, "chunk_size"),
        ({"metrics": {"insertion_deletion": {"steps": -1}}}, "steps"),
        ({"metrics": {"shapley_truth": {"thresh": 1}}}, "did you mean 'threshold'"),
        ({"metrics": {"cost": {"repeat": 1}}}, "did you mean 'repeats'"),
        ({"metrics": {"localisation": {"x": 1}}}, "unknown key 'x'"),
        ({"methods": ["shapley"]}, "no method explains any of the models"),
        (
            {"data": {"kind": "digits", "image_size": 48, "options": {"distractor": 1}}},
            "did you mean 'distractors'",
        ),
    ],
)
def test_before_training(tmp_path, changes, words):
    with pytest.raises(ConfigurationError, match=words):
        run(tmp_path / "out", **changes)


@pytest.mark.parametrize(
    "options",
    [
        {"fill": "zero_normalised"},
        {"fill": "random", "ranking": "patch"},
        {"fractions": "attcat"},
        {"metrics": ["saco"], "num_groups": 5},
    ],
)
def test_what_is_right_is_not_refused(tmp_path, options):
    done = run(tmp_path / "out", metrics={"faithfulness": options})
    # The trainer of this file was reached.
    assert len(done.failures()) == 1 and "training has started" in done.failures()[0]


def test_localisation_without_masks(tmp_path):
    images = tmp_path / "images"
    for name in "ab":
        (images / name).mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (48, 48), (index, 0, 0)).save(images / name / f"{index}.png")
    data = {"kind": "folder", "root": str(images), "image_size": 48}
    with pytest.raises(ConfigurationError, match="needs masks"):
        run(tmp_path / "out", data=data, metrics=["localisation"])
    with pytest.raises(ConfigurationError, match="unknown key 'crop'"):
        run(tmp_path / "out", data={**data, "options": {"crop": 1}})


def test_a_method_that_explains_no_model_is_told(tmp_path):
    notes = []
    run(tmp_path / "out", notes, methods=["random", "shapley"])
    assert "shapley explains none of the models" in notes


def test_native_removal_does_not_apply_to_a_plain_model(tmp_path):
    model = {**settings(tmp_path)["models"][0], "training": None}
    done = run(tmp_path, models=[model], metrics={"faithfulness": {"fill": "native"}})
    assert done.failures() == []
    assert done.rows[0].metrics["faithfulness"].status == "not applicable"


def test_attention_has_the_grid_of_its_tokens(tmp_path):
    """`grid` of a plain model is that of methods that can have one."""
    from tests.test_comparison import tiny_vit

    model = {"name": "ViT", "model": "vit", "grid": [2, 2], **STATISTICS}
    done = compare(
        settings(tmp_path, models=[model], methods=["occlusion", "attention-rollout"]),
        models={"vit": tiny_vit},
        progress=False,
    )
    assert done.failures() == []
    assert [row.facts["grid"] for row in done.rows] == [[2, 2], [3, 4]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"models": [{"name": "a", "mean": [0.5], "std": [0.5]}]}, "each of 3 channels"),
        ({"models": [{"name": "a", "mean": [0.5] * 3, "std": [1, 0, 1]}]}, "std above 0"),
        ({"models": [{"name": "/"}]}, "no name"),
        ({"methods": [""]}, "no name"),
    ],
)
def test_configurations(change, words):
    with pytest.raises(ConfigurationError, match=words):
        parse_config(settings("out", **change))


def test_names_of_any_script_are_files_of_their_own():
    assert slug("模型一") != slug("模型二") and slug("Größe/2") == "größe-2"
    assert slug("../../etc") == "etc"


# --- the folder -----------------------------------------------------------------------------------


@pytest.mark.parametrize("below", [False, True])
def test_a_folder_that_cannot_be_written(tmp_path, below):
    file = tmp_path / "file"
    file.write_text("not a folder")
    with pytest.raises(ConfigurationError, match="nothing can be written"):
        run(file / "out" if below else file)


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    first = Store(tmp_path, print)
    with first.reserved(), pytest.raises(ConfigurationError, match="another run writes to"):
        run(tmp_path)
    with first.reserved():
        pass


def test_a_killed_run_does_not_keep_the_folder(tmp_path):
    code = (
        "import sys, time; from pathlib import Path\n"
        "from shapwrap.comparison.store import Store\n"
        "with Store(Path(sys.argv[1]), print).reserved():\n"
        "    print('ready', flush=True); time.sleep(60)\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        with (
            pytest.raises(ConfigurationError, match="another run"),
            Store(tmp_path, print).reserved(),
        ):
            pass
    finally:
        os.kill(other.pid, signal.SIGKILL)
        other.communicate()
    with Store(tmp_path, print).reserved():
        assert (tmp_path / ".lock").is_file()


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_piece_without_its_tensors_is_made_again(tmp_path, damage):
    notes = []
    store = Store(tmp_path, notes.append)
    store.write("maps", "a", piece=Piece("finished", {}), tensors={"x": torch.ones(9)})
    path = tmp_path / "maps" / "a.safetensors"
    assert store.holds("maps", "a", made_from={})
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-4])
    assert store.read("maps", "a", made_from={}) is None
    assert notes == ["maps / a: its .safetensors file is missing or damaged, made again"]
    assert not store.holds("maps", "a", made_from={}) and len(notes) == 1
    assert json.loads((tmp_path / "maps" / "a.json").read_text())["has_tensors"]
