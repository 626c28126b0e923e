"""Mixup and cutmix: every coalition of a mixed image has the label of what can be seen of it."""

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from timm.data import Mixup
from torch.nn import functional

from shapwrap import ShapleyWrapper, Trainer, TrainerConfig, sample_coalitions, shapley_loss
from shapwrap.errors import ArgumentError, TrainingError
from shapwrap.training.contrastive_config import ContrastiveConfig
from shapwrap.training.mixing import Mixing
from shapwrap.training.plain import fine_tune

GRID, PATCH, CLASSES = (3, 4), 4, 5
SIZE = (GRID[0] * PATCH, GRID[1] * PATCH)


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def _seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def _flat_images(num):
    """One number an image, from which a mixed pixel tells whose it is."""
    return (torch.arange(num) + 1.0)[:, None, None, None].expand(-1, 3, *SIZE).clone()


def _shares_by_hand(mixed, num):
    """Share of the own image at each pixel of each image, [B, H, W], from the colours."""
    shares = torch.ones(num, *SIZE)
    for i in range(num // 2 * 2):
        own, other = i + 1.0, (num // 2 * 2 - 1 - i) + 1.0
        for y in range(SIZE[0]):
            for x in range(SIZE[1]):
                shares[i, y, x] = (mixed[i, 0, y, x] - other) / (own - other)
    return shares


def _label_by_hand(shares, labels, coalitions):
    """Labels of the pixels of present patches, averaged one pixel at a time, [B, S, K]."""
    num, even = len(labels), len(labels) // 2 * 2
    made = torch.zeros(num, coalitions.shape[1], CLASSES)
    for i in range(num):
        other = even - 1 - i if i < even else i
        for s in range(coalitions.shape[1]):
            count = 0
            for y in range(SIZE[0]):
                for x in range(SIZE[1]):
                    if coalitions[i, s, (y // PATCH) * GRID[1] + x // PATCH]:
                        count += 1
                        made[i, s, labels[i]] += shares[i, y, x]
                        made[i, s, labels[other]] += 1 - shares[i, y, x]
            made[i, s] /= count
    return made


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
@pytest.mark.parametrize("num", [4, 5])
def test_labels_are_those_of_what_is_seen(mixup, cutmix, num):
    labels = torch.tensor([3, 0, 4, 1, 2])[:num]
    coalitions = sample_coalitions(num, 12, 4, generator=_seeded(1))
    everyone = torch.ones(num, 1, 12, dtype=torch.bool)
    drawn, kinds = _seeded(2), set()
    for _ in range(4):
        mixed = Mixing(mixup, cutmix)(_flat_images(num), drawn)
        shares = _shares_by_hand(mixed.images, num)
        kinds.add("cutmix" if len(shares[0].unique()) > 1 else "mixup")
        found = mixed.masked_targets(labels, CLASSES, coalitions, GRID, SIZE)
        expected = _label_by_hand(shares, labels, coalitions)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        whole = _label_by_hand(shares, labels, everyone)[:, 0]
        torch.testing.assert_close(mixed.targets(labels, CLASSES), whole, atol=1e-5, rtol=0)
        soft = functional.one_hot(labels, CLASSES).float()
        same = mixed.masked_targets(soft, CLASSES, coalitions, GRID, SIZE)
        assert torch.equal(same, found)
    assert ("cutmix" in kinds) == (cutmix > 0)
    if num == 5:
        assert torch.equal(mixed.images[4], _flat_images(5)[4])


def test_a_coalition_without_the_box_has_the_label_of_the_image():
    mixing, drawn = Mixing(0.0, 1.0), _seeded(4)
    labels = torch.tensor([0, 1])
    for _ in range(20):
        mixed = mixing(_flat_images(2), drawn)
        shares = _shares_by_hand(mixed.images, 2)[0]
        cells = shares.unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH).flatten(2).flatten(0, 1)
        pure, foreign = (cells == 1).all(1), (cells == 0).all(1)
        if pure.any() and foreign.any():
            break
    coalitions = torch.stack((pure, foreign))[None].expand(2, -1, -1)
    found = mixed.masked_targets(labels, 2, coalitions, GRID, SIZE)
    assert found[0].tolist() == [[1, 0], [0, 1]]
    assert found[1].tolist() == [[0, 1], [1, 0]]
    whole = mixed.targets(labels, 2)[0]
    assert 0 < whole[0] < 1, "the label of the whole image would be wrong for both"


@pytest.mark.parametrize("probability", [1.0, 0.5])
def test_images_and_labels_are_those_of_timm(probability):
    images = torch.randn(6, 3, *SIZE)
    labels = torch.tensor([3, 0, 4, 1, 2, 0])
    kept = images.clone()
    ours, theirs = _seeded(9), _seeded(9)
    for _ in range(8):
        mixed = Mixing(0.8, 1.0, probability)(images, ours)
        np.random.seed(  # noqa: NPY002 - timm draws from it
            int(torch.randint(2**32, (), generator=theirs))
        )
        reference = Mixup(0.8, 1.0, prob=probability, label_smoothing=0.0, num_classes=CLASSES)
        expected, targets = reference(images.clone(), labels)
        assert torch.equal(mixed.images, expected)
        torch.testing.assert_close(mixed.targets(labels, CLASSES), targets)
        assert torch.equal(images, kept), "the batch is left as it was"


def _numpy_state():
    return np.random.get_state()[1].copy()  # noqa: NPY002 - what timm draws from


def test_random_states_are_left_alone():
    states = torch.get_rng_state(), _numpy_state()
    one = Mixing(0.8, 1.0)(_flat_images(4), _seeded(3))
    other = Mixing(0.8, 1.0)(_flat_images(4), _seeded(3))
    assert torch.equal(one.images, other.images)
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == _numpy_state()).all()


def _wrapped():
    torch.manual_seed(1)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=SIZE, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=CLASSES
    )
    return ShapleyWrapper(model)


def test_a_step_of_the_trainer():
    """Both branches see the mixed images; the masked branch has the labels of what it sees."""
    images = torch.randn(4, 3, *SIZE)
    labels = torch.tensor([3, 0, 4, 1])
    wrapped = _wrapped()
    config = TrainerConfig(
        max_steps=1,
        log_every=1,
        progress=False,
        cutmix=1.0,
        learning_rate=0.0,
        label_smoothing=0.1,
        num_coalitions=4,
        seed=3,
    )
    record = Trainer(wrapped, [(images, labels)], config=config).fit()[0]
    draws = _seeded(3)
    mixed = Mixing(0.0, 1.0)(images, draws)
    coalitions = sample_coalitions(4, 12, 4, generator=draws)
    flat = Mixing(0.0, 1.0)(_flat_images(4), _seeded(3))
    shares = _shares_by_hand(flat.images, 4)
    with torch.no_grad():
        output = wrapped(mixed.images, coalitions)
    whole = _label_by_hand(shares, labels, torch.ones(4, 1, 12, dtype=torch.bool))[:, 0]
    task = functional.cross_entropy(output.logits, whole, label_smoothing=0.1)
    seen = _label_by_hand(shares, labels, coalitions)
    # The class token is there without any patch: v(s) is what the patches add to its logits.
    assert wrapped.has_baseline
    shown = output.values + wrapped.baseline
    masked = sum(functional.cross_entropy(shown[:, s], seen[:, s]) for s in range(4)) / 4
    assert record["task_loss"] == pytest.approx(float(task), rel=1e-5)
    assert record["masked_task_loss"] == pytest.approx(float(masked), rel=1e-5)
    assert record["shapley_loss"] == pytest.approx(float(shapley_loss(output)), rel=1e-4)


def test_plain_training_and_validation():
    images = torch.randn(4, 3, *SIZE)
    labels = torch.tensor([3, 0, 4, 1])
    model = _wrapped().unwrap()
    config = TrainerConfig(max_steps=1, log_every=1, progress=False, mixup=0.8, learning_rate=0.0)
    history = fine_tune(model, [(images, labels)], [(images, labels)], config=config)
    mixed = Mixing(0.8, 0.0)(images, _seeded(0))
    with torch.no_grad():
        logits = model(mixed.images)
        right = (model(images).argmax(1) == labels).double().mean()
    expected = functional.cross_entropy(logits, mixed.targets(labels, CLASSES))
    assert history[0]["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert history[1]["accuracy"] == float(right), "validation images are not mixed"


def test_refusals():
    config = TrainerConfig(max_steps=1, progress=False, cutmix=1.0)
    with pytest.raises(TrainingError, match="expected 0 to 4"):
        Trainer(_wrapped(), [(torch.randn(2, 3, *SIZE), torch.tensor([0, 9]))], config=config).fit()
    with pytest.raises(ArgumentError, match="a mixed image has no one text"):
        ContrastiveConfig(mixup=0.8)
