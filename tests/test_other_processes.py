"""One writer, and a run that goes on with another number of processes."""

import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from shapwrap.errors import TrainingError
from shapwrap.training import checkpoint
from shapwrap.training.loader_order import ordered, samples_per_batch, unseeded_samplers
from shapwrap.training.position import Position, Split
from shapwrap.training.run_state import RunState
from tests.split_runs import STEP, TOTAL, Stopped, logits, run, samples
from tests.two_processes import needs_distributed, run_in_two_processes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def network():
    """Tied weights, and a part that no gradient reaches."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4), nn.Linear(4, 4))
    made[3].requires_grad_(False)
    return made


def step_of(model, optimizer, number):
    inputs = torch.randn(3, 4, generator=torch.Generator().manual_seed(number))
    model(inputs).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def position_of(processes, process, loader=None, accumulation=1, batches=6):
    split = Split(processes, process, batches, accumulation)
    return Position(0, loader, split, {"total_steps": 12}, CPU)


SCRIPT = """
import errno
import json
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW
from torch.optim.lr_scheduler import LinearLR

from shapwrap.training import checkpoint
from shapwrap.training.run_state import RunState
from tests.split_runs import Stopped, logits, run
from tests.test_other_processes import network, position_of, step_of

torch.set_num_threads(1)
folder = Path(sys.argv[1])
accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
write = checkpoint.save_file


