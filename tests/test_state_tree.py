"""State without pickles: everything comes back as it was, and nothing else is taken."""

import json
import random
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from shapwrap.errors import TrainingError
from shapwrap.saving.state_tree import pack, unpack
from shapwrap.training.random_stream import RandomStream, global_states, set_global_states


def through_files(state):
    packed = pack(state)
    return unpack(json.loads(json.dumps(packed.tree)), load(save(packed.tensors)))


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        pairs = zip(one, other, strict=True)
        return type(one) is type(other) and all(equal(a, b) for a, b in pairs)
    return type(one) is type(other) and (one == other or one != one)


def test_everything_comes_back():
    state = {
        "plain": [None, True, 3, 2**70, 0.1, 1e-300, "text", [], {}, ()],
        "not finite": [float("inf"), float("-inf"), float("nan")],
        "tuple": (1, (2, [3, (4,)])),
        "by number": {0: {"step": torch.tensor(3.0)}, 7: {}},
        "tagged": {"$tensor": "a", "$tuple": [1]},
        "mixed/keys": {"a": {"b/c": torch.ones(1)}, "a/b": {"c": torch.zeros(1)}},
        "halves": torch.randn(3, 4).to(torch.bfloat16).t(),
        "masks": torch.tensor([True, False]),
        "none": torch.empty(0, 3),
        "bytes": torch.Generator().get_state(),
        "array": np.arange(6, dtype=np.uint32).reshape(2, 3)[:, ::2],
        "scalar": torch.tensor(5),
    }
    assert equal(state, through_files(state))
    assert type(through_files({"a": np.float32(0.5)})["a"]) is float
    assert through_files(OrderedDict(a=1)) == {"a": 1}


def test_tied_and_overlapping_tensors():
    weight = torch.randn(4, 6)
    state = {"one": weight, "tied": weight.detach(), "view": weight[1:], "turned": weight.t()}
    packed = pack(state)
    assert sorted(packed.tensors) == ["one", "turned", "view"]
    assert packed.tensors["view"].untyped_storage().nbytes() == 3 * 6 * 4
    back = through_files(state)
    assert equal(state, back)
    assert back["tied"] is back["one"]
    assert pack(state, keep=False).tensors == {}


def test_random_states_come_back():
    def draw():
        return random.random(), np.random.rand(), float(torch.rand(()))  # noqa: NPY002

    kept = global_states()
    try:
        draw()
        state = through_files(global_states())
        expected = [draw() for _ in range(700)]
        set_global_states(state)
        assert [draw() for _ in range(700)] == expected
    finally:
        set_global_states(kept)


def test_an_epoch_of_the_data_begins_where_seed_and_epoch_say():
    def drawn(seed, epochs):
        stream, found = RandomStream(seed), []
        for epoch in epochs:
            stream.start(epoch)
            with stream.active():
                found.append((random.random(), float(torch.rand(()))))
        return found

    before = global_states()
    first, second = drawn(1, [0, 1])
    assert drawn(1, [1]) == [second] != [first]
    assert drawn(2, [0]) != [first]
    assert equal(before, global_states())


class Own:
    pass


@pytest.mark.parametrize(
    "odd",
    [
        Own(),
        {1, 2},
        b"bytes",
        torch.float32,
        {(1, 2): 3},
        np.array([Own()]),
        torch.eye(2).to_sparse(),
    ],
)
def test_refusals(odd):
    with pytest.raises(TrainingError, match=r"at 'state/deep/0'"):
        pack({"deep": [odd]}, "state")


def test_what_was_not_packed():
    with pytest.raises(ValueError, match=r"'\$pickle' is no kind"):
        unpack({"$pickle": "gASV"}, {})
    with pytest.raises(KeyError):
        unpack({"$tensor": "a"}, {})
    with pytest.raises(TypeError):
        unpack({"$array": "a", "dtype": "no such", "shape": [1]}, {"a": torch.zeros(1)})
