"""Contrastive training: its losses, what it leaves alone, and that stopping changes nothing."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("open_clip")

from shapwrap import ShapleyCLIP, ShapleyWrapper, Trainer, TrainerConfig
from shapwrap.clip import ContrastiveOutput
from shapwrap.coalitions.sampling import sample_coalitions
from shapwrap.errors import ArgumentError, BackboneTypeError, TrainingError
from shapwrap.training.config import config_of_kind
from shapwrap.training.contrastive import ContrastiveTrainer
from shapwrap.training.contrastive_config import ContrastiveConfig
from shapwrap.training.contrastive_objective import ContrastiveObjective
from tests.clip_models import LENGTH, clip_model, images_of, tokenizer, tokens

SETTINGS = {"learning_rate": 1e-2, "log_every": 1, "progress": False, "epochs": 2, "warmup": 0.0}


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """accelerate keeps one state a process; each test starts as a new process would."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def wrapped(kind="vit-average", **options):
    torch.manual_seed(0)
    return ShapleyCLIP(clip_model(kind, **options), tokenizer=tokenizer)


def pairs(clip, num=8):
    return images_of(clip, num), tokens(num)


def trainer(clip=None, data=None, folder=None, validation=None, **settings):
    clip = clip or wrapped()
    data = [pairs(clip)] if data is None else data
    config = ContrastiveConfig(output_dir=folder, **{**SETTINGS, **settings})
    return ContrastiveTrainer(clip, data, validation, config=config)


def output_of(seed=0, num=3, texts=3, coalitions=2, width=5, bias=None):
    draw = torch.Generator().manual_seed(seed)
    sizes = ((num, width), (texts, width), (num, coalitions, width), (num, coalitions, width))
    image, text, values, estimates = (torch.randn(*size, generator=draw) for size in sizes)
    text = text / text.norm(dim=-1, keepdim=True)
    bias = None if bias is None else torch.tensor(bias)
    return ContrastiveOutput(image * 0.3, text, torch.tensor(7.0), bias, values, estimates)


# --- losses, against slow references ------------------------------------------------------------


def slow_clip(output):
    logits = (output.image_features.double() @ output.text_features.double().T).numpy()
    logits = logits * float(output.logit_scale)
    rows = [np.log(np.exp(row).sum()) - row[i] for i, row in enumerate(logits)]
    columns = [np.log(np.exp(column).sum()) - column[i] for i, column in enumerate(logits.T)]
    return (np.mean(rows) + np.mean(columns)) / 2


def slow_siglip(output):
    total = 0.0
    for i, image in enumerate(output.image_features):
        for j, text in enumerate(output.text_features):
            logit = float(image @ text) * float(output.logit_scale) + float(output.logit_bias)
            total += math.log1p(math.exp(-logit if i == j else logit))
    return total / len(output.image_features)


def slow_shapley(output):
    errors = []
    for values, estimates in zip(output.values, output.estimates, strict=True):
        for value, estimate in zip(values, estimates, strict=True):
            for text in output.text_features:
                errors.append(float(value @ text - estimate @ text) ** 2)
    return np.mean(errors)


