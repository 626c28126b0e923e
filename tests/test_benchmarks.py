"""The benchmarks of cost run, and what they measure is what they say."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

FOLDER = Path(__file__).parent.parent / "benchmarks"
NAMES = ("measuring", "step", "explain", "scaling")
CPU = torch.device("cpu")


@pytest.fixture
def load(monkeypatch):
    """A script as a module, without a trace afterwards."""
    monkeypatch.syspath_prepend(FOLDER)
    with torch.random.fork_rng([]):
        yield importlib.import_module
    for name in NAMES:
        sys.modules.pop(name, None)


def test_peak_memory_counts_what_is_held_at_once(load):
    peak_memory = load("measuring").peak_memory
    million = 4_000_000

    def three_of_which_two_at_once():
        first = torch.zeros(1000, 1000)
        second = first + 1
        del first
        third = second + 1
        del second, third

    found = peak_memory(three_of_which_two_at_once, CPU)
    assert 2 * million <= found < 2.1 * million


def test_ratios_are_to_the_first_call_of_the_same_round(load, monkeypatch):
    measuring = load("measuring")
    # A machine that gets slower: round r takes 2 ** r times as long, call "b" 3 times "a".
    clock = {"now": 0.0, "unit": 1.0}
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: clock["now"])
    monkeypatch.setattr(measuring, "peak_memory", lambda call, device: 10)

    def first():
        clock["unit"] *= 2
        clock["now"] += clock["unit"]

    def second():
        clock["now"] += 3 * clock["unit"]

    found = measuring.measure({"a": first, "b": second}, 5, CPU, held={"b": 10})
    assert (found["a"].ratio, found["b"].ratio) == (1, 3)
    assert (found["b"].spread, found["b"].peak_ratio) == (0, 2)
    assert found["b"].seconds == 3 * found["a"].seconds


def test_a_step_trains_all_it_should(load):
    measuring = load("measuring")
    plain, wrapped = measuring.plain_and_wrapped("test_resnet", 4, 64, CPU)
    images = measuring.random_images(2, wrapped, CPU)
    for model, num in ((plain, 0), (wrapped, 1), (wrapped, 2)):
        step = measuring.Step(model, images, num)
        statistics = [buffer.clone() for buffer in model.buffers()]
        step()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert {id(p) for p in step.optimizer.state} == {id(p) for p in trained}
        assert all(map(torch.equal, statistics, model.buffers()))
        held = sum(p.numel() for p in trained) * 3 * 4
        assert step.held_bytes() == held + sum(b.numel() * b.element_size() for b in statistics)
    assert isinstance(plain, nn.Module) and not hasattr(plain, "num_patches")


def test_step_writes_its_table(load, tmp_path, capsys):
    file = tmp_path / "step.json"
    load("step").main(
        (
            "--models test_vit2 test_resnet --batch 4 --size 128 --classes 5 "
            f"--modes eager --precision float32 --rounds 2 --json {file}"
        ).split()
    )
    found = json.loads(file.read_text())
    assert [r["masking"] for r in found["results"]] == ["token-removal", "zero-mask"]
    for result in found["results"]:
        plain, one, pair = result["steps"]
        assert plain["ratio"] == plain["peak_ratio"] == 1
        assert one["seconds"] > 0 and pair["peak_bytes"] > one["peak_bytes"] > plain["peak_bytes"]
    # A pair is one more pass of a token model, two of a zero-masked one.
    vit, resnet = (r["steps"][2]["peak_ratio"] for r in found["results"])
    assert vit < resnet
    printed = capsys.readouterr().out
    assert "a complement pair" in printed and f"torch {torch.__version__}" in printed


def test_explain_writes_its_table(load, tmp_path):
    file = tmp_path / "explain.json"
    load("explain").main(
        (
            "--models test_vit2 --batch 2 --size 64 --classes 5 --ig-steps 3 "
            f"--coalitions 64 --precision float32 --rounds 2 --json {file}"
        ).split()
    )
    (result,) = json.loads(file.read_text())["results"]
    calls = {call["what"]: call for call in result["calls"]}
    assert list(calls) == [
        "plain forward",
        "wrapped forward",
        "predicted class",
        "all 5 classes",
        "Grad-CAM",
        "integrated gradients, 3",
        "KernelSHAP, 64",
    ]
    # The backward pass keeps what a forward pass may throw away.
    assert calls["Grad-CAM"]["peak_bytes"] > calls["predicted class"]["peak_bytes"]


def test_scaling_writes_numbers_and_a_figure_that_can_be_drawn_again(load, tmp_path):
    file, figure = tmp_path / "scaling.json", tmp_path / "scaling.png"
    scaling = load("scaling")
    scaling.main(
        (
            "--model test_vit2 --sizes 32 64 --classes 5 500 --batches 2 "
            "--coalitions 2 4 --base-size 64 --base-batch 2 --base-classes 5 "
            f"--rounds 1 --precision float32 --json {file}"
        ).split()
    )
    assert not figure.exists()
    found = json.loads(file.read_text())
    assert [(p["axis"], p[p["axis"]]) for p in found["points"]] == [
        ("size", 32),
        ("size", 64),
        ("classes", 5),
        ("classes", 500),
        ("batch", 2),
        ("coalitions", 2),
        ("coalitions", 4),
    ]
    assert [p["patches"] for p in found["points"][:2]] == [4, 16]
    assert found["points"][1]["plain_bytes"] > found["points"][0]["plain_bytes"]
    assert found["points"][-1]["bytes_ratio"] > found["points"][-2]["bytes_ratio"] > 1
    scaling.main(["--json", str(file), "--figure", str(figure), "--redraw"])
    assert figure.stat().st_size > 10_000
    assert json.loads(file.read_text()) == found
