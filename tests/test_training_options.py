"""Head only, layer-wise decay and averaged weights, against slow loops written here."""

import math

import pytest
import timm
import torch
import torchvision
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timm.optim import param_groups_layer_decay
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from shapwrap import ShapleyWrapper, Trainer, TrainerConfig, sample_coalitions
from shapwrap.errors import ArgumentError, TrainingError
from shapwrap.training.averaged_weights import AveragedWeights
from shapwrap.training.layer_decay import layer_scales
from shapwrap.training.optimizer import parameter_groups
from shapwrap.training.plain import fine_tune
from shapwrap.training.trainable import head_of, without_gradients
from tests.backbones import NUM_CLASSES, make_case
from tests.two_processes import needs_distributed, run_in_two_processes

SIZE = (12, 16)


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def _vit(seed=1, **options):
    torch.manual_seed(seed)
    settings = {"embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": NUM_CLASSES, **options}
    return timm.models.vision_transformer.VisionTransformer(
        img_size=SIZE, patch_size=4, global_pool="avg", **settings
    )


def _batches(num=3, size=4):
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(size, 3, *SIZE, generator=generator),
            torch.randint(NUM_CLASSES, (size,), generator=generator),
        )
        for _ in range(num)
    ]


def _config(**settings):
    return TrainerConfig(**{"epochs": 2, "progress": False, "log_every": 1, **settings})


