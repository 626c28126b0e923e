"""What kills runs: each leaves everything saved as it was, and the run says what happened."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader, TensorDataset

from shapwrap import Trainer, TrainerConfig
from shapwrap.errors import (
    CheckpointError,
    TrainingError,
)
from shapwrap.training import checkpoint, checkpoint_folder
from shapwrap.training.faults import CheckpointWarning, TrainingWarning
from tests.backbones import make_case

CLASSES = 5


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """As in the processes that are killed: bits depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(_one_thread, tmp_path_factory):
    """Records and weights of a run that nothing disturbs."""
    trainer = _trainer(tmp_path_factory.mktemp("whole"))
    records = trainer.fit()
    AcceleratorState._reset_state(reset_partial_state=True)
    return records, _weights(trainer)


def _images(count=12):
    images = torch.randn(count, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    return TensorDataset(images, torch.arange(count) % CLASSES)


def _trainer(folder, data=None, seed=0, **settings):
    torch.manual_seed(seed)
    wrapped = make_case("vit-class-token", batch=2).wrapped
    data = DataLoader(_images(), batch_size=4, shuffle=True) if data is None else data
    settings = {"epochs": 2, "checkpoint_every": 1, "log_every": 1, "progress": False, **settings}
    return Trainer(wrapped, data, config=TrainerConfig(output_dir=folder, **settings))


def _weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.wrapped.state_dict().items()}


def _same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def _contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- killed ---------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import torch
from tests.test_faults import _trainer
from shapwrap.training import checkpoint, checkpoint_folder

folder, moment, count = sys.argv[1:]
left = int(count)


