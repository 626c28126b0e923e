"""The training loop: what it minimises, and that stopping changes nothing."""

import json
import math
from itertools import pairwise

import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader, Dataset, TensorDataset

from shapwrap import ShapleyOutput, ShapleyWrapper, Trainer, TrainerConfig, shapley_loss
from shapwrap.errors import ArgumentError, BackboneTypeError, TrainingError
from shapwrap.training import checkpoint
from shapwrap.training.objective import Objective
from shapwrap.training.optimizer import make_optimizer, make_scheduler, parameter_groups
from tests.backbones import NUM_CLASSES, make_case

SIZE = (12, 16)


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """accelerate keeps one state a process; each test starts as a new process would."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Augmented(Dataset):
    """Draws from torch's global state, as augmentation does."""

    def __init__(self, length=20):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(length, 3, *SIZE, generator=generator)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index] + 0.1 * torch.randn(3, *SIZE), index % NUM_CLASSES


def _wrapped(dropout=0.1):
    torch.manual_seed(1)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=SIZE,
        patch_size=4,
        embed_dim=24,
        depth=2,
        num_heads=3,
        num_classes=NUM_CLASSES,
        global_pool="avg",
        drop_rate=dropout,
        proj_drop_rate=dropout,
    )
    return ShapleyWrapper(model)


def _trainer(folder, wrapped=None, data=None, **settings):
    wrapped = wrapped or _wrapped()
    settings = {"learning_rate": 1e-3, "log_every": 1, "progress": False, "epochs": 4, **settings}
    data = data if data is not None else DataLoader(Augmented(), batch_size=4, shuffle=True)
    validation = DataLoader(TensorDataset(Augmented().images, torch.arange(20) % 5), batch_size=7)
    return Trainer(wrapped, data, validation, config=TrainerConfig(output_dir=folder, **settings))


class Killed(Exception):
    """Stands for a process that dies."""


def _kill_at(monkeypatch, step):
    original = Trainer._after_step

    def after_step(self, position, window, bar):
        original(self, position, window, bar)
        if position.step == step:
            raise Killed

    monkeypatch.setattr(Trainer, "_after_step", after_step)


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    expected = _trainer(tmp_path, epochs=1, checkpoint_every=1).fit()
    assert expected[-1]["kind"] == "validation"
    assert _trainer(tmp_path, epochs=1, checkpoint_every=1).fit(resume=True) == expected


