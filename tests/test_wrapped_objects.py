"""Wrapped models as objects: pickled, copied, moved, compiled, in other processes."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

from shapwrap import ShapleyCLIP, ShapleyWrapper
from tests.backbones import BUILDERS, make_case, random_coalitions
from tests.clip_models import clip_model, coalitions_of, images_of, tokens
from tests.two_processes import needs_distributed, run_in_two_processes, run_python

FEW = ["vit-average-norm-registers", "eva-mixed-registers", "resnet", "own-nonlinear-head"]
FEW += ["whole-class-token", "traced-whole"]


def copies(wrapped):
    yield copy.deepcopy(wrapped)
    yield pickle.loads(pickle.dumps(wrapped))


@pytest.mark.parametrize("kind", list(BUILDERS))
@torch.no_grad()
def test_copies_of_every_kind(kind):
    case = make_case(kind)
    coalitions = random_coalitions(case, 2, seed=1, paired=True)
    expected = case.wrapped(case.images, coalitions)
    for other in copies(case.wrapped):
        assert all(map(torch.equal, other(case.images, coalitions), expected))
        assert other.report().readout == case.wrapped._wrapping.head.readout.name
        for parameter in other.parameters():
            parameter.zero_()
        assert all(map(torch.equal, case.wrapped(case.images, coalitions), expected))


@torch.no_grad()
def test_copies_at_another_stride_and_with_a_new_head():
    case = make_case("resnet", grid=(2, 3))
    model = case.wrapped.unwrap()
    wrapped = ShapleyWrapper(model, image_size=(64, 96), grid=(4, 6), num_classes=3)
    nn.init.ones_(wrapped.new_head.weight)
    expected = wrapped(case.images)
    for other in copies(wrapped):
        assert torch.equal(other(case.images), expected)
        # Strides are given back in the copy alone.
        assert ShapleyWrapper(other.unwrap(), image_size=(64, 96)).grid == (2, 3)
        assert torch.equal(wrapped(case.images), expected)


@pytest.mark.parametrize("kind", FEW)
@torch.no_grad()
def test_devices_and_precisions(kind):
    case = make_case(kind)
    wrapped, images = case.wrapped, case.images
    coalitions = random_coalitions(case, 2, seed=1, paired=True)
    expected = wrapped(images, coalitions)
    for dtype, tolerance in ((torch.float64, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02)):
        other = copy.deepcopy(wrapped).to(dtype)
        output = other(images.to(dtype), coalitions)
        assert {p.dtype for p in other.parameters()} == {dtype}
        for ours, theirs in zip(output, expected, strict=True):
            error = (ours.float() - theirs).abs().max()
            assert error <= tolerance * theirs.abs().max().clamp(min=1.0)
        values = other.attribute(images.to(dtype))
        explained = values.sum(dim=1) + other.baseline
        torch.testing.assert_close(explained, other(images.to(dtype)), atol=1e-4, rtol=1e-4)
    half = copy.deepcopy(wrapped).half()
    assert half.float()(images).dtype == torch.float32


@pytest.mark.parametrize("kind", ["vit-average-norm-registers", "resnet"])
@torch.no_grad()
def test_shapes_without_data(kind):
    case = make_case(kind)
    expected = case.wrapped(case.images)
    state = case.wrapped.state_dict()
    empty = copy.deepcopy(case.wrapped).to("meta")
    assert empty(case.images.to("meta")).shape == expected.shape
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(state)
    assert torch.equal(filled(case.images), expected)


COMPILED = """
import sys, torch
from shapwrap import ShapleyCLIP, shapley_loss
from tests.backbones import make_case, random_coalitions
from tests.clip_models import clip_model, coalitions_of, images_of, tokens