def dying(original):
    def call(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    return call


if moment == "step":
    torch.optim.AdamW.step = dying(torch.optim.AdamW.step)
elif moment == "file":
    checkpoint.save_file = dying(checkpoint.save_file)
elif moment == "manifest":
    checkpoint_folder._described = dying(checkpoint_folder._described)
else:
    checkpoint_folder.shutil.rmtree = dying(checkpoint_folder.shutil.rmtree)
_trainer(folder).fit()
"""


@pytest.mark.parametrize(
    ("moment", "count"), [("step", 5), ("file", 6), ("manifest", 4), ("removal", 1)]
)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, whole, moment, count):
    """In a step, in the middle of a checkpoint, before its manifest, while old ones are removed."""
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "parts"), moment, str(count)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=200,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    found = checkpoint.checkpoints(tmp_path / "parts")
    assert found and int(found[-1].name[-1]) < 6, "it died before its end"
    expected, weights = whole
    parts = _trainer(tmp_path / "parts")
    assert parts.fit(resume=True) == expected
    assert _same(weights, _weights(parts))
    assert not list((tmp_path / "parts").glob(".partial-*"))


# --- full disk ------------------------------------------------------------------------------------


def test_a_full_disk_costs_no_saved_checkpoint(tmp_path, whole, monkeypatch):
    original, calls = checkpoint.save_file, []

    def full(tensors, path, **options):
        calls.append(path)
        if len(calls) in (6, 7):
            # The second file of one checkpoint, the first of the next.
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(tensors, path, **options)

    monkeypatch.setattr(checkpoint, "save_file", full)
    trainer = _trainer(tmp_path / "parts")
    with pytest.warns(CheckpointWarning, match=r"No space left.*The run goes on") as said:
        records = trainer.fit()
    assert len(said) == 2
    failed = [record for record in records if record["kind"] == "checkpoint_not_written"]
    assert [record["step"] for record in failed] == [3, 4]
    assert _same(_weights(trainer), whole[1])
    assert [p.name[-1] for p in checkpoint.checkpoints(tmp_path / "parts")] == ["5", "6"]
    lines = (tmp_path / "parts" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == records


def test_a_disk_that_stays_full(tmp_path, monkeypatch):
    original = checkpoint.save_file

    def full(tensors, path, **options):
        if "000004" in str(path) or "000005" in str(path) or "000006" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(tensors, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        trainer = _trainer(tmp_path)
        with (
            pytest.warns(CheckpointWarning, match="No space"),
            pytest.raises(CheckpointError, match=r"has finished.*step-00000003 is whole"),
        ):
            trainer.fit()
    assert [p.name[-1] for p in checkpoint.checkpoints(tmp_path)] == ["2", "3"]
    again = _trainer(tmp_path)
    again.fit(resume=True)
    assert _same(_weights(again), _weights(trainer)), "the model in memory is the finished one"


def test_a_limit_of_the_system_on_the_size_of_files(tmp_path):
    """Not a simulated error: the system refuses to write on, in safetensors and in Python."""
    trainer = _trainer(tmp_path, checkpoint_every=3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with (
            pytest.warns(CheckpointWarning, match="could not be written"),
            pytest.raises(CheckpointError, match="No checkpoint was written before"),
        ):
            trainer.fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert [path.name for path in tmp_path.iterdir()] == ["history.jsonl"]


def test_a_history_that_cannot_be_written_catches_up(tmp_path, monkeypatch):
    original, failures = Path.open, [2, 3]
    appended = []

    def open_file(path, mode="r", **options):
        if path.name == "history.jsonl" and mode == "a":
            appended.append(path)
            if len(appended) in failures:
                with original(path, mode, **options) as file:
                    file.write('{"kind": "tr')
                raise OSError(errno.ENOSPC, "No space left on device")
        return original(path, mode, **options)

    monkeypatch.setattr(Path, "open", open_file)
    with pytest.warns(TrainingWarning, match=r"history.jsonl cannot be written"):
        records = _trainer(tmp_path).fit()
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == records
    assert len(records) == 6


def test_a_damaged_history_does_not_stop_a_run(tmp_path, whole):
    expected = whole[0]
    first = _trainer(tmp_path / "parts", checkpoint_every=4)
    _stop_after(first, 5)
    path = tmp_path / "parts" / "history.jsonl"
    path.write_text(path.read_text().splitlines()[0] + '\n{"kind": "tra')
    with pytest.warns(TrainingWarning, match="of 4 records .* only the first 1"):
        found = _trainer(tmp_path / "parts", checkpoint_every=4).fit(resume=True)
    assert found == [expected[0], *expected[4:]]


@pytest.fixture(scope="module")
def stopped_run(_one_thread, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    _stop_after(_trainer(folder), 4)
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


class Stopped(Exception):
    pass


def _stop_after(trainer, step):
    original = trainer._after_step

    def after_step(position, window, bar):
        original(position, window, bar)
        if position.step == step:
            raise Stopped

    trainer._after_step = after_step
    with pytest.raises(Stopped):
        trainer.fit()


# --- damaged checkpoints --------------------------------------------------------------------------


def _cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def _changed(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


DAMAGE = [
    ("model.safetensors", _cut, "model.safetensors has .* bytes, expected"),
    ("state.json", Path.unlink, "state.json is missing"),
    ("manifest.json", Path.unlink, "it has no manifest.json"),
    ("manifest.json", _cut, "its manifest.json cannot be read"),
    ("manifest.json", lambda path: path.write_text("[1]"), "its manifest.json cannot be read"),
]


@pytest.mark.parametrize(("name", "damage", "words"), DAMAGE)
def test_the_newest_whole_checkpoint_is_used(tmp_path, whole, name, damage, words):
    expected, weights = whole
    _stop_after(_trainer(tmp_path / "parts"), 4)
    newest = tmp_path / "parts" / "step-00000004"
    damage(newest / name)
    assert [p.name[-1] for p in checkpoint.checkpoints(tmp_path / "parts")] == ["3"]
    parts = _trainer(tmp_path / "parts")
    with pytest.warns(CheckpointWarning, match=f"step-00000004 is not whole .*{words}"):
        records = parts.fit(resume=True)
    assert _same(weights, _weights(parts))
    said = [record for record in records if record["kind"] == "checkpoint_skipped"]
    assert [(r["checkpoint"], r["step"]) for r in said] == [("step-00000004", 3)]
    assert [r for r in records if r not in said] == expected
    assert [p.name[-1] for p in checkpoint.checkpoints(tmp_path / "parts")] == ["5", "6"]


@pytest.mark.parametrize("name", checkpoint_folder.FILES)
def test_a_changed_file_is_refused(tmp_path, name):
    _stop_after(_trainer(tmp_path), 4)
    newest = tmp_path / "step-00000004"
    _changed(newest / name)
    before = _contents(newest)
    trainer = _trainer(tmp_path, seed=1)
    weights = _weights(trainer)
    with pytest.raises(CheckpointError, match=rf"{name} is not the file that was written"):
        trainer.fit(resume=True)
    assert _same(weights, _weights(trainer))
    assert _contents(newest) == before


def _manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_other_refusals(tmp_path):
    _stop_after(_trainer(tmp_path), 4)
    folder = tmp_path / "step-00000004"
    _manifest(folder, format=7)
    with pytest.raises(CheckpointError, match=r"has format 7, written by .*expected format 1"):
        _trainer(tmp_path).fit(resume=True)
    _manifest(folder, format=1)
    # A whole checkpoint whose digests agree, but which nobody wrote like this.
    (folder / "state.json").write_text('{"model": {"$tensor": "no"}}')
    _manifest(folder, files=checkpoint_folder._described(folder))
    with pytest.raises(CheckpointError, match=r"cannot be read .KeyError"):
        _trainer(tmp_path).fit(resume=True)
    for path in tmp_path.glob("step-*/manifest.json"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
        _trainer(tmp_path).fit(resume=True)
    with pytest.raises(TrainingError, match="earlier run"):
        _trainer(tmp_path).fit()
    (folder / "position-0.pt").write_bytes(b"a pickle")
    with pytest.raises(CheckpointError, match="earlier development version, with pickled files"):
        _trainer(tmp_path).fit(resume=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree.update(model=[]),
        lambda tree: tree["training"].pop("position"),
        lambda tree: tree["training"].pop("scheduler"),
        lambda tree: tree["training"]["position"].update(split={"processes": 1}),
        lambda tree: tree["processes"].clear(),
        lambda tree: (
            tree["processes"][0].update(coalitions=tree["processes"][0]["random"]["torch"])
            or tree["processes"][0]["random"].update(torch=1)
        ),
    ],
)
def test_states_of_another_form_are_refused(tmp_path, stopped_run, change):
    """Whole, with the right digests, and made by nobody's training."""
    folder = shutil.copytree(stopped_run, tmp_path / "run") / "step-00000004"
    tree = json.loads((folder / "state.json").read_text())
    change(tree)
    (folder / "state.json").write_text(json.dumps(tree))
    _manifest(folder, files=checkpoint_folder._described(folder))
    with pytest.raises(CheckpointError, match=r"step-00000004 (cannot be read|is of another)"):
        _trainer(tmp_path / "run").fit(resume=True)


def test_another_model_is_refused(tmp_path):
    _stop_after(_trainer(tmp_path), 2)
    wrapped = make_case("resnet", grid=(2, 2)).wrapped
    config = TrainerConfig(output_dir=tmp_path, epochs=2, checkpoint_every=1, progress=False)
    other = Trainer(wrapped, DataLoader(_images(), batch_size=4, shuffle=True), config=config)
    with pytest.raises(CheckpointError, match=r"of another model: it lacks"):
        other.fit(resume=True)