@pytest.mark.parametrize(
    ("every", "dies_at", "steps", "accumulation"),
    [(5, 5, 10, 1), (5, 8, 13, 1), (3, 4, 10, 1), (2, 3, 7, 2)],
)
def test_resuming_is_exact(tmp_path, monkeypatch, every, dies_at, steps, accumulation):
    """10 steps = 5 + restart + 5, bit for bit: data order, augmentation, dropout, coalitions."""
    settings = {"max_steps": steps, "checkpoint_every": every, "accumulation": accumulation}
    settings |= {"epochs": 4 * accumulation}
    whole = _trainer(tmp_path / "whole", **settings)
    expected = whole.fit()
    with monkeypatch.context() as patch:
        _kill_at(patch, dies_at)
        with pytest.raises(Killed):
            _trainer(tmp_path / "parts", **settings).fit()
    parts = _trainer(tmp_path / "parts", **settings)
    found = parts.fit(resume=True)
    assert found == expected
    for name, tensor in whole.wrapped.state_dict().items():
        assert torch.equal(tensor, parts.wrapped.state_dict()[name]), name
    lines = (tmp_path / "parts" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == expected


def test_runs_repeat_and_leave_random_states_alone(tmp_path):
    before = torch.get_rng_state()
    histories = []
    for run in range(2):
        trainer = _trainer(tmp_path / str(run), epochs=1)
        state = torch.get_rng_state()
        histories.append(trainer.fit())
        assert torch.equal(state, torch.get_rng_state())
    assert histories[0] == histories[1]
    assert not torch.equal(before, torch.get_rng_state()), "making a model draws"


def test_checkpoints_are_whole_or_absent(tmp_path, monkeypatch):
    trainer = _trainer(tmp_path, max_steps=8, checkpoint_every=2, keep_checkpoints=2)
    trainer.fit()
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-00000006", "step-00000008"]
    monkeypatch.setattr(checkpoint, "save_file", lambda *_, **__: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        _trainer(tmp_path / "other", max_steps=10, checkpoint_every=1).fit()
    assert checkpoint.checkpoints(tmp_path / "other") == []


def test_a_run_does_not_mix_with_another(tmp_path):
    _trainer(tmp_path, max_steps=2).fit()
    with pytest.raises(TrainingError, match="earlier run, the newest step-00000002"):
        _trainer(tmp_path, max_steps=2).fit()
    with pytest.raises(TrainingError, match="total_steps"):
        _trainer(tmp_path, max_steps=4).fit(resume=True)
    with pytest.raises(TrainingError, match="shapley_weight"):
        _trainer(tmp_path, max_steps=2, shapley_weight=1.0).fit(resume=True)
    trainer = _trainer(None, max_steps=2)
    trainer.fit()
    with pytest.raises(TrainingError, match="this Trainer has trained"):
        trainer.fit()


def test_resuming_a_loader_with_generators_of_its_own(tmp_path, monkeypatch):
    def trainer(folder):
        generator = torch.Generator().manual_seed(5)
        data = DataLoader(Augmented(), batch_size=4, shuffle=True, generator=generator)
        return _trainer(folder, data=data, max_steps=13, checkpoint_every=4)

    whole = trainer(tmp_path / "whole")
    expected = whole.fit()
    with monkeypatch.context() as patch:
        _kill_at(patch, 10)
        with pytest.raises(Killed):
            trainer(tmp_path / "parts").fit()
    parts = trainer(tmp_path / "parts")
    assert parts.fit(resume=True) == expected
    for name, tensor in whole.wrapped.state_dict().items():
        assert torch.equal(tensor, parts.wrapped.state_dict()[name]), name


def _gradient_norms(batches, accumulation, monkeypatch):
    norms = []
    original = Accelerator.clip_grad_norm_

    def record(self, *arguments):
        norms.append(float(original(self, *arguments)))

    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "clip_grad_norm_", record)
        _trainer(
            None,
            _wrapped(0.0),
            batches,
            epochs=1,
            accumulation=accumulation,
            learning_rate=0.0,
            shapley_weight=0.0,
            masked_cross_entropy=0.0,
            gradient_clip=1e9,
        ).fit()
    return norms


def test_accumulated_gradients_are_means(monkeypatch):
    images, labels = Augmented(12).images, torch.arange(12) % NUM_CLASSES
    parts = [(images[i : i + 4], labels[i : i + 4]) for i in (0, 4, 8)]
    expected = [
        *_gradient_norms([(images[:8], labels[:8])], 1, monkeypatch),
        *_gradient_norms([parts[2]], 1, monkeypatch),
    ]
    assert _gradient_norms(parts, 2, monkeypatch) == pytest.approx(expected, rel=1e-4)


def test_every_validation_image_counts_during_training():
    images, labels = Augmented(16).images, torch.arange(16) % NUM_CLASSES
    data = DataLoader(Augmented(10), batch_size=4)
    config = TrainerConfig(epochs=2, progress=False)
    validation = [(images[:8], labels[:8]), (images[8:], labels[8:])]
    history = Trainer(_wrapped(), data, validation, config=config).fit()
    assert [r["images"] for r in history if r["kind"] == "validation"] == [16, 16]


def test_history_has_what_is_needed(tmp_path):
    history = _trainer(tmp_path, epochs=2, shapley_weight=10.0, shapley_ramp=0.5).fit()
    train = [record for record in history if record["kind"] == "train"]
    validation = [record for record in history if record["kind"] == "validation"]
    assert len(train) == 10
    assert len(validation) == 2
    assert {"accuracy", "skill", "residual"} <= validation[0].keys()
    assert validation[0]["images"] == 20
    assert train[-1]["shapley_weight"] == 10
    assert train[0]["shapley_weight"] == 0
    assert train[1]["shapley_weight"] == pytest.approx(10 * 0.1 / 0.5)
    assert [record["epoch"] for record in history] == [1] * 6 + [2] * 6
    assert all(math.isfinite(record["loss"]) for record in train)


def test_training_lowers_the_loss_and_lifts_skill():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 3, *SIZE, generator=generator) * 0.1
    labels = torch.arange(16) % NUM_CLASSES
    for index, label in enumerate(labels):
        images[index, :, :4, 3 * int(label) : 3 * int(label) + 3] += 2.0
    trainer = _trainer(
        None,
        _wrapped(0.0),
        [(images, labels)],
        epochs=60,
        learning_rate=3e-3,
        shapley_weight=3.0,
        validate_every=60,
    )
    before = trainer.evaluate([(images, labels)])
    trainer.fit()
    after = trainer.evaluate([(images, labels)])
    assert after["accuracy"] > max(0.9, before["accuracy"])
    assert after["skill"] > 0.1