def save_file(tensors, path, **options):
    assert rank == 0, "one process writes"
    if "two/" in str(path) and "000002" in str(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    write(tensors, path, **options)


checkpoint.save_file = save_file

# From one process to two.
trainer = run(folder / "one", 2)
trainer.fit(resume=True)
(folder / f"one-{rank}.json").write_text(json.dumps(trainer.seen))
torch.save(logits(trainer), folder / f"one-{rank}.pt")

# The first part of a run in two, with a disk that is full for a while.
trainer = run(folder / "two", 2)
trainer.stop_after = 3
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    try:
        trainer.fit()
    except Stopped:
        pass
full = [w for w in said if "No space left" in str(w.message)]
assert len(full) == (1 if rank == 0 else 0), said
assert any(r["kind"] == "checkpoint_not_written" for r in trainer.history.records)
(folder / f"two-{rank}.json").write_text(json.dumps(trainer.seen))

# Parameters that are split among processes.
def sharded():
    model = network()
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return model, optimizer, RunState(accelerator, model, optimizer, LinearLR(optimizer))


def whole(model):
    return {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}


mesh = init_device_mesh("cpu", (2,))
model, optimizer, state = sharded()
for number in range(3):
    step_of(model, optimizer, number)
position = position_of(2, rank)
position.step = 3
checkpoint.save(accelerator, folder / "sharded", state, position, 2)
other, other_optimizer, other_state = sharded()
checkpoint.resume(accelerator, folder / "sharded", other_state, position_of(2, rank))
for one, again in ((model, optimizer), (other, other_optimizer)):
    step_of(one, again, 3)
expected, found = whole(model), whole(other)
assert all(torch.equal(expected[name], found[name]) for name in expected)
if rank == 0:
    torch.save(expected, folder / "sharded.pt")
dist.barrier()
print("fine")
"""


def _union(*parts):
    """The samples of each step, by all processes."""
    seen = {}
    for part in parts:
        for step, found in part.items():
            seen.setdefault(int(step), []).extend(found)
    return seen


def _check_epochs(seen, expected):
    assert sorted(seen) == list(range(10))
    assert {len(found) for found in seen.values()} == {STEP}
    for epoch in (range(5), range(5, 10)):
        assert sorted(number for step in epoch for number in seen[step]) == list(range(TOTAL))
    assert {step: sorted(found) for step, found in seen.items()} == expected


@needs_distributed
def test_one_process_and_two(tmp_path):
    """In the middle of an epoch, both ways: every sample once, and the same model to rounding."""
    whole = run(tmp_path / "whole", STEP)
    whole.fit()
    expected = {step: sorted(found) for step, found in whole.seen.items()}
    first = run(tmp_path / "one", STEP)
    first.stop_after = 3
    with pytest.raises(Stopped):
        first.fit()
    assert run_in_two_processes(SCRIPT, tmp_path, str(tmp_path)).count("fine") == 2

    def read(name):
        return [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]

    _check_epochs(_union(first.seen, *read("one")), expected)
    outputs = [torch.load(tmp_path / f"one-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert torch.equal(*outputs)
    # Two processes add up what one adds in another order.
    torch.testing.assert_close(outputs[0], logits(whole), atol=2e-4, rtol=1e-3)
    assert (logits(first) - logits(whole)).abs().max() > 0.01, "there was something to learn"

    # From two to one, which takes two batches for a step.
    last = run(tmp_path / "two", STEP // 2, accumulation=2)
    last.fit(resume=True)
    _check_epochs(_union(*read("two"), last.seen), expected)
    torch.testing.assert_close(logits(last), logits(whole), atol=2e-4, rtol=1e-3)
    wrong = run(tmp_path / "two", STEP, accumulation=2)
    with pytest.raises(TrainingError, match=r"settings of the run changed"):
        wrong.fit(resume=True)
    _from_shards(tmp_path)


def _from_shards(folder):
    """What FSDP wrote is a checkpoint like others."""
    model = network()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    state = RunState(Accelerator(cpu=True), model, optimizer, scheduler)
    position = position_of(1, 0)
    checkpoint.resume(Accelerator(cpu=True), folder / "sharded", state, position)
    assert position.step == 3
    step_of(model, optimizer, 3)
    expected = torch.load(folder / "sharded.pt", weights_only=True)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-6)


# --- positions ------------------------------------------------------------------------------------


def _saved(positions):
    return positions[0].shared_state(), [position.own_state() for position in positions]


def test_random_states_of_other_numbers_are_new_and_repeatable():
    before = [position_of(2, rank) for rank in range(2)]
    for position in before:
        position.step, position.epoch = 6, 1
    shared, owns = _saved(before)
    drawn = {}
    for processes in (1, 2, 3):
        for process in range(processes):
            states = []
            for _ in range(2):
                position = position_of(processes, process)
                position.load(shared, owns)
                states.append((position.coalitions.get_state(), torch.get_rng_state()))
                assert (position.step, position.epoch, position.batch) == (6, 1, 0)
            assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))
            drawn[processes, process] = [bytes(state.tolist()) for state in states[0]]
    # As many as before: each its own. Others: none that anybody had.
    for process in range(2):
        assert drawn[2, process][0] == bytes(owns[process]["coalitions"].tolist())
    assert len({states[0] for states in drawn.values()}) == 6
    # In this one process, those of the two before are one.
    others = {states[1] for (processes, _), states in drawn.items() if processes != 2}
    assert len(others | {drawn[2, 0][1]}) == 5


def test_where_an_epoch_is_shared_out_anew():
    loader = DataLoader(samples(), batch_size=2)
    assert samples_per_batch(loader) is None, "only what accelerate has prepared is known"
    prepared = Accelerator(cpu=True).prepare_data_loader(loader)
    assert samples_per_batch(prepared) == 2
    before = position_of(1, 0, prepared, accumulation=2, batches=6)
    shared = before.shared_state() | {"step": 2, "batch": 4}
    # What two processes would say: 4 samples a step, as before.
    now = position_of(2, 1, prepared, accumulation=1, batches=3)
    now._plan["samples_per_step"] = 4
    now.load(shared, [before.own_state()])
    assert now.batch == 2
    now.load(shared | {"batch": 6}, [before.own_state()])
    assert now.batch == 3
    other = position_of(2, 1, prepared, accumulation=1, batches=3)
    with pytest.raises(TrainingError, match=r"samples_per_step': \(4, 2\).*There were 1 processes"):
        other.load(shared, [before.own_state()])


class Stream(IterableDataset):
    def __iter__(self):
        yield from samples()


def test_unknown_data_is_shared_out_between_epochs_only():
    assert samples_per_batch(Accelerator(cpu=True).prepare(DataLoader(Stream()))) is None
    before = position_of(2, 0)
    before.step, before.batch = 4, 3
    shared, owns = before.shared_state(), [before.own_state()] * 2
    words = r"step 4 is in the middle of epoch 1, after 3 of 6 batches of 2 processes"
    with pytest.raises(TrainingError, match=words):
        position_of(1, 0).load(shared, owns)
    position_of(2, 1).load(shared, owns)
    position_of(1, 0).load(shared | {"batch": 0, "epoch": 1}, owns)


def test_shards_are_shared_out_between_epochs(tmp_path):
    pytest.importorskip("webdataset")
    from shapwrap.data import ImageTextShards
    from tests.shards import numbers, pixels, write_shards

    paths = write_shards(tmp_path)

    def parts(processes, batch_size, seed=4):
        options = {"batch_size": batch_size, "drop_last": False, "seed": seed}
        split = [
            ImageTextShards(paths, pixels, **options).split(rank, processes)
            for rank in range(processes)
        ]
        return split, [
            position_of(processes, rank, part, batches=len(part)) for rank, part in enumerate(split)
        ]

    streams, positions = parts(2, 3)
    for rank, (stream, position) in enumerate(zip(streams, positions, strict=True)):
        stream.skipped.load_state_dict(
            {"counts": {"odd": rank + 1}, "first": {"odd": f"key {rank}"}, "said": True}
        )
        assert position.open_epoch() == 0
        list(stream)
        position.step, position.epoch = len(stream), 1
    shared, owns = _saved(positions)
    (now,), (position,) = parts(1, 6)
    position.load(shared, owns)
    assert now.skipped.counts == {"odd": 3}
    assert now.skipped.first == {"odd": "key 0"}
    assert position.open_epoch() == 0
    found = [number for batch in now for number in numbers(batch)]
    assert sorted(found) == list(range(26))
    assert position.epoch == 1
    # In the middle: only as many processes.
    iterator = iter(streams[0])
    next(iterator)
    positions[0].batch = 1
    iterator.close()
    shared, owns = _saved(positions)
    with pytest.raises(TrainingError, match="in the middle of epoch 2"):
        parts(1, 6)[1][0].load(shared, owns)
    parts(2, 3)[1][0].load(shared, owns)
    shared["batch"] = 0
    with pytest.raises(TrainingError, match="stream of shards changed"):
        parts(1, 6, seed=5)[1][0].load(shared, owns)


def test_the_order_is_that_of_seed_and_epoch_and_nothing_is_left_behind():
    loader = DataLoader(samples(), batch_size=20, shuffle=True)
    assert unseeded_samplers(loader) == [loader.sampler]
    orders = []
    for seed in (1, 1, 2):
        state = torch.get_rng_state()
        with ordered(loader, seed):
            orders.append(list(loader.sampler))
        assert torch.equal(state, torch.get_rng_state())
        assert loader.sampler.generator is None
    assert orders[0] == orders[1] != orders[2]
    for state in (1, 2):
        # By default accelerate puts a sampler in, whose seed is the global one of the process.
        torch.manual_seed(state)
        prepared = Accelerator(cpu=True).prepare_data_loader(loader)
        with ordered(prepared, 1):
            orders.append(list(prepared.batch_sampler.sampler))
    assert orders[3] == orders[4]
    own = torch.Generator().manual_seed(3)
    loader = DataLoader(samples(), batch_size=20, shuffle=True, generator=own)
    with ordered(loader, 1):
        assert loader.sampler.generator is own
