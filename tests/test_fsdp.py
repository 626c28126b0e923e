"""FSDP2 as accelerate sets it up: a Trainer with parameters that are split among processes.

On a CPU `accelerate launch --use_fsdp` trains with DDP without a word; here accelerate is told what
it would find on GPUs, and from then on its own code runs.
"""

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader, TensorDataset

from tests.split_runs import STEP, logits, run
from tests.two_processes import needs_distributed, run_in_two_processes


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


SCRIPT = """
import shutil
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor

from tests.split_runs import Stopped, run
from tests.test_fsdp import MIXED, PLAIN, validation

torch.set_num_threads(1)
folder = Path(sys.argv[1])


def fsdp(**options):
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    made = Accelerator(cpu=True)
    AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
        fsdp_version=2, **options
    )
    assert made.is_fsdp2
    return made


def whole(trainer):
    state = trainer.wrapped.state_dict()
    split = [isinstance(tensor, DTensor) for tensor in state.values()]
    assert all(split) or trainer in (ddp, head)
    return {n: t.full_tensor() if s else t for (n, t), s in zip(state.items(), split, strict=True)}


def flags(trainer):
    return {name: p.requires_grad for name, p in trainer.wrapped.named_parameters()}


def check_same(one, other):
    assert one.seen == other.seen
    found, expected = one.history.records, other.history.records
    assert len(found) == len(expected) == 12
    for record, reference in zip(found, expected, strict=True):
        assert record.keys() == reference.keys()
        for name in set(record) - {"kind"}:
            assert abs(record[name] - reference[name]) < 1e-4 * max(1, abs(reference[name])), name
    expected = whole(other)
    for name, tensor in whole(one).items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-5, rtol=1e-4)


data = validation()
ddp = run(None, 2, val_data=data, **MIXED)
before = flags(ddp)
ddp.fit()
head = run(None, 2, val_data=data, trainable="head", **MIXED)
head.fit()
blocks = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["Block"]}
kinds = {"root": {}, "meta": {"cpu_ram_efficient_loading": True}, "block": blocks}
for name, options in kinds.items():
    split = run(folder / name, 2, accelerator=fsdp(**options), val_data=data, **MIXED)
    split.fit()
    check_same(split, ddp)
    assert flags(split) == before
split = run(None, 2, accelerator=fsdp(), val_data=data, trainable="head", **MIXED)
assert flags(split) == before
split.fit()
check_same(split, head)
assert flags(split) == before

# The first part of a run that one process ends.
parts = run(folder / "parts", 2, accelerator=fsdp(), **PLAIN)
parts.stop_after = 7
try:
    parts.fit()
except Stopped:
    pass
if parts.accelerator.is_main_process:
    shutil.rmtree(folder / "root" / "step-00000010")
parts.accelerator.wait_for_everyone()
again = run(folder / "root", 2, accelerator=fsdp(), val_data=data, **MIXED)
again.fit(resume=True)
assert sorted(again.seen) == [9]
ddp.seen = again.seen
check_same(again, ddp)
print("fine")
"""

PLAIN = {"ema_decay": 0.5, "learning_rate": 1e-3}
MIXED = {**PLAIN, "shapley_weight": 1.0, "checkpoint_every": 3}


def validation():
    images = torch.randn(8, 3, 12, 16, generator=torch.Generator().manual_seed(5))
    return DataLoader(TensorDataset(images, torch.arange(8) % 5), batch_size=2)


@needs_distributed
def test_training_split_in_two_is_that_of_ddp_and_one_process_goes_on(tmp_path):
    assert run_in_two_processes(SCRIPT, tmp_path, str(tmp_path)).count("fine") == 2
    whole = run(None, STEP, **PLAIN)
    whole.fit()
    last = run(tmp_path / "parts", STEP, **PLAIN)
    last.fit(resume=True)
    assert sorted(last.seen) == [7, 8, 9]
    torch.testing.assert_close(logits(last), logits(whole), atol=2e-4, rtol=1e-3)