def test_evaluate_is_accuracy_and_skill_of_all_images():
    trainer = _trainer(None)
    found = trainer.evaluate()
    again = trainer.evaluate()
    assert found == again
    images = Augmented().images
    with torch.no_grad():
        logits = trainer.wrapped.eval()(images)
    assert found["accuracy"] == pytest.approx(
        float((logits.argmax(1) == torch.arange(20) % 5).double().mean())
    )
    assert found["skill"] == pytest.approx(1 - found["residual"] / found["trivial_residual"])


def test_objective():
    output = ShapleyOutput(torch.randn(3, 5), torch.randn(3, 2, 5), torch.randn(3, 2, 5))
    targets = torch.tensor([0, 1, 4])
    config = TrainerConfig(shapley_weight=8.0, shapley_ramp=0.5, masked_cross_entropy=2.0)
    terms = Objective(config)(output, targets, config.ramped_weight(0.25))
    cross_entropy = torch.nn.functional.cross_entropy
    task = cross_entropy(output.logits, targets)
    masked = sum(cross_entropy(output.values[:, i], targets) for i in range(2)) / 2
    expected = task + 4 * shapley_loss(output) + 2 * masked
    torch.testing.assert_close(terms.total, expected)
    assert config.ramped_weight(0.0) == 0
    assert config.ramped_weight(1.0) == 8
    assert TrainerConfig(shapley_weight=8.0, shapley_ramp=0.0).ramped_weight(0.0) == 8


def test_loss_reductions_and_gradients():
    values = torch.randn(3, 2, 5, requires_grad=True)
    estimates = torch.randn(3, 2, 5, requires_grad=True)
    output = ShapleyOutput(torch.randn(3, 5), values, estimates)
    errors = (values - estimates) ** 2
    torch.testing.assert_close(shapley_loss(output, reduction="none"), errors)
    torch.testing.assert_close(shapley_loss(output), errors.mean())
    torch.testing.assert_close(shapley_loss(output, reduction="sum"), errors.sum())
    shapley_loss(output, detach_values=True).backward()
    assert values.grad is None
    assert estimates.grad is not None


def test_parameter_groups():
    wrapped = _wrapped()
    config = TrainerConfig(learning_rate=1e-3, head_multiplier=10.0, weight_decay=0.1)
    groups = parameter_groups(wrapped, config)
    where = {id(p): group for group in groups for p in group["params"]}
    model = wrapped.model
    assert len(where) == sum(p.requires_grad for p in wrapped.parameters())
    assert where[id(model.head.weight)]["lr"] == pytest.approx(1e-2)
    assert where[id(model.head.weight)]["weight_decay"] == 0.1
    assert where[id(model.head.bias)]["weight_decay"] == 0
    assert where[id(model.blocks[0].attn.qkv.weight)]["lr"] == pytest.approx(1e-3)
    assert where[id(model.pos_embed)]["weight_decay"] == 0
    for parameter in wrapped.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(TrainingError, match="all parameters are frozen"):
        parameter_groups(wrapped, config)


def test_schedule_warms_up_and_ends_at_zero():
    config = TrainerConfig(learning_rate=1.0, head_multiplier=1.0, warmup=0.25)
    optimizer = make_optimizer(_wrapped(), config)
    scheduler = make_scheduler(optimizer, config, steps=20)
    rates = []
    for _ in range(20):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[0] < rates[4] < rates[5] == pytest.approx(1.0)
    assert all(a > b for a, b in pairwise(rates[5:]))
    assert scheduler.get_last_lr()[0] == pytest.approx(0.0, abs=1e-6)


