"""What a training step costs besides arithmetic: no wait for the device, no graph break."""

import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shapwrap import ShapleyWrapper, Trainer, TrainerConfig, sample_coalitions, shapley_loss
from shapwrap.training.loss_window import LossWindow
from tests.backbones import BUILDERS, NUM_CLASSES, make_case, random_coalitions

DEVICE = "meta"
"""Tensors without values: whatever would wait for a device to know one fails on them."""


class NoReading(TorchDispatchMode):
    """Fails where a value of a device tensor would be read, or a copy would block."""

    READ = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        # A tensor of one value on the host is passed to a kernel by value.
        devices = {
            leaf.device.type
            for leaf in tree_leaves(args)
            if isinstance(leaf, torch.Tensor) and (leaf.ndim or leaf.device.type == DEVICE)
        }
        to = kwargs["device"].type if kwargs.get("device") is not None else None
        if DEVICE in devices:
            assert name not in self.READ, f"{name} waits for the device"
            assert to in (None, DEVICE), f"{name} waits for a copy to the host"
            assert devices == {DEVICE}, f"{name} copies from the host"
        elif devices and to == DEVICE:
            assert kwargs.get("non_blocking"), f"{name} waits for a copy to the device"
        return func(*args, **kwargs)


class NoUploading(TorchFunctionMode):
    """Fails where Python numbers become a tensor on the device, which is a blocking copy."""

    UPLOAD = (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        assert func not in self.UPLOAD or made.device.type != DEVICE, f"{func} uploads"
        return made


@contextmanager
def no_waiting():
    """Fails where the host would wait for the device."""
    with NoUploading(), NoReading():
        yield


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def _no_autocast_of_meta(monkeypatch):
    """torch knows no autocast of the meta device, so none is to be switched off there."""
    monkeypatch.setattr("shapwrap.wrapper.without_autocast", lambda images: nullcontext())


def _on_device(kind):
    case = make_case(kind)
    wrapped = case.wrapped.train()
    wrapped.to(DEVICE)
    labels = torch.zeros(len(case.images), dtype=torch.long, device=DEVICE)
    return wrapped, case.images.to(DEVICE), labels


@pytest.mark.parametrize(
    "wait",
    [
        lambda t: t.sum().item(),
        lambda t: bool(t.any()),
        lambda t: t.nonzero(),
        lambda t: t[t > 0],
        lambda t: t.cpu(),
        lambda t: t.tolist(),
        lambda t: torch.equal(t, t),
        lambda t: t.new_tensor([1.0, 2.0]),
        lambda t: torch.tensor([1.0, 2.0], device=t.device),
        lambda t: t[torch.tensor([0, 2])],
        lambda t: torch.zeros(3).to(DEVICE),
        lambda t: t.copy_(torch.zeros(3)),
    ],
)
def test_waiting_is_noticed(wait):
    with no_waiting(), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        wait(torch.zeros(3, device=DEVICE))


@pytest.mark.parametrize("kind", list(BUILDERS))
def test_a_step_never_waits_for_the_device(kind):
    wrapped, images, labels = _on_device(kind)
    coalitions = sample_coalitions(len(images), wrapped.num_patches)
    with no_waiting():
        output = wrapped(images, coalitions.to(DEVICE, non_blocking=True), paired=True)
        task = torch.nn.functional.cross_entropy(output.logits, labels)
        (task + shapley_loss(output)).backward()
    assert all(p.grad is not None for p in wrapped.parameters() if p.requires_grad)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ["vit-class-token", "eva-average", "resnet"])
def test_a_step_of_the_trainer_never_waits_for_the_device(kind, accumulation):
    wrapped, images, labels = _on_device(kind)
    batches = [(torch.zeros(1), torch.zeros(1, dtype=torch.long))] * 2
    wrapped.to_empty(device="cpu")
    config = TrainerConfig(
        progress=False, masked_cross_entropy=1.0, gradient_clip=1.0, accumulation=accumulation
    )
    trainer = Trainer(wrapped, batches, config=config)
    # The optimizer keeps the parameters of before, which get no gradient: what is left out here
    # is AdamW itself.
    wrapped.to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    position = SimpleNamespace(coalitions=generator, step=0, batch=0)
    window = LossWindow(lambda means: means)
    with no_waiting():
        window.add(trainer._step((images, labels), position, update=True))
        window.add(trainer._step((images, labels), position, update=False))
    gradients = [p.grad for p in wrapped.parameters() if p.requires_grad]
    assert all(gradient is not None for gradient in gradients)


