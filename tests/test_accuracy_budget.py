"""`shapley_weight="auto"`: in units of the task, moved by it, and within the accuracy budget."""

import math
from copy import deepcopy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader, Dataset

from shapwrap import ShapleyOutput, ShapleyWrapper, Trainer, TrainerConfig
from shapwrap.errors import ArgumentError, TrainingError
from shapwrap.losses import shapley_loss
from shapwrap.training.accuracy_budget import AccuracyBudget
from shapwrap.training.adaptive_weight import AdaptiveWeight
from shapwrap.training.contrastive_config import ContrastiveConfig
from shapwrap.training.faults import TrainingWarning
from tests.backbones import NUM_CLASSES, make_case
from tests.two_processes import needs_distributed, run_in_two_processes

AUTO = {
    "shapley_weight": "auto",
    "epochs": 2,
    "log_every": 2,
    "progress": False,
    "learning_rate": 1e-3,
}


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """accelerate keeps one state a process; each test starts as a new process would."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def drawn_output(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    estimates = scale * torch.randn(3, 4, 5, generator=generator)
    total = estimates[:, :2].sum(dim=1)
    estimates[:, 1::2] = total[:, None] - estimates[:, 0::2]
    values = scale * torch.randn(3, 4, 5, generator=generator)
    # The logits have a baseline, which is nothing to explain.
    return ShapleyOutput(total + 3, values.requires_grad_(), estimates)


# --- lambda ---------------------------------------------------------------------------------------


def test_lambda_is_the_weight_over_the_running_square_of_the_total():
    weight = AdaptiveWeight(start=0.3)
    squares = []
    for seed in range(4):
        output = drawn_output(seed)
        found = weight(output)
        squares.append(sum(float(one) ** 2 for one in (output.logits - 3).flatten()) / 15)
        shares = [0.95**age for age in reversed(range(len(squares)))]
        mean = sum(s * r for s, r in zip(shares, squares, strict=True)) / sum(shares)
        assert found.item() == pytest.approx(0.3 / mean, rel=1e-5)
        assert not found.requires_grad
        assert weight.last == found.item()


def test_what_an_error_costs_has_the_unit_of_the_task():
    costs = []
    for scale in (1.0, 30.0):
        output = drawn_output(0, scale)
        costs.append(AdaptiveWeight()(output) * shapley_loss(output))
    torch.testing.assert_close(*costs)


def test_a_head_without_signal_has_a_finite_weight():
    assert AdaptiveWeight(start=0.5)(drawn_output(0, scale=0.0)).item() == pytest.approx(50)


def test_the_weight_grows_while_the_task_can_bear_it():
    weight = AdaptiveWeight(start=0.1, largest=1.0, gain=6.0, tolerance=0.05)
    weight.adapt(0.0, progress=0.1)
    assert weight.weight == pytest.approx(0.1 * math.exp(0.6))
    weight.adapt(-5.0, progress=0.1)
    assert weight.weight == pytest.approx(0.1 * math.exp(1.2)), "at most by the gain"
    weight.adapt(0.05, progress=0.1)
    assert weight.weight == pytest.approx(0.1 * math.exp(1.2)), "at the tolerance it stays"
    weight.adapt(0.1, progress=0.1)
    assert weight.weight == pytest.approx(0.1 * math.exp(0.6))
    weight.adapt(50.0, progress=0.1)
    assert weight.weight == pytest.approx(0.1 * math.exp(-0.6)), "at most by twice the gain"
    for _ in range(50):
        weight.adapt(0.0, progress=0.1)
    assert weight.weight == pytest.approx(1.0), "never above the largest"


def test_a_saved_weight_goes_on():
    one = AdaptiveWeight()
    one(drawn_output(0))
    one.adapt(0.02, progress=0.3)
    other = AdaptiveWeight()
    other.load_state_dict(one.state_dict())
    assert other.weight == one.weight
    assert other.last == one.last
    torch.testing.assert_close(other(drawn_output(1)), one(drawn_output(1)))


@pytest.mark.parametrize(
    "wrong", [{"start": 0.0}, {"gain": -1.0}, {"tolerance": math.nan}, {"start": 2000.0}]
)
def test_numbers_that_make_no_weight(wrong):
    with pytest.raises(ArgumentError, match=next(iter(wrong))):
        AdaptiveWeight(**wrong)


# --- the budget -----------------------------------------------------------------------------------


class Reached:
    """What a plain run reached."""

    accuracy = 0.9

    def __init__(self, weights):
        self.weights = weights


def settle(accuracy_at, max_drop=0.0):
    """Settles a model whose accuracy is a function of how far its weights are from plain ones."""
    layer = nn.Linear(2, 1)
    plain = {name: one.detach() + 1 for name, one in layer.named_parameters()}
    trained = deepcopy(layer)

    def evaluate():
        share = (plain["bias"] - layer.bias.detach()) / (plain["bias"] - trained.bias.detach())
        return {"accuracy": accuracy_at(float(share)), "skill": float(share)}

    budget = AccuracyBudget(Reached(plain), max_drop, lambda value: value)
    return budget.settle(layer, evaluate), layer, plain, trained


def test_a_model_within_its_budget_is_left_alone():
    found, layer, _, trained = settle(lambda share: 0.9 - 0.01 * share, max_drop=0.02)
    assert found["share"] == 1
    assert found["accuracy"] == pytest.approx(0.89)
    assert found["reference_accuracy"] == 0.9
    assert torch.equal(layer.weight, trained.weight)


def test_weights_go_back_as_far_as_the_budget_asks():
    found, layer, plain, trained = settle(lambda share: 0.9 - 0.1 * max(0.0, share - 0.4))
    assert found["share"] == 0.4
    assert found["accuracy"] == pytest.approx(0.9)
    expected = plain["weight"] + found["share"] * (trained.weight - plain["weight"])
    torch.testing.assert_close(layer.weight, expected)


def test_an_image_too_few_on_the_way_does_not_end_it():
    """Where halving the interval finds nothing but the plain weights."""
    tried = []

    def accuracy_at(share):
        tried.append(round(share, 2))
        return 0.9 if tried[-1] in (0.8, 0.0) else 0.89

    found, layer, plain, trained = settle(accuracy_at)
    assert found["share"] == 0.8 and found["skill"] == pytest.approx(0.8)
    assert tried == [1.0, 0.9, 0.8]
    expected = plain["weight"] + 0.8 * (trained.weight - plain["weight"])
    torch.testing.assert_close(layer.weight, expected)


def test_what_no_run_moved_is_not_written():
    """A buffer of one number, seen as many, cannot be."""
    layer = nn.Linear(2, 1)
    layer.register_buffer("scale", torch.ones(1).expand(5))
    plain = {"weight": layer.weight.detach() + 1, "bias": layer.bias.detach() + 1}
    plain["scale"] = torch.ones(5)
    budget = AccuracyBudget(Reached(plain), 0.0, lambda value: value)
    moved = layer.weight.detach().clone()
    budget.settle(
        layer, lambda: {"accuracy": 0.9 - float(torch.equal(layer.weight, moved)), "skill": 0.0}
    )
    assert not torch.equal(layer.weight, moved)


def test_without_room_the_plain_weights_are_what_is_left():
    with pytest.warns(TrainingWarning, match="max_accuracy_drop"):
        found, layer, plain, _ = settle(lambda share: 0.9 - float(share > 0))
    assert found["share"] == 0
    assert torch.equal(layer.weight, plain["weight"])
    assert torch.equal(layer.bias, plain["bias"])


# --- runs -----------------------------------------------------------------------------------------


class Squares(Dataset):
    """Classes that a bright row tells apart, drawn anew with noise each time."""

    def __init__(self, fails_after=None):
        self.fails_after = fails_after

    def __len__(self):
        return 20

    def __getitem__(self, index):
        if self.fails_after is not None:
            self.fails_after -= 1
            if self.fails_after < 0:
                raise KeyboardInterrupt
        image = 0.3 * torch.randn(3, 12, 16)
        image[:, 2 * (index % NUM_CLASSES)] += 2
        return image, index % NUM_CLASSES


def make_trainer(directory=None, data=None, accelerator=None, **changed):
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        case = make_case("vit-class-token", batch=4, readout="auto")
    config = TrainerConfig(**{**AUTO, "output_dir": directory, **changed})
    if data is None or isinstance(data, Squares):
        data = DataLoader(data or Squares(), batch_size=4, shuffle=True)
    validation = DataLoader(Squares(), batch_size=10)
    return Trainer(case.wrapped, data, validation, config=config, accelerator=accelerator)


def weights_of(trainer):
    return {name: one.clone() for name, one in trainer.wrapped.state_dict().items()}


def test_the_reference_is_plain_training():
    trainer = make_trainer()
    trainer.fit()
    plain = make_trainer(shapley_weight=0.0, masked_cross_entropy=0.0)
    history = plain.fit()
    for name, parameter in plain.wrapped.named_parameters():
        assert torch.equal(trainer.reference.weights[name], parameter), name
    assert trainer.reference.accuracy == history[-1]["accuracy"]
    losses = {r["step"]: r["task_loss"] for r in history if r["kind"] == "train"}
    assert {step: trainer.reference.task_loss(step) for step in losses} == losses


def test_a_run_weighs_by_its_own_record():
    history = make_trainer().fit()
    records = [r for r in history if r["kind"] == "train"]
    assert [r["step"] for r in records] == [2, 4, 6, 8, 10]
    assert all(r["shapley_weight"] > 0 for r in records)
    budget = history[-1]
    assert budget["kind"] == "budget"
    assert budget["accuracy"] >= budget["reference_accuracy"] - 1e-9


def test_the_weight_follows_the_task(monkeypatch):
    trainer = make_trainer()
    asked = []
    monkeypatch.setattr(
        trainer._budget.weight, "adapt", lambda excess, progress: asked.append((excess, progress))
    )
    history = trainer.fit()
    records = [r for r in history if r["kind"] == "train"]
    expected = [r["task_loss"] - trainer.reference.task_loss(r["step"]) for r in records]
    assert [excess for excess, _ in asked] == expected
    assert [progress for _, progress in asked] == [pytest.approx(0.2)] * 5


@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_both_runs_see_the_same_images(monkeypatch, mixup):
    """With a generator of the user's own, too, which the first run moves."""
    seen = []
    forward = ShapleyWrapper.forward

    def noted(self, images, *given, **named):
        if self.training:
            seen.append(images.clone())
        return forward(self, images, *given, **named)

    monkeypatch.setattr(ShapleyWrapper, "forward", noted)
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(Squares(), batch_size=4, shuffle=True, generator=generator)
    make_trainer(data=loader, mixup=mixup).fit()
    assert len(seen) == 20
    for one, other in zip(seen[:10], seen[10:], strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(seen[0], seen[1])


def test_the_same_twice_and_no_trace():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    trainers = [make_trainer() for _ in range(2)]
    torch.set_rng_state(before)
    for trainer in trainers:
        trainer.fit()
    assert torch.equal(torch.get_rng_state(), before)
    one, other = map(weights_of, trainers)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("reads", [14, 34, 54, 74], ids=lambda reads: f"after {reads} reads")
def test_a_run_stopped_anywhere_goes_on_bit_for_bit(tmp_path, reads):
    whole = make_trainer()
    whole.fit()
    settings = {"checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, Squares(fails_after=reads), **settings).fit()
    resumed = make_trainer(tmp_path, **settings)
    history = resumed.fit(resume=True)
    expected = weights_of(whole)
    assert all(torch.equal(expected[name], one) for name, one in weights_of(resumed).items())
    assert history == whole.history.records


def test_a_finished_run_settles_again(tmp_path):
    first = make_trainer(tmp_path)
    first.fit()
    again = make_trainer(tmp_path)
    assert again.fit(resume=True) == first.history.records
    expected = weights_of(first)
    assert all(torch.equal(expected[name], one) for name, one in weights_of(again).items())


def test_an_accelerator_of_the_users_own_holds_both_runs(tmp_path):
    options = {"ema_decay": 0.5, "checkpoint_every": 2}
    expected = make_trainer(**options)
    expected.fit()
    for folder, reads in (("in plain run", 30), ("in second run", 64)):
        with pytest.raises(KeyboardInterrupt):
            make_trainer(tmp_path / folder, Squares(reads), Accelerator(cpu=True), **options).fit()
        resumed = make_trainer(tmp_path / folder, None, Accelerator(cpu=True), **options)
        resumed.fit(resume=True)
        own = weights_of(resumed)
        assert all(torch.equal(one, own[name]) for name, one in weights_of(expected).items())


@pytest.mark.parametrize("reads", [34, 64], ids=lambda reads: f"after {reads} reads")
def test_an_interrupted_trainer_goes_on(tmp_path, reads):
    data = Squares(reads)
    trainer = make_trainer(tmp_path, data, checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    data.fails_after = None
    trainer.fit(resume=True)
    whole = make_trainer(checkpoint_every=2)
    whole.fit()
    own = weights_of(trainer)
    assert all(torch.equal(one, own[name]) for name, one in weights_of(whole).items())


def test_what_is_in_the_way_is_said_before_the_plain_run(tmp_path):
    make_trainer(tmp_path, shapley_weight=1.0).fit()
    with pytest.raises(TrainingError, match="earlier run"):
        make_trainer(tmp_path).fit()
    assert not (tmp_path / "reference").exists()


def test_records_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, Squares(fails_after=50), checkpoint_every=2).fit()
    with pytest.raises(TrainingError, match=r"lacks 5 of 10.*another log_every"):
        make_trainer(tmp_path, checkpoint_every=2, log_every=1).fit(resume=True)
    settings = TrainerConfig(shapley_weight="auto", log_every=3).what_training_depends_on()
    assert settings["log_every"] == 3
    assert "log_every" not in TrainerConfig().what_training_depends_on()


def test_a_run_too_short_to_adapt_says_so():
    with pytest.warns(TrainingWarning, match=r"log_every=10 is not below the 10 steps"):
        make_trainer(log_every=10)


def test_averaged_weights_are_compared_with_averaged_weights():
    trainer = make_trainer(ema_decay=0.5)
    trainer.fit()
    plain = make_trainer(ema_decay=0.5, shapley_weight=0.0, masked_cross_entropy=0.0)
    plain.fit()
    for name, parameter in plain.wrapped.named_parameters():
        assert torch.equal(trainer.reference.weights[name], parameter), name


def test_what_auto_needs():
    case = make_case("vit-class-token", batch=4)
    loader = DataLoader(Squares(), batch_size=4)
    with pytest.raises(TrainingError, match="val_data"):
        Trainer(case.wrapped, loader, config=TrainerConfig(**AUTO))
    with pytest.raises(ArgumentError, match="'always'; expected a number or 'auto'"):
        TrainerConfig(shapley_weight="always")
    with pytest.raises(ArgumentError, match="max_accuracy_drop is 2"):
        TrainerConfig(max_accuracy_drop=2)
    with pytest.raises(ArgumentError, match="no accuracy to hold"):
        ContrastiveConfig(shapley_weight="auto")
    with pytest.raises(ArgumentError, match="fixed shapley_weight"):
        TrainerConfig(shapley_weight=1.0, max_accuracy_drop=0.1)
    with pytest.raises(TrainingError, match="train_data is generator"):
        make_trainer(data=(batch for batch in loader))
    with pytest.raises(ArgumentError, match="3 coalitions"):
        AdaptiveWeight()(ShapleyOutput(*(torch.zeros(2, 3, 5) for _ in range(3))))
    trainer = make_trainer()
    trainer.fit()
    with pytest.raises(TrainingError, match="has trained"):
        trainer.fit()


def test_a_model_that_cannot_be_copied_says_so():
    case = make_case("vit-class-token", batch=4)
    case.wrapped.model.computed = 2 * case.wrapped.model.head.weight
    loader = DataLoader(Squares(), batch_size=4)
    with pytest.raises(ArgumentError, match="deepcopy fails on VisionTransformer"):
        Trainer(case.wrapped, loader, loader, config=TrainerConfig(**AUTO))


def test_a_model_held_by_functions_is_not_copied():
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    wrapped = ShapleyWrapper(
        model,
        features=lambda images: model[1](model[0](images)),
        head=nn.Linear(8, NUM_CLASSES),
        image_size=(12, 16),
    )
    loader = DataLoader(Squares(), batch_size=4)
    with pytest.raises(ArgumentError, match="Name submodules"):
        Trainer(wrapped, loader, loader, config=TrainerConfig(**AUTO))


SCRIPT = """
import torch
import torch.distributed as dist
from tests.test_accuracy_budget import make_trainer, weights_of

torch.set_num_threads(1)
trainer = make_trainer()
history = trainer.fit()
assert history[-1]["kind"] == "budget"
parts = [trainer._budget.weight.weight, trainer.reference.accuracy, history[-1]["share"]]
own = torch.tensor(parts, dtype=torch.float64)
others = [torch.zeros_like(own) for _ in range(2)]
dist.all_gather(others, own)
assert torch.equal(others[0], others[1]), others
for name, weight in weights_of(trainer).items():
    both = [torch.zeros_like(weight) for _ in range(2)]
    dist.all_gather(both, weight)
    assert torch.equal(*both), name
dist.barrier()
trainer.accelerator.end_training()
print("fine")
"""


@needs_distributed
def test_two_processes_hold_one_budget(tmp_path):
    assert run_in_two_processes(SCRIPT, tmp_path).count("fine") == 2
