"""B-cosified CLIP as an explainer: what is learned, the sums, and what is left alone."""

import dataclasses
import math
import sys

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from shapwrap.backbones.base import Normalization
from shapwrap.clip import ZeroShotClassifier
from shapwrap.errors import (
    ArgumentError,
    BackboneTypeError,
    ImageError,
    ImageTypeError,
    MissingDependencyError,
    TargetError,
    TrainingError,
    UnsupportedBackboneError,
)
from shapwrap.explainers import BcosifiedCLIP, BcosifiedConfig, bcosify
from shapwrap.explainers.bcosified.losses import cosine_loss, siglip_loss
from shapwrap.explainers.bcosified.similarity import BcosifiedSimilarity

pytest.importorskip("open_clip")

from open_clip.modified_resnet import ModifiedResNet

from tests.clip_models import clip_model, tokenizer, tokens
from tests.test_bcosified import check_untouched, images, original, texts, traces
from tests.towers import EMBEDDING, build
from tests.trained_models import stage


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """accelerate keeps one state a process; each test starts as a new process would."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def scenes(num, seed=0):
    """Images of four large patches of colour, so that embeddings differ."""
    generator = torch.Generator().manual_seed(seed)
    drawn = 2 * torch.randn(num, 3, 2, 2, generator=generator)
    return drawn.repeat_interleave(16, dim=2).repeat_interleave(16, dim=3)


DATA = [scenes(4, seed) for seed in range(2)]


def config(loss="siglip", b_ramp=0.0, factor="cosine", **settings):
    return BcosifiedConfig(distillation=stage(**settings), loss=loss, b_ramp=b_ramp, factor=factor)


def model():
    """An image-text model of 32 x 32 pixels whose embeddings are not all alike."""
    torch.manual_seed(0)
    given = clip_model("resnet")
    tower = ModifiedResNet((1, 1, 1, 1), output_dim=EMBEDDING, heads=4, image_size=32, width=8)
    for layer in tower.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.1)
            layer.momentum = None
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.normal_(layer.bias, std=0.05)
    nn.init.normal_(tower.attnpool.positional_embedding, std=0.1)
    with torch.no_grad():
        tower.train()(scenes(64, 7))
    given.visual = tower
    return given.eval()


def ready(reading="pooled", dtype=torch.float64, **options):
    """An explainer of a tower that counts as trained."""
    torch.manual_seed(0)
    tower = bcosify(original()).to(dtype)
    return BcosifiedCLIP(tower, texts(), reading=reading, **options)


# --- losses and settings --------------------------------------------------------------------


def test_losses_against_loops():
    student, teacher = torch.randn(2, 5, 7).double()
    cosines = [
        [float(s @ t) / math.sqrt(float(s @ s) * float(t @ t)) for t in teacher.numpy()]
        for s in student.numpy()
    ]
    total = 0.0
    for i in range(5):
        for j in range(5):
            logit = (1 if i == j else -1) * (10 * cosines[i][j] - 10)
            total += math.log(1 + math.exp(-logit))
    found = siglip_loss(student, teacher, scale=10.0, bias=-10.0)
    assert found.item() == pytest.approx(total / 5)
    expected = np.mean([1 - cosines[i][i] for i in range(5)])
    assert cosine_loss(student, teacher).item() == pytest.approx(expected)


def test_ramp_of_b():
    ramped = dataclasses.replace(config(b_ramp=0.5), b=3.0)
    assert [ramped.b_at(step, 8) for step in range(8)] == [1, 1.5, 2, 2.5, 3, 3, 3, 3]
    assert config().b_at(0, 8) == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"b": 0.0}, "b is 0"),
        ({"b_ramp": 1.5}, "b_ramp is 1.5"),
        ({"loss": "l2"}, "loss is 'l2'"),
        ({"factor": "sine"}, "factor is 'sine'"),
        ({"logit_scale": 0.0}, "logit_scale is 0"),
        ({"logit_scale": math.inf}, "logit_scale is inf"),
        ({"logit_bias": math.nan}, "logit_bias nan"),
    ],
)
def test_wrong_settings(settings, words):
    with pytest.raises(ArgumentError, match=words):
        BcosifiedConfig(**settings)


# --- the explanation ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reading", "options"),
    [
        ("pooled", {}),
        ("attn_unpool", {"cosine_power": 2.5}),
        ("attn_unpool_map", {"cosine_power": 2.0}),
        ("pooled", {"grid": (4, 3)}),
    ],
)
def test_values_are_sums_over_patches_and_batches_do_not_matter(reading, options):
    explainer = ready(reading, **options)
    batch, target = images(3), torch.tensor([3, 0, 1])
    before, state = traces(explainer.tower), torch.get_rng_state()
    made = explainer(batch, target)
    check_untouched(before, explainer.tower)
    assert torch.equal(torch.get_rng_state(), state)
    assert made.grid == options.get("grid", (1, 2))
    assert made.values.dtype == torch.float64
    assert (
        made.method == f"b-cosified{'' if reading == 'pooled' else '-' + reading.replace('_', '-')}"
    )
    # The similarity of the very reading, of which the values are a part.
    expected = made.logits.gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(made.total, expected, rtol=1e-12, atol=0)
    assert made.efficiency_gap().max() < 1e-12
    if reading == "attn_unpool_map":
        assert made.pixels is None
        similarity = BcosifiedSimilarity(explainer.tower, texts(), reading=reading)
        with torch.no_grad():
            cosines = similarity.of_places(explainer.tower.encode(batch))
        for i in range(3):
            for n in range(2):
                cosine = cosines[i, n, target[i]].item()
                assert made.values[i, n].item() == pytest.approx(cosine * abs(cosine) / 2)
    else:
        rows, columns = made.grid
        for i in range(3):
            sums = np.zeros(rows * columns)
            for y in range(32):
                for x in range(64):
                    cell = (y * rows // 32) * columns + x * columns // 64
                    sums[cell] += made.pixels[i, y, x].item()
            np.testing.assert_allclose(made.values[i].numpy(), sums, rtol=1e-9)
    explainer.chunk_size = 1
    for i in range(3):
        alone = explainer(batch[i : i + 1], int(target[i]))
        torch.testing.assert_close(alone.values[0], made.values[i], rtol=1e-9, atol=1e-15)
    with torch.no_grad():
        again = explainer(batch, target)
    torch.testing.assert_close(again.values, made.values, rtol=1e-9, atol=1e-15)


def test_pixels_are_contributions_to_the_cosine():
    explainer = ready()
    made = explainer(images(), 2)
    embedding = explainer.tower(images()).detach().numpy()
    for i in range(2):
        length = math.sqrt(float(embedding[i] @ embedding[i]))
        cosine = float(embedding[i] @ texts()[2].numpy()) / length
        assert made.logits[i, 2].item() == pytest.approx(cosine)
        assert made.pixels[i].sum().item() == pytest.approx(cosine)
    assert torch.equal(explainer(images()).target, made.logits.argmax(dim=1))


def test_channels_of_pixels_claim_no_sum():
    statistics = Normalization((0.5, 0.4, 0.3), (0.3, 0.2, 0.1))
    tower = bcosify(original(), normalization=statistics)
    made = BcosifiedCLIP(tower, texts(), channels="pixels")(images(), 1)
    assert made.total.isnan().all()
    exact = BcosifiedCLIP(tower, texts())(images(), 1)
    assert (made.pixels.sum((1, 2)) - exact.pixels.sum((1, 2))).abs().min() > 1e-3
    assert made.normalization == statistics


def test_texts_as_strings_token_ids_and_embeddings():
    given = model()
    explainer = BcosifiedCLIP(given, ["a cat", "two dogs"], tokenizer=tokenizer)
    explainer.load_state_dict(bcosify(given.visual).state_dict())
    batch = images(size=(32, 96)).float()
    found = explainer(batch)
    assert list(found.class_names) == ["a cat", "two dogs"]
    ids = tokenizer(["a cat", "two dogs"])
    with torch.no_grad():
        embeddings = given.encode_text(ids)
    for other in (ids, embeddings, 5 * embeddings):
        again = BcosifiedCLIP(given, other).load_state_dict(explainer.state_dict())(batch)
        torch.testing.assert_close(again.values, found.values)
        assert again.class_names is None
    classifier = ZeroShotClassifier(given, ["a cat", "two dogs"], tokenizer=tokenizer)
    for other in (ids, classifier.text_embeddings):
        again = BcosifiedCLIP(classifier, other).load_state_dict(explainer.state_dict())(batch)
        torch.testing.assert_close(again.values, found.values)


def test_half_precision_and_autocast():
    given = model()
    state = bcosify(given.visual).state_dict()
    batch = images(size=(32, 96)).half()
    for reading in ("pooled", "attn_unpool", "attn_unpool_map"):
        explainer = BcosifiedCLIP(given, tokens(), reading=reading).load_state_dict(state)
        plain = explainer(batch.float(), 1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again = explainer(batch.float(), 1)
        torch.testing.assert_close(again.values, plain.values, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(again.logits, plain.logits, atol=1e-6, rtol=1e-5)
        assert again.efficiency_gap().max() < 1e-5
    plain = BcosifiedCLIP(given, tokens()).load_state_dict(state)(batch.float(), 1)
    embeddings = given.encode_text(tokens()).detach()
    half = BcosifiedCLIP(given.visual.half(), embeddings)
    made = half.load_state_dict(bcosify(given.visual).state_dict())(batch, 1)
    assert made.values.dtype == torch.float32
    assert (made.total - plain.total).abs().max() < 0.01


# --- training -------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["siglip", "cosine"])
def test_the_tower_learns_the_embeddings_of_the_original(loss):
    given = model()
    data = [scenes(16, seed) for seed in range(4)]
    test = scenes(16, 99)
    wanted = given.visual(test)
    agreement = {}
    for rate, epochs in ((0.0, 1), (3e-3, 3)):
        settings = config(loss, learning_rate=rate, epochs=epochs, b_ramp=0.5)
        explainer = BcosifiedCLIP.train(given, tokens(), data, config=settings)
        agreement[rate] = nn.functional.cosine_similarity(explainer.tower(test), wanted).mean()
    records = explainer.history["distillation"]
    assert [record["b"] for record in records] == pytest.approx(
        [1 + min(1, step / 6) for step in range(12)]
    )
    assert records[-1]["loss"] < 0.7 * records[0]["loss"]
    assert records[-1]["cosine"] > records[0]["cosine"] + 0.2
    assert agreement[3e-3] > 0.35
    assert agreement[3e-3] > agreement[0.0] + 0.3
    assert explainer(test).efficiency_gap().max() < 1e-5
    assert all(layer.b == 2 for layer in explainer.tower.modules() if hasattr(layer, "b"))


def test_the_model_and_the_random_states_are_left_alone():
    given = model()
    next(given.visual.children()).train()
    given.visual.conv2.weight.requires_grad_(False)
    before = traces(given)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    data = DataLoader(TensorDataset(torch.cat(DATA)), batch_size=4, shuffle=True)
    with torch.no_grad():
        explainer = BcosifiedCLIP.train(given, tokens(), data, config=config())
    explainer(scenes(2))
    check_untouched(before, given)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    start, moved = bcosify(given.visual).state_dict(), explainer.state_dict()
    # With one place an image, attention has nothing to choose from.
    learned = [name for name in start if "weight" in name and "q_proj" not in name]
    learned = [name for name in learned if "k_proj" not in name]
    assert all(not torch.equal(start[name], moved[name]) for name in learned)


def test_labels_are_not_read_and_runs_repeat():
    labelled = [(batch, torch.zeros(len(batch))) for batch in DATA]
    states = [
        BcosifiedCLIP.train(model(), tokens(), data, config=config()).state_dict()
        for data in (DATA, labelled)
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_state_is_saved_and_loaded():
    given = model()
    explainer = BcosifiedCLIP.train(given, tokens(), DATA, config=config())
    fresh = BcosifiedCLIP(given, tokens(), config=config())
    for ask in (lambda: fresh(scenes(1)), lambda: fresh.tower, fresh.state_dict):
        with pytest.raises(TrainingError, match=r"not trained; call fit\(data\)"):
            ask()
    with pytest.raises(ArgumentError, match="does not fit"):
        fresh.load_state_dict({})
    loaded = fresh.load_state_dict(explainer.state_dict())
    expected = explainer(scenes(2), 1)
    assert torch.equal(loaded(scenes(2), 1).values, expected.values)
    # A trained tower with other texts, without the original.
    alone = BcosifiedCLIP(explainer.tower, given.encode_text(tokens()).detach())
    assert torch.equal(alone(scenes(2), 1).values, expected.values)
    assert alone.tower is not explainer.tower
    with pytest.raises(TrainingError, match="without the tower that it should"):
        alone.fit(DATA)


def test_a_run_is_resumed(tmp_path):
    def settings(name):
        return config(output_dir=tmp_path / name, epochs=2, checkpoint_every=1, b_ramp=1.0)

    # Without a checkpoint there is nothing to go on from, and training starts.
    whole = BcosifiedCLIP(model(), tokens(), config=settings("whole")).fit(DATA, resume=True)
    broken = [DATA[0], torch.full_like(DATA[1], torch.nan)]
    with pytest.raises(TrainingError, match="not finite"):
        BcosifiedCLIP(model(), tokens(), config=settings("parts")).fit(broken)
    resumed = BcosifiedCLIP(model(), tokens(), config=settings("parts")).fit(DATA, resume=True)
    assert all(layer.b == 2 for layer in resumed.tower.modules() if hasattr(layer, "b"))
    state, expected = resumed.state_dict(), whole.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    with pytest.raises(TrainingError, match="earlier run"):
        BcosifiedCLIP(model(), tokens(), config=settings("parts")).fit(DATA)


def test_frozen_statistics_accumulation_and_bf16():
    settings = config(freeze_batch_norm=True, accumulation=2, precision="bf16", factor="response")
    explainer = BcosifiedCLIP.train(model(), tokens(), DATA, config=settings)
    start = bcosify(model().visual).state_dict()
    for name, tensor in explainer.state_dict().items():
        if "running_var" in name:
            assert torch.equal(tensor, start[name])
    assert explainer(scenes(2)).efficiency_gap().max() < 1e-5


# --- what a user can get wrong --------------------------------------------------------------


def test_wrong_models_and_texts():
    with pytest.raises(UnsupportedBackboneError, match="expected open_clip's ModifiedResNet"):
        BcosifiedCLIP(clip_model("vit-token"), tokens())
    with pytest.raises(UnsupportedBackboneError, match="expected open_clip's ModifiedResNet"):
        BcosifiedCLIP(build("timm-resnet-trunk"), texts())
    with pytest.raises(ArgumentError, match="an image tower alone"):
        BcosifiedCLIP(build("resnet"), tokens())
    with pytest.raises(ArgumentError, match="there is no tokenizer"):
        BcosifiedCLIP(model(), ["a cat"])
    with pytest.raises(ArgumentError, match=f"expected \\[T >= 1, {EMBEDDING}\\]"):
        BcosifiedCLIP(build("resnet"), torch.randn(2, EMBEDDING + 1))
    with pytest.raises(BackboneTypeError, match="expected an open_clip model"):
        BcosifiedCLIP(len, texts())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reading": "grid"}, "reading is 'grid'"),
        ({"cosine_power": 2.0}, "one cosine an image"),
        ({"reading": "attn_unpool", "cosine_power": 0.5}, "cosine_power is 0.5"),
        ({"reading": "attn_unpool", "cosine_power": math.inf}, "cosine_power is inf"),
        ({"channels": "rgb"}, "channels is 'rgb'"),
        ({"channels": "pixels"}, r"pass normalization=Normalization\(mean, std\)"),
        ({"reading": "attn_unpool_map", "grid": (2, 2)}, "expected neither"),
        ({"reading": "attn_unpool_map", "channels": "pixels"}, "expected neither"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"grid": (0, 2)}, r"grid is \(0, 2\)"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(ArgumentError, match=words):
        ready(**options)


def test_wrong_images_and_targets():
    explainer = ready()
    for batch, error, words in (
        (images(size=(30, 64)), ImageError, r"30 x 64 pixels .* built for \(64, 64\)"),
        (images()[:, :2], ImageError, "2 channels; this tower was built for 3"),
        (images() * torch.nan, ImageError, "NaN"),
        (images()[0], ImageError, r"expected \[B, C, H, W\]"),
        (images().long(), ImageTypeError, "expected floating point"),
    ):
        with pytest.raises(error, match=words):
            explainer(batch)
    with pytest.raises(TargetError, match="classes 0 to 3"):
        explainer(images(), 4)
    assert explainer(images(size=(31, 70)), 0).grid == (1, 2)


def test_training_without_its_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "shapwrap.explainers.bcosified.distillation", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'shapwrap\[train\]'"):
        BcosifiedCLIP(model(), tokens()).fit(DATA)


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ([], TrainingError, "empty"),
        (iter(DATA), TrainingError, "once an epoch"),
        ([DATA[0], (DATA[0] * 10).long()], ImageTypeError, "floating point"),
        ([DATA[0], DATA[0][..., :16]], ImageError, "expected one size"),
        (
            [scenes(2).repeat(1, 1, 2, 1)],
            ImageError,
            "the original tower refuses images of 64 x 32",
        ),
        ([DATA[0] * torch.nan], ImageError, "NaN"),
    ],
)
def test_wrong_training_data(data, error, words):
    with pytest.raises(error, match=words):
        BcosifiedCLIP(model(), tokens(), config=config()).fit(data)
