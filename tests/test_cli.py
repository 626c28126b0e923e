"""The command, as a person types it."""

import json

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from shapwrap.cli import app as application
from shapwrap.cli.app import app, parse_pair
from shapwrap.errors import ArgumentError
from tests.test_data import write_folder


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def _run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _fine(*arguments):
    result = _run(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def test_inspect():
    output = _fine("inspect", "test_vit")
    assert "token-removal" in output
    assert "class-token" in output
    assert "minus the baseline" in " ".join(output.split())
    assert "fine-tune before use" in _fine("inspect", "cait_xxs24_224", "--image-size", "64")
    assert "14 x 14" in _fine("inspect", "torchvision:resnet18", "--grid", "14")
    assert "zero-mask" in _fine("inspect", "test_resnet", "--num-classes", "3")


def test_train_resume_and_explain(tmp_path):
    data = write_folder(tmp_path / "data", count=10)
    out = tmp_path / "run"
    options = ("--model", "test_resnet", "--data", data, "--out", out, "--image-size", "96x64")
    options += ("--batch-size", "4", "--learning-rate", "0.001")
    assert "accuracy" in _fine("train", *options, "--epochs", "2")
    names = {path.name for path in out.iterdir()}
    assert {
        "shapwrap.json",
        "model.safetensors",
        "history.jsonl",
        "config.json",
        "README.md",
    } <= names
    AcceleratorState._reset_state(reset_partial_state=True)
    records = (out / "history.jsonl").read_text().splitlines()
    _fine("train", *options, "--epochs", "2", "--resume")
    assert (out / "history.jsonl").read_text().splitlines() == records

    AcceleratorState._reset_state(reset_partial_state=True)
    settled = tmp_path / "settled"
    options = tuple(settled if option is out else option for option in options)
    options += ("--batch-size", "1", "--epochs", "2", "--shapley-weight", "auto")
    said = _fine("train", *options)
    budget = json.loads((settled / "history.jsonl").read_text().splitlines()[-1])
    assert budget["kind"] == "budget"
    assert f"accuracy {budget['accuracy']:.3f}" in said

    picture = data / "cat" / "cat1.png"
    figures = tmp_path / "figures"
    output = _fine("explain", "--checkpoint", out, picture, picture, "--out", figures)
    assert "logit" in output
    assert {p.name for p in figures.iterdir()} == {
        "cat1.png",
        "cat1.json",
        "cat1-2.png",
        "cat1-2.json",
    }
    record = json.loads((figures / "cat1.json").read_text())
    assert record["class"] in ("cat", "dog")
    assert record["grid"] == [3, 2]
    assert len(record["values"]) == 3
    assert record["efficiency_gap"] < 1e-4
    assert sum(map(sum, record["values"])) == pytest.approx(record["explained"], abs=1e-4)
    _fine("explain", "--checkpoint", out, picture, "--out", figures, "--target", "dog")
    assert json.loads((figures / "cat1.json").read_text())["class"] == "dog"

    result = _run("train", *options, "--epochs", "2", "--resume", "--grid", "6x4")
    assert "other settings" in str(result.exception)
    settings = (out / "shapwrap.json").read_text()
    result = _run("train", *options, "--epochs", "1")
    assert "earlier run" in str(result.exception)
    assert (out / "shapwrap.json").read_text() == settings
    weights = ("train", *options[:4], "--out", tmp_path / "new", "--weights")
    for arguments, words in (
        ((*weights, tmp_path / "nothing.pth"), "is no file"),
        ((*weights, picture, "--pretrained"), "both given"),
        (("explain", "--checkpoint", tmp_path, picture), "has no config.json"),
        (("explain", "--checkpoint", out, out / "history.jsonl"), "cannot be read as an image"),
        (("explain", "--checkpoint", out, picture, "--target", "cow"), "classes: cat, dog"),
    ):
        result = _run(*arguments)
        assert result.exit_code == 1
        assert words in str(result.exception)


def test_weights_from_a_file(tmp_path):
    model = timm.create_model("test_vit2", num_classes=1000)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    data = write_folder(tmp_path / "data")
    out = tmp_path / "run"
    _fine(
        *("train", "--model", "test_vit2", "--data", data, "--out", out),
        *("--weights", tmp_path / "weights.safetensors", "--max-steps", "1"),
        *("--learning-rate", "0"),
    )
    stored = load_file(out / "model.safetensors")
    assert torch.equal(stored["model.blocks.0.attn.qkv.weight"], model.blocks[0].attn.qkv.weight)


def test_torchvision_weights_of_another_number_of_classes(tmp_path):
    import torchvision

    model = torchvision.models.resnet18()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    data = write_folder(tmp_path / "data")
    options = ("--model", "torchvision:resnet18", "--image-size", "64", "--max-steps", "1")
    options += ("--learning-rate", "0", "--data", data, "--weights", tmp_path / "weights.pth")
    output = _fine("train", *options, "--out", tmp_path / "run")
    assert "random weights" not in output
    stored = load_file(tmp_path / "run" / "model.safetensors")
    assert torch.equal(stored["model.layer1.0.conv1.weight"], model.layer1[0].conv1.weight)
    assert stored["model.fc.weight"].shape == (2, 512)


def test_demo(tmp_path, monkeypatch):
    for settings in (application.demonstration.PLAIN, application.demonstration.SHAPLEY):
        monkeypatch.setitem(settings, "epochs", 1)
    output = _fine("demo", "--out", tmp_path, "--train-images", "32", "--test-images", "12")
    assert "localisation hit rate" in output
    record = json.loads((tmp_path / "results.json").read_text())
    for when in ("before", "after"):
        assert record[when].keys() >= {"accuracy", "skill", "localisation_hit_rate"}
        assert record[when]["efficiency_gap"] < 1e-3
    assert len(list(tmp_path.glob("explanation-*.png"))) == 3


def test_errors_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["shapwrap", "inspect", "no_such_model"])
    with pytest.raises(SystemExit) as exit_:
        application.run()
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("shapwrap: 'no_such_model' is no timm model")
    assert "Traceback" not in error


def test_sizes():
    assert parse_pair(None) is None
    assert parse_pair("14") == (14, 14)
    assert parse_pair("12x16") == (12, 16)
    for bad in ("", "x", "0", "3x4x5", "a"):
        with pytest.raises(ArgumentError, match="is no size"):
            parse_pair(bad)


def test_version():
    from shapwrap import __version__

    assert _fine("--version").strip() == __version__