for kind in sys.argv[1:]:
    case = make_case(kind)
    coalitions = random_coalitions(case, 2, seed=1, paired=True)
    expected = case.wrapped(case.images, coalitions, paired=True)
    compiled = torch.compile(case.wrapped, backend="eager")
    output = compiled(case.images, coalitions, paired=True)
    for ours, theirs in zip(output, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    shapley_loss(output).backward()
    assert torch.equal(compiled.attribute(case.images), case.wrapped.attribute(case.images))
    torch.compiler.reset()
wrapped = ShapleyCLIP(clip_model())
given = images_of(wrapped), tokens(2), coalitions_of(wrapped)
output = torch.compile(wrapped, backend="eager")(*given, paired=True)
torch.testing.assert_close(output.values, wrapped(*given).values)
print("compiled")
"""


def test_compiled():
    # In a process of its own: dynamo cannot trace the shape checks of the tests.
    kinds = ["own-nonlinear-head", "whole-class-token"]
    assert "compiled" in run_python("-", *kinds, given=COMPILED)


def test_a_compiled_model_is_saved_as_what_it_is(tmp_path):
    wrapped = ShapleyWrapper(timm.create_model("test_resnet"), image_size=(32, 32))
    torch.compile(wrapped, backend="eager").save_pretrained(tmp_path)
    wrapped.eval()
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(ShapleyWrapper.from_pretrained(tmp_path)(images), wrapped(images))


@torch.no_grad()
def test_image_text_models():
    wrapped = ShapleyCLIP(clip_model())
    images, texts = images_of(wrapped), tokens(2)
    coalitions = coalitions_of(wrapped)
    expected = wrapped(images, texts, coalitions)
    for other in copies(wrapped):
        output = other(images, texts, coalitions)
        assert torch.equal(output.values, expected.values)
        assert torch.equal(output.text_features, expected.text_features)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        other = copy.deepcopy(wrapped).to(dtype)
        assert {p.dtype for p in other.tower.parameters()} == {dtype}
        values = other.attribute(images.to(dtype), texts)
        torch.testing.assert_close(
            values.float(), wrapped.attribute(images, texts), atol=0.02, rtol=0.05
        )
    empty = copy.deepcopy(wrapped).to("meta")
    assert all(parameter.is_meta for parameter in empty.tower.parameters())
    assert empty.encode_image(images.to("meta")).shape == wrapped.encode_image(images).shape


SPAWNED = """
import sys, torch
import torch.multiprocessing as multiprocessing
from shapwrap import ShapleyCLIP
from tests.backbones import make_case
from tests.clip_models import clip_model, images_of, tokens

def explain(rank, models, queue):
    torch.set_num_threads(1)
    with torch.no_grad():
        found = [wrapped.attribute(*given).numpy() for wrapped, given in models]
    queue.put((rank, found))
    queue.close()
    queue.join_thread()

if __name__ == "__main__":
    models = []
    for kind in ("vit-average-norm-registers", "resnet", "whole-class-token", "traced-whole"):
        case = make_case(kind)
        models.append((case.wrapped, (case.images,)))
    wrapped = ShapleyCLIP(clip_model())
    models.append((wrapped, (images_of(wrapped), tokens(2))))
    multiprocessing.set_sharing_strategy("file_system")
    queue = multiprocessing.get_context("spawn").Queue()
    context = multiprocessing.spawn(explain, (models, queue), nprocs=1, join=False)
    rank, found = queue.get(timeout=200)
    context.join()
    for (wrapped, given), values in zip(models, found, strict=True):
        with torch.no_grad():
            assert torch.equal(torch.from_numpy(values), wrapped.attribute(*given)), wrapped
    print("same in a spawned process")
"""


def test_in_spawned_processes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SPAWNED)
    assert "same in a spawned process" in run_python(str(script))


DISTRIBUTED = """
import copy, sys, torch
import torch.distributed as distributed
from torch.nn.parallel import DistributedDataParallel
from shapwrap import ShapleyCLIP, ShapleyWrapper, shapley_loss
from tests.backbones import make_case, random_coalitions
from tests.clip_models import clip_model, coalitions_of, images_of, tokens

torch.set_num_threads(1)
distributed.init_process_group("gloo")
rank = distributed.get_rank()
for kind in ("vit-average-class-token", "own-nonlinear-head", "whole-class-token"):
    torch.manual_seed(0)
    case = make_case(kind)
    coalitions = random_coalitions(case, 4, seed=1, paired=True)
    alone = copy.deepcopy(case.wrapped)
    shapley_loss(alone(case.images, coalitions, paired=True)).backward()
    split = DistributedDataParallel(case.wrapped)
    part = slice(rank, rank + 1)
    shapley_loss(split(case.images[part], coalitions[part], paired=True)).backward()
    for ours, theirs in zip(split.module.parameters(), alone.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            largest = theirs.grad.abs().max()
            assert (ours.grad - theirs.grad).abs().max() <= 1e-4 * largest.clamp(min=1.0), kind
split = DistributedDataParallel(ShapleyCLIP(clip_model()))
wrapped = split.module
output = split(images_of(wrapped), tokens(2), coalitions_of(wrapped), paired=True)
shapley_loss(output.for_texts()).backward()
# Saved by one process, loaded by both.
import timm
wrapped = ShapleyWrapper(timm.create_model("test_resnet"), image_size=(32, 32)).eval()
split = DistributedDataParallel(wrapped)
if rank == 0:
    split.module.save_pretrained(sys.argv[1])
distributed.barrier()
loaded = ShapleyWrapper.from_pretrained(sys.argv[1])
# DDP has given every process the weights of the first.
assert torch.equal(loaded(torch.ones(1, 3, 32, 32)), split(torch.ones(1, 3, 32, 32)))
# One write: two processes share the stream.
sys.stdout.write(f"process {rank} done\\n")
distributed.barrier()
distributed.destroy_process_group()
"""


@needs_distributed
def test_in_processes_that_train_together(tmp_path):
    said = run_in_two_processes(DISTRIBUTED, tmp_path, str(tmp_path / "saved"))
    assert "process 0 done" in said and "process 1 done" in said