@pytest.mark.parametrize(
    ("loss", "bias", "slow"), [("clip", None, slow_clip), ("siglip", -3.0, slow_siglip)]
)
@pytest.mark.parametrize("num", [1, 3])
def test_objective(loss, bias, slow, num):
    output = output_of(num=num, texts=num, bias=bias)
    config = ContrastiveConfig(loss=loss, shapley_weight=8.0, shapley_ramp=0.5)
    terms = ContrastiveObjective(config)(output, progress=0.25)
    expected, shapley = slow(output), slow_shapley(output)
    assert float(terms["contrastive_loss"]) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert float(terms["shapley_loss"]) == pytest.approx(shapley, rel=1e-5)
    assert float(terms["loss"]) == pytest.approx(expected + 4 * shapley, rel=1e-5)
    plain = ContrastiveObjective(config)(tuple(output[: 3 if bias is None else 4]), 0.0)
    assert plain.keys() == {"loss", "contrastive_loss"}
    assert float(plain["loss"]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_text_features_in_half_precision():
    output = output_of()
    half = output._replace(text_features=output.text_features.bfloat16())
    terms = ContrastiveObjective(ContrastiveConfig())(half, 1.0)
    assert {term.dtype for term in terms.values()} == {torch.float32}


def test_a_plain_model_in_half_precision():
    """Its loss is computed as that of a wrapped one, or the two would not compare."""
    output = output_of(num=6, texts=6, width=32)
    half = [tensor.bfloat16() for tensor in output[:3]]
    terms = ContrastiveObjective(ContrastiveConfig())(tuple(half), 1.0)
    assert terms["loss"].dtype == torch.float32
    rounded = output._replace(
        image_features=half[0].float(), text_features=half[1].float(), logit_scale=half[2].float()
    )
    assert float(terms["loss"]) == pytest.approx(slow_clip(rounded), rel=1e-5)


def test_history_and_gradient_of_a_step():
    """One step by hand: the same coalitions, loss and AdamW."""
    clip = wrapped("vit-token")
    batch = pairs(clip)
    by_hand = copy.deepcopy(clip).train()
    config = ContrastiveConfig(**{**SETTINGS, "epochs": 1}, shapley_ramp=0.0, gradient_clip=None)
    history = ContrastiveTrainer(clip, [batch], config=config).fit()
    draw = torch.Generator().manual_seed(config.seed)
    coalitions = sample_coalitions(8, clip.num_patches, 2, generator=draw)
    torch.manual_seed(config.seed)
    output = by_hand(*batch, coalitions)
    expected, shapley = slow_clip(detached(output)), slow_shapley(detached(output))
    assert history[0]["contrastive_loss"] == pytest.approx(expected, rel=1e-5)
    assert history[0]["shapley_loss"] == pytest.approx(shapley, rel=1e-4)
    assert history[0]["loss"] == pytest.approx(expected + 1000 * shapley, rel=1e-4)
    assert history[0]["shapley_weight"] == 1000
    ContrastiveObjective(config)(output, 1.0)["loss"].backward()
    # AdamW's first step moves each weight by the learning rate against the sign of its gradient.
    before = dict(by_hand.named_parameters())
    for name, after in clip.named_parameters():
        moved, gradient = after.detach() - before[name].detach(), before[name].grad
        if "visual" in name and after.requires_grad and after.ndim < 2 and after.ndim:
            clear = gradient.abs() > 1e-4
            assert torch.equal(moved[clear].sign(), -gradient[clear].sign()), name
    assert not torch.equal(clip.model.logit_scale, by_hand.model.logit_scale)


def detached(output):
    return output._replace(**{n: t.detach() for n, t in output._asdict().items() if t is not None})


# --- what is left alone -------------------------------------------------------------------------


def text_state(clip):
    return {
        name: tensor.clone()
        for name, tensor in clip.model.state_dict().items()
        if not name.startswith("visual") and not name.startswith("logit")
    }


@pytest.mark.parametrize("train_text", [False, True])
def test_the_text_tower(train_text):
    clip = wrapped().train()
    before, vision = text_state(clip), copy.deepcopy(clip.model.visual.state_dict())
    modes = {module: module.training for module in clip.modules()}
    needed = {name: p.requires_grad for name, p in clip.named_parameters()}
    seen = []
    hook = clip.model.text.register_forward_hook(
        lambda module, _, result: seen.append((module.training, result.requires_grad))
    )
    task = trainer(clip, validation=[pairs(clip)], train_text=train_text, weight_decay=0.5)
    task.fit()
    hook.remove()
    after = text_state(clip)
    assert before.keys() == after.keys()
    assert len(before) > 10
    same = [torch.equal(tensor, after[name]) for name, tensor in before.items()]
    assert (not any(same)) if train_text else all(same), "decay and steps reach all or none"
    moved = clip.model.visual.state_dict()
    assert not any(torch.equal(tensor, moved[name]) for name, tensor in vision.items())
    training = seen[0]
    assert training == ((True, True) if train_text else (False, False))
    assert modes == {module: module.training for module in clip.modules()}
    assert needed == {name: p.requires_grad for name, p in clip.named_parameters()}
    if not train_text:
        assert all(p.grad is None for p in clip.model.text.parameters())


def test_the_scale_is_trained_and_bounded():
    clip = wrapped()
    with torch.no_grad():
        clip.model.logit_scale.fill_(math.log(100) - 1e-3)
        # Every image is exactly its text: a larger scale is always better.
    images, texts = pairs(clip, 4)
    task = trainer(clip, [(images, texts)], epochs=1, learning_rate=1e-1, shapley_weight=0.0)
    with torch.no_grad():
        clip.model.logit_scale.fill_(9.0)
    task.fit()
    assert float(clip.model.logit_scale.detach()) == pytest.approx(math.log(100))
    with torch.no_grad():
        clip.model.logit_scale.fill_(-0.2)
    trainer(clip, [(images, texts)], epochs=1, learning_rate=1e-6).fit()
    assert float(clip.model.logit_scale.detach()) == 0.0
    with torch.no_grad():
        clip.model.logit_scale.fill_(9.0).requires_grad_(False)
    trainer(clip, [(images, texts)], epochs=1).fit()
    assert float(clip.model.logit_scale) == 9.0, "frozen by its owner"


def test_random_states_are_left_alone():
    task = trainer()
    state = torch.get_rng_state()
    task.fit()
    assert torch.equal(state, torch.get_rng_state())


# --- runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit-token", "vit-average"])
def test_training_learns_the_match_and_the_game(kind):
    clip = wrapped(kind)
    images, texts = pairs(clip)
    settings = {"epochs": 40, "learning_rate": 3e-3, "shapley_ramp": 0.2, "validate_every": 40}
    task = trainer(clip, [(images, texts)], validation=[(images, texts)], **settings)
    before = task.evaluate()
    history = task.fit()
    after = history[-1]
    assert after["kind"] == "validation"
    assert after["image_to_text_r1"] > max(0.7, before["image_to_text_r1"])
    assert after["contrastive_loss"] < before["contrastive_loss"]
    assert after["skill"] > max(0.1, before["skill"])


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_evaluate(loss):
    clip = wrapped(bias=-2.0)
    images, texts = pairs(clip, 7)
    config = ContrastiveConfig(loss=loss, validation_coalitions=4)
    parts = [(images[:4], texts[:4]), (images[4:], texts[4:])]
    found = ContrastiveTrainer(clip, parts, parts, config=config).evaluate()
    draw = torch.Generator().manual_seed(config.seed + 1)
    clip.eval()
    losses, to_text, to_image, residuals, trivials = [], [], [], [], []
    for image, text in parts:
        num = clip.num_patches
        coalitions = sample_coalitions(len(image), num, 4, generator=draw)
        with torch.no_grad():
            output = detached(clip(image, text, coalitions))
            features = clip.text_features(text)
            similarity = (clip.encode_image(image) @ features.T).numpy()
            values = clip.value(image, text, coalitions)
            patches = clip.attribute(image, text)
        slow = slow_clip if loss == "clip" else slow_siglip
        losses += [slow(output)] * len(image)
        for i in range(len(image)):
            to_text.append(similarity[i].argmax() == i)
            to_image.append(similarity[:, i].argmax() == i)
            pairs_ = [(s, t) for s in range(4) for t in range(len(text))]
            present = coalitions[i].float()
            residuals.append(np.mean([
                float(values[i, s, t] - present[s] @ patches[i, :, t]) ** 2 for s, t in pairs_
            ]))  # fmt: skip
            trivials.append(np.mean([
                float(values[i, s, t] - present[s].mean() * similarity[i, t]) ** 2
                for s, t in pairs_
            ]))  # fmt: skip
    expected = {
        "contrastive_loss": np.mean(losses),
        "image_to_text_r1": np.mean(to_text),
        "text_to_image_r1": np.mean(to_image),
        "skill": 1 - np.sum(residuals) / np.sum(trivials),
        "residual": np.mean(residuals),
        "trivial_residual": np.mean(trivials),
        "images": 7,
    }
    assert found == pytest.approx(expected, rel=1e-4)


def test_strings_become_tokens():
    clip = wrapped()
    images = images_of(clip, 4)
    texts = ["a dog", "two cats", "a red bus", "snow"]
    histories = [
        trainer(copy.deepcopy(clip), [(images, given)], epochs=1).fit()
        for given in (texts, tokenizer(texts))
    ]
    assert histories[0] == histories[1]


def test_a_head_learns_faster():
    clip = wrapped()
    config = ContrastiveConfig(**SETTINGS, head_multiplier=10.0)
    head = [clip.model.visual.proj]
    task = ContrastiveTrainer(clip, [pairs(clip)], config=config, head=head)
    rates = {id(p): g["lr"] for g in task.optimizer.param_groups for p in g["params"]}
    assert rates.pop(id(head[0])) == pytest.approx(0.1)
    assert set(rates.values()) == {0.01}
    assert id(clip.model.logit_scale) in rates
    assert not any(id(p) in rates for p in clip.model.text.parameters())


def test_without_the_shapley_loss_nothing_is_masked():
    for options in ({}, {"output_dict": True}, {"bias": -3.0}):
        clip = wrapped(**options)
        calls = []
        forward = clip.tower.forward
        clip.tower.forward = lambda *a, calls=calls, forward=forward, **k: (
            calls.append(len(a) + len(k)),
            forward(*a, **k),
        )[1]
        history = trainer(clip, shapley_weight=0.0, epochs=1).fit()
        assert calls == [1]
        assert "shapley_loss" not in history[0]
        assert math.isfinite(history[0]["contrastive_loss"])


def test_precision():
    history = trainer(precision="bf16", epochs=1, train_text=True).fit()
    assert math.isfinite(history[0]["loss"])


class Killed(Exception):
    """Stands for a process that dies."""


def _kill_at(monkeypatch, step):
    original = ContrastiveTrainer._after_step

    def after_step(self, position, window, bar):
        original(self, position, window, bar)
        if position.step == step:
            raise Killed

    monkeypatch.setattr(ContrastiveTrainer, "_after_step", after_step)


def _loader(clip):
    return DataLoader(TensorDataset(*pairs(clip, 12)), batch_size=4, shuffle=True)


def _check_resuming(make, folder, monkeypatch, dies_at):
    whole = make(folder / "whole")
    expected = whole.fit()
    with monkeypatch.context() as patch:
        _kill_at(patch, dies_at)
        with pytest.raises(Killed):
            make(folder / "parts").fit()
    parts = make(folder / "parts")
    assert parts.fit(resume=True) == expected
    for name, tensor in whole.clip.state_dict().items():
        assert torch.equal(tensor, parts.clip.state_dict()[name]), name


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resuming_is_exact(tmp_path, monkeypatch, accumulation):
    settings = {"epochs": 2 * accumulation, "checkpoint_every": 2, "accumulation": accumulation}

    def make(folder):
        clip = wrapped()
        return trainer(clip, _loader(clip), folder, [pairs(clip, 3)], **settings)

    _check_resuming(make, tmp_path, monkeypatch, dies_at=3)


@pytest.mark.parametrize(("workers", "steps_per_epoch"), [(0, None), (2, None), (0, 3)])
def test_resuming_a_stream_of_shards_is_exact(tmp_path, monkeypatch, workers, steps_per_epoch):
    pytest.importorskip("webdataset")
    from shapwrap.data import ImageTextShards
    from tests.shards import jittered, write_shards

    paths = write_shards(tmp_path)
    decoded = []

    def transform(image):
        decoded.append(1)
        return torch.nn.functional.interpolate(jittered(image)[None] / 255, (12, 16))[0]

    def make(folder):
        options = {"batch_size": 5, "buffer_size": 6, "captions": "random"}
        stream = ImageTextShards(paths, transform, tokenizer, num_workers=workers, **options)
        held_out = ImageTextShards(paths[0], transform, tokenizer, **options, drop_last=False)
        epochs = 2 if steps_per_epoch is None else 4
        settings = {"steps_per_epoch": steps_per_epoch, "epochs": epochs, "checkpoint_every": 1}
        return trainer(wrapped(), stream, folder, held_out, **settings)

    # An epoch has five batches, of which three are used where it is short: the run dies in one.
    _check_resuming(make, tmp_path, monkeypatch, dies_at=8)
    if not workers:
        decoded.clear()
        again = make(tmp_path / "parts")
        again.fit(resume=True)
        assert len(decoded) == 0, "a finished run reads nothing"
    other = trainer(wrapped(), _loader(wrapped()), tmp_path / "parts")
    with pytest.raises(TrainingError, match=r"another kind|settings of the run changed"):
        other.fit(resume=True)


# --- refusals -----------------------------------------------------------------------------------


def test_refusals():
    clip = wrapped()
    images, texts = pairs(clip, 4)
    with pytest.raises(BackboneTypeError, match=r"Use shapwrap.*ContrastiveTrainer"):
        Trainer(clip, [])
    with pytest.raises(BackboneTypeError, match="expected ShapleyCLIP"):
        ContrastiveTrainer(ShapleyWrapper(clip_model().visual, num_classes=2), [])
    with pytest.raises(ArgumentError, match="no logit bias"):
        trainer(clip, loss="siglip")
    for bad in ({"loss": "triplet"}, {"label_smoothing": 0.1}, {"num_coalitions": 3}):
        with pytest.raises(ArgumentError, match=next(iter(bad))):
            ContrastiveConfig(**bad)
    assert config_of_kind(None, ContrastiveConfig) == ContrastiveConfig()
    for other in (TrainerConfig(), {}):
        with pytest.raises(ArgumentError, match=r"config is .*; expected ContrastiveConfig"):
            config_of_kind(other, ContrastiveConfig)
    for batch, error, words in (
        (images, TrainingError, "a batch is Tensor"),
        ((images, texts[:2]), TrainingError, "4 images and 2 texts"),
        (([1], texts), TrainingError, "images are list"),
        ((images, texts.float()), ArgumentError, "expected token ids"),
        ((images, texts[:, 0]), ArgumentError, "expected token ids"),
    ):
        with pytest.raises(error, match=words):
            trainer(clip, [batch]).fit()
    bare = ShapleyCLIP(clip_model())
    with pytest.raises(ArgumentError, match="there is no tokenizer"):
        trainer(bare, [(images, ["a"] * 4)]).fit()
    with pytest.raises(TrainingError, match="no validation data"):
        trainer(clip).evaluate()
    with pytest.raises(TrainingError, match="has no batch"):
        trainer(clip).evaluate([])
    images[0, 0, 0, 0] = math.nan
    with pytest.raises(TrainingError, match="not finite"):
        trainer(clip, [(images, texts)]).fit()
    assert all(p.requires_grad for p in clip.model.text.parameters())
    assert texts.shape[1] == LENGTH


def test_the_example_of_the_documentation(tmp_path, monkeypatch):
    pytest.importorskip("webdataset")
    from PIL import Image

    from tests.shards import pixels, write_shards

    class Plotted:
        def plot(self, images):
            assert images.shape == (1, 3, 12, 16)

    def small(image):
        return pixels(image.resize((16, 12), Image.Resampling.NEAREST)) / 255

    page = (Path(__file__).parent.parent / "docs" / "clip-training.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    for folder, pattern in (("cc3m", "cc3m/{00000..00331}"), ("cc3m-val", "cc3m-val/*")):
        (tmp_path / folder).mkdir()
        write_shards(tmp_path / folder)
        assert pattern in code
    code = code.replace("{00000..00331}", "part-{000..003}").replace(
        "batch_size=256", "batch_size=9"
    )
    code = code.replace("num_workers=8", "num_workers=0")
    parts = (clip_model(), small, small)
    monkeypatch.setattr("open_clip.create_model_and_transforms", lambda *_, **__: parts)
    monkeypatch.setattr("open_clip.get_tokenizer", lambda _: tokenizer)
    monkeypatch.setattr(ShapleyCLIP, "explain", lambda *_: Plotted())
    monkeypatch.chdir(tmp_path)
    printed = []
    exec(code, {"images": torch.zeros(1, 3, 12, 16), "print": printed.append})
    assert printed[0]["images"] == 18
    assert (tmp_path / "runs" / "clip" / "history.jsonl").is_file()


def test_a_plain_model_is_trained_alike():
    model = clip_model()
    images = torch.randn(4, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    batches = [(images, tokens(4))]
    settings = {"epochs": 2, "shapley_weight": 0.0, "warmup": 0.0}
    trainer = ContrastiveTrainer(model, batches, batches, config=ContrastiveConfig(**settings))
    before = trainer.evaluate()
    scale = model.logit_scale.detach().exp()
    with torch.no_grad():
        found = model.eval()(*batches[0])
    logits = scale * found[0] @ found[1].T
    own = torch.arange(4)
    expected = (
        torch.nn.functional.cross_entropy(logits, own)
        + torch.nn.functional.cross_entropy(logits.T, own)
    ) / 2
    assert before["contrastive_loss"] == pytest.approx(float(expected), rel=1e-5)
    assert "skill" not in before and before["images"] == 4
    trainer.fit()
    assert trainer.evaluate()["contrastive_loss"] < before["contrastive_loss"]
    with pytest.raises(ArgumentError, match="shapley_weight=0"):
        ContrastiveTrainer(model, batches)