COMPILED = """
import copy, sys
import torch
from torch.nn.functional import cross_entropy
from shapwrap import shapley_loss
from tests.backbones import make_case, random_coalitions

def step(wrapped, images, coalitions, labels):
    output = wrapped(images, coalitions, paired=True)
    values = output.values.flatten(0, 1)
    masked = cross_entropy(values, labels.repeat_interleave(coalitions.shape[1]))
    return cross_entropy(output.logits, labels) + shapley_loss(output) + masked

for kind in sys.argv[1:]:
    case = make_case(kind)
    case.wrapped.train()
    before = copy.deepcopy(case.wrapped.state_dict())
    coalitions = random_coalitions(case, 2, 0, paired=True)
    labels = torch.arange(len(case.images))
    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        case.wrapped.load_state_dict(before)
        case.wrapped.zero_grad()
        modes = [module.training for module in case.wrapped.modules()]
        loss = run(case.wrapped, case.images, coalitions, labels)
        loss.backward()
        assert modes == [module.training for module in case.wrapped.modules()]
        gradients = [p.grad for p in case.wrapped.parameters() if p.requires_grad]
        results.append([loss, *gradients, *case.wrapped.buffers()])
        results[-1] = [tensor.detach().clone() for tensor in results[-1]]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    torch.compiler.reset()
"""


@pytest.mark.parametrize("kind", ["vit-registers", "resnet"])
def test_a_step_compiles_without_graph_breaks(kind):
    """In train mode, batch statistics included; in a process of its own for dynamo."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, kind],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def _count_calls(modules):
    counts = dict.fromkeys(modules, 0)
    handles = [
        module.register_forward_pre_hook(lambda m, given: counts.update({m: counts[m] + 1}))
        for module in modules
    ]
    return counts, handles


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_gradient_checkpointing_recomputes_both_branches_and_changes_nothing(name):
    """Batch statistics stay those of pretraining, as the Trainer keeps them by default."""
    torch.manual_seed(0)
    if name == "vit":
        model = timm.models.vision_transformer.VisionTransformer(
            img_size=12,
            patch_size=4,
            embed_dim=24,
            depth=3,
            num_heads=3,
            num_classes=NUM_CLASSES,
            global_pool="avg",
            drop_path_rate=0.3,
        )
        blocks, size = list(model.blocks), 12
    else:
        model = timm.models.resnet.ResNet(
            timm.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=NUM_CLASSES, channels=[8] * 4
        )
        blocks, size = [model.layer1[0], model.layer3[0]], 64
    wrapped = ShapleyWrapper(model.double(), image_size=(size, size)).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    coalitions = sample_coalitions(2, wrapped.num_patches, 4)
    gradients, forwards = [], []
    for recompute in (False, True):
        wrapped.set_grad_checkpointing(recompute)
        wrapped.zero_grad()
        counts, handles = _count_calls(blocks)
        torch.manual_seed(1)
        output = wrapped(images, coalitions, paired=True)
        (shapley_loss(output) + output.logits.square().mean()).backward()
        for handle in handles:
            handle.remove()
        forwards.append(list(counts.values()))
        gradients.append([p.grad for p in wrapped.parameters() if p.requires_grad])
    # Twice without, the full image and the coalitions; each once more with recomputation.
    assert forwards == [[2] * len(blocks), [4] * len(blocks)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", ["vit-class-token", "eva-average", "resnet"])
@pytest.mark.parametrize("half", [False, True])
def test_a_step_on_cuda_never_waits(kind, half):
    case = make_case(kind)
    wrapped = case.wrapped.train().cuda()
    images = case.images.cuda()
    labels = torch.zeros(len(images), dtype=torch.long, device="cuda")
    coalitions = random_coalitions(case, 2, 0, paired=True).pin_memory()
    optimizer = torch.optim.AdamW(wrapped.parameters())

    def step():
        moved = coalitions.to("cuda", non_blocking=True)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=half):
            output = wrapped(images, moved, paired=True)
        task = torch.nn.functional.cross_entropy(output.logits, labels)
        (task + shapley_loss(output)).backward()
        torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    # Libraries that wait when they start may do so once.
    step()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    waits = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
    # The profiler itself waits once, when it ends.
    assert sum(event.name in waits for event in profile.events()) <= 1