def test_clipping_and_accumulation_match_one_large_batch():
    images, labels = Augmented(8).images, torch.arange(8) % NUM_CLASSES
    states = []
    for batches, accumulation in (
        ([(images, labels)], 1),
        (
            [(images[:4], labels[:4]), (images[4:], labels[4:])],
            2,
        ),
    ):
        wrapped = _wrapped(0.0)
        _trainer(
            None,
            wrapped,
            batches,
            epochs=2,
            accumulation=accumulation,
            shapley_weight=0.0,
            masked_cross_entropy=0.0,
            gradient_clip=0.01,
            validate_every=2,
        ).fit()
        states.append(wrapped.state_dict())
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("frozen", [True, False])
def test_batch_norm(frozen):
    case = make_case("resnet", grid=(2, 2))
    case.wrapped.train()
    statistics = case.wrapped.model.bn1.running_mean.clone()
    trainer = Trainer(
        case.wrapped,
        [(case.images, torch.zeros(2).long())],
        config=TrainerConfig(epochs=1, freeze_batch_norm=frozen, progress=False),
    )
    trainer.fit()
    assert torch.equal(statistics, case.wrapped.model.bn1.running_mean) == frozen
    assert case.wrapped.model.bn1.training, "mode must be as it was"


def test_precisions_and_what_they_leave_behind():
    _trainer(None, epochs=1).fit()
    trainer = _trainer(None, epochs=1, precision="bf16")
    history = trainer.fit()
    assert math.isfinite(history[-1]["skill"])
    wrapped, images = trainer.wrapped.eval(), Augmented().images
    assert "forward" not in wrapped.__dict__
    with torch.no_grad():
        torch.testing.assert_close(
            wrapped.attribute(images).sum(1), wrapped(images), atol=1e-5, rtol=1e-5
        )
    if not torch.cuda.is_available():
        with pytest.raises(TrainingError, match="fp16 needs a GPU"):
            _trainer(None, precision="fp16")


def _labels(labels):
    return [(Augmented(4).images, labels)]


def test_soft_labels():
    images, labels = Augmented(5).images, torch.eye(NUM_CLASSES)
    trainer = _trainer(None, data=[(images, labels)], epochs=1)
    trainer.fit()
    hard = trainer.evaluate([(images, torch.arange(5))])
    assert trainer.evaluate([(images, labels)])["accuracy"] == hard["accuracy"]


def _bad_images(value):
    images, labels = Augmented(4).images, torch.arange(4) % NUM_CLASSES
    images[0, 0, 0, 0] = value
    return [(images, labels)]


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: _trainer(None, data=_bad_images(float("nan"))).fit(), "loss is not finite"),
        (lambda: _trainer(None, data=[]), "empty"),
        (lambda: _trainer(None, data=_labels(torch.full((4,), 9))).fit(), "expected 0 to 4"),
        (lambda: _trainer(None, data=_labels([0, 1, 2, 3])).fit(), "labels are list"),
        (lambda: _trainer(None, data=iter([1])), "steps_per_epoch"),
        (lambda: _trainer(None, data=[torch.zeros(2)], epochs=1).fit(), "a batch is Tensor"),
        (lambda: _trainer(None).fit(resume=True), "needs config.output_dir"),
        (lambda: _trainer("/nonexistent/x").fit(resume=True), "no checkpoint"),
        (lambda: Trainer(_wrapped(), [1], config=TrainerConfig()).evaluate(), "no validation data"),
        (
            lambda: _trainer(None, data=iter([]), steps_per_epoch=3).fit(),
            "has 0 batches, expected 3",
        ),
    ],
)
def test_refusals(act, words):
    with pytest.raises(TrainingError, match=words):
        act()


def test_other_refusals(tmp_path):
    with pytest.raises(BackboneTypeError, match="expected ShapleyWrapper"):
        Trainer(torch.nn.Linear(2, 2), [])
    for bad in (
        {"epochs": 0},
        {"num_coalitions": 3},
        {"shapley_weight": -1},
        {"warmup": 2},
        {"max_steps": 0},
        {"precision": "fp8"},
        {"distribution": "kernel"},
        {"gradient_clip": -1.0},
    ):
        with pytest.raises(ArgumentError, match=next(iter(bad))):
            TrainerConfig(**bad)


def test_a_checkpoint_is_never_written_from_a_broken_step(tmp_path):
    with pytest.raises(TrainingError, match="not finite"):
        _trainer(tmp_path, data=_bad_images(float("inf")), log_every=100, checkpoint_every=1).fit()
    assert checkpoint.checkpoints(tmp_path) == []
