"""Losses, gradients and processes that load data, when they break in the middle of a run."""

import os
import signal

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader, Dataset

from shapwrap import Trainer
from shapwrap.errors import DataWorkerError, TrainingError
from shapwrap.training import checkpoint
from tests.test_faults import _images, _same, _trainer, _weights


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Breaking(Dataset):
    """Good images, until `breaks` says otherwise."""

    def __init__(self, flag, breaks):
        self.data, self.flag, self.breaks = _images(), flag, breaks

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        images, label = self.data[index]
        if index == 9 and self.flag.exists():
            return self.breaks(images), label
        return images, label


def _breaks_in_the_second_epoch(folder, breaks, workers=0):
    flag = folder / "broken"
    data = DataLoader(Breaking(flag, breaks), batch_size=4, num_workers=workers)
    trainer = _trainer(folder / "run", data, checkpoint_every=None)
    after_epoch = trainer._after_epoch

    def break_after_epoch(position, bar):
        after_epoch(position, bar)
        flag.touch()

    trainer._after_epoch = break_after_epoch
    return trainer


def _goes_on(folder, trainer):
    """The checkpoint of the first epoch is whole, and with good data the run ends."""
    (folder / "broken").unlink()
    assert [p.name[-1] for p in checkpoint.checkpoints(folder / "run")] == ["3"]
    stopped = trainer.history.records[-1]
    assert stopped["kind"] == "stopped"
    data = DataLoader(_images(), batch_size=4)
    again = _trainer(folder / "run", data, checkpoint_every=None)
    again.fit(resume=True)
    whole = _trainer(folder / "whole", data, checkpoint_every=None)
    whole.fit()
    assert _same(_weights(again), _weights(whole))
    return stopped


def test_a_loss_that_is_not_finite(tmp_path):
    trainer = _breaks_in_the_second_epoch(tmp_path, lambda images: images * float("nan"))
    with pytest.raises(TrainingError, match=r"not finite at or just before step 6"):
        trainer.fit()
    assert "not finite" in _goes_on(tmp_path, trainer)["reason"]


def test_a_gradient_that_is_not_finite(tmp_path):
    """A loss is finite, the weights after it are not: they take the place of no good ones."""
    calls = []

    def loss(logits, labels):
        calls.append(1)
        # 0, with a gradient that is no number.
        odd = (logits * 0).sum().sqrt() if len(calls) == 4 else 0.0
        return torch.nn.functional.cross_entropy(logits, labels) + odd

    def trainer():
        settings = {"shapley_weight": 0.0, "masked_cross_entropy": 0.0, "keep_checkpoints": 1}
        made = _trainer(tmp_path, **settings)
        return Trainer(made.wrapped, made._train_data, config=made.config, task_loss=loss)

    with pytest.raises(TrainingError, match="weights are not finite after step 4"):
        trainer().fit()
    assert [p.name[-1] for p in checkpoint.checkpoints(tmp_path)] == ["3"]
    again = trainer()
    again.fit(resume=True)
    assert all(tensor.isfinite().all() for tensor in _weights(again).values())


def test_gradients_of_before_are_not_part_of_the_first_step(tmp_path):
    whole, trainer = _trainer(tmp_path / "whole"), _trainer(tmp_path / "after")
    whole.fit()
    trainer.wrapped(_images().tensors[0]).square().sum().backward()
    trainer.fit()
    assert _same(_weights(whole), _weights(trainer))


@pytest.mark.parametrize(
    "end", [lambda _: os.kill(os.getpid(), signal.SIGKILL), lambda _: os._exit(3)]
)
def test_a_worker_that_dies(tmp_path, end):
    trainer = _breaks_in_the_second_epoch(tmp_path, end, workers=1)
    words = r"loads data died.*DataLoader worker.*step-00000003 is whole; fit\(resume=True\)"
    with pytest.raises(DataWorkerError, match=words):
        trainer.fit()
    assert _goes_on(tmp_path, trainer)["error"] == "DataWorkerError"


def test_other_errors_of_a_worker_are_its_own(tmp_path):
    def fails(images):
        raise RuntimeError("of the user's data set")

    trainer = _breaks_in_the_second_epoch(tmp_path, fails, workers=1)
    with pytest.raises(RuntimeError, match="of the user's data set") as raised:
        trainer.fit()
    assert type(raised.value) is RuntimeError
