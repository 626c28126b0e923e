"""Fine-tuning of a plain model: the Trainer's schedule, written out by hand."""

import math

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from shapwrap import ShapleyWrapper, Trainer, TrainerConfig
from shapwrap.errors import ArgumentError, BackboneTypeError, TrainingError
from shapwrap.training.config import LoopConfig
from shapwrap.training.plain import fine_tune
from tests.trained_models import NUM_CLASSES, convolutional, images, stage, transformer


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """accelerate keeps one state a process; each test starts as a new process would."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def _data(num=3):
    return [(images(6, seed), torch.arange(6) % NUM_CLASSES) for seed in range(num)]


SETTINGS = {"learning_rate": 1e-3, "progress": False, "log_every": 1, "weight_decay": 0.1}


def test_every_step_is_that_of_a_loop_written_by_hand():
    config = LoopConfig(**SETTINGS, epochs=2, warmup=0.34, label_smoothing=0.1, head_multiplier=5.0)
    model, expected = transformer(), transformer()
    history = fine_tune(model, _data(), config=config)

    decayed = [p for n, p in expected.named_parameters() if p.ndim > 1 and "embed" not in n]
    decayed = [p for p in decayed if p is not expected.cls_token] + [
        expected.patch_embed.proj.weight
    ]
    known = {id(p) for p in decayed}
    head = {id(p) for p in expected.head.parameters()}
    groups = []
    for parameter in expected.parameters():
        factor = 5.0 if id(parameter) in head else 1.0
        decay = 0.1 if id(parameter) in known else 0.0
        groups.append({"params": [parameter], "weight_decay": decay, "factor": factor})
    optimizer = torch.optim.AdamW(groups)
    losses = []
    expected.train()
    for step, (batch, labels) in enumerate(_data() * 2):
        # Two steps of warm-up, then four of a cosine.
        share = (step + 1) / 3 if step < 2 else (1 + math.cos(math.pi * (step - 2) / 4)) / 2
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * share * group["factor"]
        loss = nn.functional.cross_entropy(expected(batch), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert [record["loss"] for record in history] == pytest.approx(losses, rel=1e-4)
    for found, parameter in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, parameter, rtol=1e-3, atol=1e-5)
    assert not model.training


def test_plain_and_wrapped_runs_have_one_schedule():
    config = TrainerConfig(**SETTINGS, shapley_weight=0.0, masked_cross_entropy=0.0, epochs=2)
    plain = transformer(class_token=False, global_pool="avg", fc_norm=False)
    inner = transformer(class_token=False, global_pool="avg", fc_norm=False)
    history = fine_tune(plain, _data(), config=config)
    wrapped = Trainer(ShapleyWrapper(inner), _data(), config=config).fit()
    assert [r["learning_rate"] for r in history] == [r["learning_rate"] for r in wrapped]
    assert [r["loss"] for r in history] == pytest.approx([r["loss"] for r in wrapped], rel=1e-4)
    for name, tensor in inner.state_dict().items():
        torch.testing.assert_close(plain.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)


def test_accuracy_is_measured_in_eval_mode():
    model = convolutional()
    data = [(images(7, 5, coarse=True), torch.arange(7) % NUM_CLASSES)]
    data.append((images(4, 6, coarse=True), torch.arange(4) % NUM_CLASSES))
    history = fine_tune(model, data, data, config=stage(epochs=3))
    validated = [record for record in history if record["kind"] == "validation"]
    assert [record["epoch"] for record in validated] == [1, 2, 3]
    correct = 0
    with torch.no_grad():
        for batch, labels in data:
            for i in range(len(batch)):
                correct += int(model(batch[i : i + 1]).argmax() == labels[i])
    assert validated[-1]["accuracy"] == pytest.approx(correct / 11)
    assert validated[-1]["images"] == 11


@pytest.mark.parametrize("frozen", [True, False])
def test_batch_statistics_move_only_if_asked(frozen):
    model = convolutional()
    before = model.norm.running_mean.clone()
    fine_tune(model, _data(), config=stage(freeze_batch_norm=frozen))
    assert torch.equal(model.norm.running_mean, before) == frozen


def test_a_run_is_resumed_bit_for_bit(tmp_path):
    whole, parts = transformer(proj_drop_rate=0.1), transformer(proj_drop_rate=0.1)
    fine_tune(whole, _data(), config=stage(epochs=3, output_dir=tmp_path / "whole"))
    config = stage(epochs=3, output_dir=tmp_path / "parts")
    broken = [*_data()[:2], (images(6) * torch.nan, torch.zeros(6).long())]

    class Breaks(list):
        """Good in the first epoch, broken afterwards."""

        epochs = 0

        def __iter__(self):
            self.epochs += 1
            return iter(_data() if self.epochs == 1 else broken)

    with pytest.raises(TrainingError, match="not finite"):
        fine_tune(parts, Breaks(_data()), config=config)
    fine_tune(parts, _data(), config=config, resume=True)
    for found, expected in zip(parts.parameters(), whole.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_the_head_is_found_or_given():
    fine_tune(transformer(), _data(), config=LoopConfig(**SETTINGS, max_steps=1))
    fine_tune(convolutional(), _data(), config=LoopConfig(**SETTINGS, max_steps=1), head="weigh")

    class NoLinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(NUM_CLASSES))

        def forward(self, batch):
            return batch.flatten(2).mean(2) * self.scale

    fine_tune(NoLinear(), _data(), config=stage())
    with pytest.raises(ArgumentError, match="pass head="):
        fine_tune(NoLinear(), _data())
    with pytest.raises(ArgumentError, match="'fc'"):
        fine_tune(convolutional(), _data(), head="fc")
    with pytest.raises(ArgumentError, match="a part of the model"):
        fine_tune(convolutional(), _data(), head=nn.Linear(2, 2))


def test_what_is_refused():
    with pytest.raises(BackboneTypeError, match="with Trainer"):
        fine_tune(ShapleyWrapper(transformer()), _data())
    with pytest.raises(TrainingError, match="labels do not fit"):
        fine_tune(transformer(), [(images(2), torch.tensor([0, 7]))], config=stage())
    with pytest.raises(TrainingError, match="expected a pair"):
        fine_tune(transformer(), [images(2)], config=stage())
    with pytest.raises(TrainingError, match="no batch"):
        fine_tune(transformer(), _data(), [], config=stage())


def test_another_loss():
    model = convolutional()
    history = fine_tune(
        model, _data(1), config=stage(), task_loss=lambda logits, labels: logits.square().mean()
    )
    with torch.no_grad():
        model = convolutional().train()
        expected = model(_data(1)[0][0]).square().mean().item()
    assert history[0]["loss"] == pytest.approx(expected, rel=1e-5)