def _copy(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


# --- the head alone ---------------------------------------------------------------------------


def test_the_head_alone_learns_on_features_without_noise():
    """The same head as a linear model on features that were computed once, in eval mode."""
    wrapped = ShapleyWrapper(_vit(drop_path_rate=0.5, proj_drop_rate=0.5, pos_drop_rate=0.5))
    model = wrapped.model.train()
    wrapped.train()
    model.blocks[0].attn.qkv.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in wrapped.named_parameters()}
    modes = {name: module.training for name, module in wrapped.named_modules()}
    before, batches = _copy(wrapped), _batches()
    config = _config(
        trainable="head",
        shapley_weight=0.0,
        masked_cross_entropy=0.0,
        warmup=0.0,
        gradient_clip=None,
        learning_rate=1e-2,
        weight_decay=0.1,
    )
    Trainer(wrapped, batches, config=config).fit()
    assert {name: p.requires_grad for name, p in wrapped.named_parameters()} == flags
    assert {name: module.training for name, module in wrapped.named_modules()} == modes
    moved = {n for n, tensor in wrapped.state_dict().items() if not torch.equal(tensor, before[n])}
    assert moved == {"model.head.weight", "model.head.bias"}

    wrapped.eval()
    weight = before["model.head.weight"].clone().requires_grad_()
    bias = before["model.head.bias"].clone().requires_grad_()
    groups = [{"params": [bias], "weight_decay": 0.0}, {"params": [weight], "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW(groups)
    for step in range(6):
        images, labels = batches[step % 3]
        with torch.no_grad():
            features = model.forward_head(model.forward_features(images), pre_logits=True)
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * 0.5 * (1 + math.cos(math.pi * step / 6))
        loss = functional.cross_entropy(features @ weight.T + bias, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(model.head.weight, weight, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(model.head.bias, bias, atol=1e-4, rtol=1e-3)


def _saved_numbers(wrapped, images, coalitions):
    """How many numbers a forward pass keeps for the backward pass, and the leaves it leads to."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        output = wrapped(images, coalitions, paired=True)
    leaves, waiting, seen = set(), [t.grad_fn for t in output], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        waiting.extend(child for child, _ in node.next_functions)
    return sum(kept), leaves


def test_a_frozen_backbone_keeps_no_graph():
    wrapped = ShapleyWrapper(_vit(depth=3)).train()
    images = torch.randn(2, 3, *SIZE)
    coalitions = sample_coalitions(2, wrapped.num_patches)
    whole, _ = _saved_numbers(wrapped, images, coalitions)
    head = {id(p) for p in wrapped.head_parameters()}
    with without_gradients([p for p in wrapped.parameters() if id(p) not in head]):
        little, leaves = _saved_numbers(wrapped, images, coalitions)
    assert leaves == head
    assert little < whole / 10


@pytest.mark.parametrize("kind", ["traced-whole", "resnet"])
def test_the_layer_of_a_readout_learns_and_statistics_do_not(kind):
    case = make_case(kind)
    case.wrapped.train()
    before = _copy(case.wrapped)
    config = _config(trainable="head", freeze_batch_norm=False, epochs=1, learning_rate=1e-2)
    Trainer(case.wrapped, [(case.images, torch.tensor([0, 1]))], config=config).fit()
    after = case.wrapped.state_dict()
    own = {id(p) for p in case.wrapped.head_parameters()}
    expected = {name for name, p in case.wrapped.named_parameters() if id(p) in own}
    assert {n for n in after if not torch.equal(after[n], before[n])} == expected
    assert ("patch_layer.weight" in expected) == (kind == "traced-whole")


def test_all_layers_of_a_head_that_was_passed_in_learn():
    head = torch.nn.Sequential(torch.nn.Linear(24, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
    wrapped = ShapleyWrapper(_vit(), head=head)
    before = _copy(wrapped)
    config = _config(trainable="head", epochs=1, learning_rate=1e-2)
    Trainer(wrapped, [(_batches()[0][0], torch.arange(4))], config=config).fit()
    moved = {n for n, t in wrapped.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {f"new_head.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")}


def test_a_plain_model_learns_by_its_head_alone():
    model = _vit()
    before = _copy(model)
    fine_tune(model, _batches(), config=_config(trainable="head", head_multiplier=1.0))
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {"head.weight", "head.bias"}
    assert all(p.requires_grad for p in model.parameters())


def test_a_frozen_head_cannot_learn_alone():
    wrapped = ShapleyWrapper(_vit())
    for parameter in wrapped.head_parameters():
        parameter.requires_grad_(False)
    with pytest.raises(TrainingError, match="no head parameters that require a gradient"):
        Trainer(wrapped, _batches(), config=_config(trainable="head"))


# --- layers -----------------------------------------------------------------------------------


def _rates(module, head=None, **settings):
    config = _config(learning_rate=1.0, head_multiplier=3.0, **settings)
    groups = parameter_groups(module, config, head)
    found = {
        id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]
    }
    assert sum(len(group["params"]) for group in groups) == len(found)
    return found


TIMM = {
    "vit": (_vit, SIZE),
    "convnext": (
        lambda: timm.models.convnext.ConvNeXt(depths=(1, 2, 1, 1), dims=(8, 8, 16, 16)),
        (64, 64),
    ),
    "resnet": (
        lambda: timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, (1, 2, 1, 1)),
        (64, 64),
    ),
}


@pytest.mark.parametrize("kind", TIMM)
@pytest.mark.parametrize("replaced", [False, True])
def test_rates_are_those_of_timm(kind, replaced):
    """Also when wrapped, and when the head that timm counts as the last layer is another one."""
    make, size = TIMM[kind]
    model = make()
    reference = param_groups_layer_decay(model, layer_decay=0.5)
    expected = {id(p): group["lr_scale"] for group in reference for p in group["params"]}
    wrapped = ShapleyWrapper(model, image_size=size, num_classes=4 if replaced else None)
    head = {id(p) for p in wrapped.head_parameters()}
    plain, found = _rates(wrapped), _rates(wrapped, layer_decay=0.5)
    assert found.keys() == plain.keys()
    for key, (rate, decay) in found.items():
        assert rate == pytest.approx(3.0 if key in head else expected[key])
        assert decay == plain[key][1]
    assert len({rate for rate, _ in found.values()}) > 4


def _layer_of_torchvision(kind, name):
    """The layer by its name, written by hand; None for the head."""
    parts = name.split(".")
    if kind == "vit":
        if name.startswith("heads"):
            return None
        return (
            1 + int(parts[2].split("_")[-1])
            if "encoder_layer_" in name
            else (3 if name.startswith("encoder.ln") else 0)
        )
    if name.startswith("fc"):
        return None
    blocks = [("layer1", "0"), ("layer2", "0"), ("layer2", "1"), ("layer3", "0"), ("layer4", "0")]
    return 1 + blocks.index((parts[0], parts[1])) if name.startswith("layer") else 0


@pytest.mark.parametrize("kind", ["vit", "resnet"])
@pytest.mark.parametrize("classes", [None, 7])
def test_layers_of_other_models_are_their_blocks(kind, classes):
    if kind == "vit":
        model = torchvision.models.VisionTransformer(16, 4, 3, 2, 16, 32, num_classes=5)
        size, last = (16, 16), 4
    else:
        block = torchvision.models.resnet.BasicBlock
        model = torchvision.models.ResNet(block, [1, 2, 1, 1], num_classes=5)
        size, last = (64, 64), 6
    names = {id(p): name for name, p in model.named_parameters()}
    wrapped = ShapleyWrapper(model, image_size=size, num_classes=classes)
    for key, (rate, _) in _rates(wrapped, layer_decay=0.5).items():
        layer = _layer_of_torchvision(kind, names[key]) if key in names else None
        assert rate == pytest.approx(3.0 if layer is None else 0.5 ** (last - layer)), names.get(
            key
        )


def test_an_image_tower_has_layers_and_its_projection_is_the_last():
    open_clip = pytest.importorskip("open_clip")
    tower = open_clip.transformer.VisionTransformer(16, 4, 24, 2, 3, 4.0, output_dim=12)
    scales = layer_scales(tower, 0.5, [])
    found = {name: scales.get(id(p), 1.0) for name, p in tower.named_parameters()}
    assert found["proj"] == 1
    assert found["ln_post.weight"] == found["transformer.resblocks.1.mlp.c_fc.weight"] == 0.5
    assert found["transformer.resblocks.0.attn.in_proj_weight"] == 0.25
    assert found["conv1.weight"] == found["class_embedding"] == 0.125
    assert found["positional_embedding"] == found["ln_pre.weight"] == 0.125


def test_the_first_step_is_as_long_as_the_layers_rate():
    """AdamW's first step has the length of the learning rate, wherever a gradient is not 0."""
    wrapped = ShapleyWrapper(_vit())
    before = {name: p.detach().clone() for name, p in wrapped.named_parameters()}
    config = _config(layer_decay=0.5, learning_rate=1e-3, max_steps=1, weight_decay=0.0, warmup=0.0)
    history = Trainer(wrapped, _batches(), config=config).fit()
    moved = {n: float((p.detach() - before[n]).abs().max()) for n, p in wrapped.named_parameters()}
    assert moved["model.head.weight"] == pytest.approx(1e-2, rel=1e-3)
    assert moved["model.blocks.1.mlp.fc2.weight"] == pytest.approx(0.5e-3, rel=1e-2)
    assert moved["model.blocks.0.mlp.fc2.weight"] == pytest.approx(0.25e-3, rel=1e-2)
    assert moved["model.patch_embed.proj.weight"] == pytest.approx(0.125e-3, rel=1e-2)
    assert history[0]["learning_rate"] == pytest.approx(0.0, abs=1e-6), "after the last step"


# --- averaged weights -------------------------------------------------------------------------


class Watched(Trainer):
    """Remembers the weights after each step, and what validation saw."""

    def _after_step(self, position, window, bar):
        self.__dict__.setdefault("steps", []).append(_copy(self.wrapped))
        super()._after_step(position, window, bar)

    def _validate(self):
        self.__dict__.setdefault("validated", []).append(_copy(self.wrapped))
        return super()._validate()


def _averages(start, steps, decay):
    """One tensor at a time, in double precision, after each step."""
    average = {name: tensor.double() for name, tensor in start.items()}
    for number, weights in enumerate(steps, start=1):
        keep = min(decay, (1 + number) / (10 + number))
        average = {n: keep * t + (1 - keep) * weights[n].double() for n, t in average.items()}
        yield average


@pytest.mark.parametrize("kind", ["vit-class-token", "resnet"])
def test_validation_and_the_finished_model_have_averaged_weights(kind):
    case = make_case(kind, batch=4)
    start = _copy(case.wrapped)
    data = [(case.images, torch.arange(4))] * 3
    config = _config(ema_decay=0.4, learning_rate=1e-2, freeze_batch_norm=False)
    trainer = Watched(case.wrapped, data, data[:1], config=config)
    history = trainer.fit()
    averages = list(_averages(start, trainer.steps, 0.4))
    final = case.wrapped.state_dict()
    pairs = list(zip(trainer.validated, averages[2::3], strict=True))
    for found, expected in ((final, averages[-1]), *pairs):
        for name, tensor in found.items():
            if tensor.is_floating_point():
                torch.testing.assert_close(tensor.double(), expected[name], atol=1e-6, rtol=1e-5)
    name = "model.bn1.running_mean" if kind == "resnet" else "model.blocks.0.norm1.weight"
    assert not torch.equal(trainer.steps[-1][name], final[name])
    last = {name: history[-1][name] for name in ("accuracy", "skill", "residual")}
    assert {name: trainer.evaluate()[name] for name in last} == last


class Killed(Exception):
    """Stands for a process that dies."""


class Dying(Trainer):
    """Dies after a step."""

    dies_at = 0

    def _after_step(self, position, window, bar):
        super()._after_step(position, window, bar)
        if position.step == self.dies_at:
            raise Killed


@pytest.mark.parametrize(
    "options",
    [
        {"ema_decay": 0.9},
        {"ema_decay": 0.9, "trainable": "head", "layer_decay": 0.5},
        {"mixup": 0.8, "cutmix": 1.0},
    ],
)
def test_resuming_is_exact(tmp_path, options):
    def trainer(folder, dies_at=0):
        data = DataLoader(
            TensorDataset(torch.cat([b[0] for b in _batches()]), torch.arange(12) % NUM_CLASSES),
            batch_size=4,
            shuffle=True,
        )
        config = _config(output_dir=folder, checkpoint_every=2, learning_rate=1e-2, **options)
        made = Dying(ShapleyWrapper(_vit(proj_drop_rate=0.1)), data, data, config=config)
        made.dies_at = dies_at
        return made

    whole = trainer(tmp_path / "whole")
    expected = whole.fit()
    with pytest.raises(Killed):
        trainer(tmp_path / "parts", dies_at=5).fit()
    parts = trainer(tmp_path / "parts")
    assert parts.fit(resume=True) == expected
    for name, tensor in whole.wrapped.state_dict().items():
        assert torch.equal(tensor, parts.wrapped.state_dict()[name]), name
    again = trainer(tmp_path / "parts")
    assert again.fit(resume=True) == expected
    assert all(
        map(torch.equal, again.wrapped.state_dict().values(), parts.wrapped.state_dict().values())
    )
    with pytest.raises(TrainingError, match="settings of the run changed"):
        options = {**options, "ema_decay": 0.99}
        trainer(tmp_path / "parts").fit(resume=True)


def test_two_runs_share_an_accelerator(tmp_path):
    """The checkpoints of the second hold nothing of the first, which need not be there later."""

    def trainer(folder, accelerator):
        config = _config(output_dir=folder, ema_decay=0.9)
        wrapped = ShapleyWrapper(_vit(seed=len(folder.name)))
        return Trainer(wrapped, _batches(), config=config, accelerator=accelerator)

    shared = Accelerator(cpu=True)
    trainer(tmp_path / "one", shared).fit()
    second = trainer(tmp_path / "second", shared)
    second.fit()
    again = trainer(tmp_path / "second", Accelerator(cpu=True))
    again.fit(resume=True)
    state = second.wrapped.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in again.wrapped.state_dict().items())


def test_averages_of_half_precision_weights_do_not_stand_still():
    module = torch.nn.Linear(2, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        module.weight.fill_(1.0)
    averages = AveragedWeights(module, 0.999)
    with torch.no_grad():
        module.weight.fill_(1.0078125)
    for _ in range(100):
        averages.update(10**9)
    expected = 1 + 0.0078125 * (1 - 0.999**100)
    assert averages.state_dict()["weight"][0].tolist() == pytest.approx([expected] * 2, abs=1e-6)
    with averages.in_place():
        assert module.weight[0, 0] == 1.0
    assert module.weight[0, 0] == 1.0078125
    other = AveragedWeights(torch.nn.Linear(3, 1), 0.9)
    with pytest.raises(TrainingError, match="differ in bias, weight"):
        averages.load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    "setting",
    [
        {"trainable": "neck"},
        {"layer_decay": 0.0},
        {"layer_decay": 1.5},
        {"ema_decay": 1.0},
        {"ema_decay": 0.0},
        {"mixup": -1.0},
        {"cutmix": -1.0},
        {"mixing_probability": 2.0},
    ],
)
def test_settings_outside_their_range(setting):
    with pytest.raises(ArgumentError, match=next(iter(setting))):
        TrainerConfig(**setting)


def test_the_head_is_told_once():
    wrapped = ShapleyWrapper(_vit(), num_classes=3)
    assert [id(p) for p in head_of(wrapped)] == [id(p) for p in wrapped.new_head.parameters()]
    assert head_of(torch.nn.Linear(2, 2)) == []


SCRIPT = """
import sys

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset

from shapwrap import Trainer, TrainerConfig
from tests.backbones import make_case

torch.set_num_threads(1)
images = torch.randn(8, 3, 12, 16, generator=torch.Generator().manual_seed(0))
data = DataLoader(TensorDataset(images, torch.arange(8) % 5), batch_size=2)


def trainer(trainable):
    torch.manual_seed(0)
    config = TrainerConfig(
        epochs=1, log_every=1, progress=False, checkpoint_every=1,
        output_dir=f"{sys.argv[1]}/{trainable}",
        ema_decay=0.9, layer_decay=0.5, mixup=0.8, cutmix=1.0, learning_rate=1e-2,
        trainable=trainable,
    )
    return Trainer(make_case("vit-class-token").wrapped, data, data, config=config)


for trainable in ("head", "all"):
    first = trainer(trainable)
    first.fit()
    flat = torch.cat([p.detach().flatten() for p in first.wrapped.parameters()])
    both = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(both, flat)
    assert torch.equal(*both), "all processes have the same averages"
    assert first.evaluate()["images"] == 8
    second = trainer(trainable)
    second.fit(resume=True)
    for one, other in zip(first.wrapped.parameters(), second.wrapped.parameters(), strict=True):
        assert torch.equal(one, other)
first.accelerator.end_training()
print("fine")
"""


@needs_distributed
def test_two_processes(tmp_path):
    printed = run_in_two_processes(SCRIPT, tmp_path, str(tmp_path))
    assert printed.count("fine") == 2
