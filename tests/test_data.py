"""The embedded image set: labels, evidence, and scores that can be computed by hand."""

import pytest
import torch

from shapwrap import Explanation
from shapwrap.backbones.base import Normalization
from shapwrap.data import ClutteredDigits, efficientnet_lite0, localisation
from shapwrap.data.digits import load_digits
from shapwrap.data.folder import image_transform, load_folder
from shapwrap.errors import ArgumentError
from shapwrap.metrics.pointing import evidence_patches


def test_scenes_repeat_and_differ():
    digits = ClutteredDigits("train", num_images=6, seed=1)
    first, again = digits.scene(3), ClutteredDigits("train", num_images=9, seed=1).scene(3)
    assert torch.equal(first.image, again.image)
    assert not torch.equal(first.image, digits.scene(4).image)
    assert not torch.equal(first.image, ClutteredDigits("train", seed=2).scene(3).image)
    assert not torch.equal(first.image, ClutteredDigits("test", seed=1).scene(3).image)
    assert len(list(digits)) == 6


def test_evidence_is_where_the_digit_is():
    """Without clutter, ink stands out exactly where the evidence says."""
    for index in range(10):
        scene = ClutteredDigits("test", distractors=0, image_size=(64, 96)).scene(index)
        assert scene.image.shape == (3, 64, 96)
        assert -1 <= scene.image.min() <= scene.image.max() <= 1
        brightness = scene.image.amax(0)
        assert brightness[scene.evidence].mean() > brightness[~scene.evidence].mean() + 0.5
        rows, _ = scene.evidence.nonzero().unbind(1)
        assert (rows.max() - rows.min()) < 0.4 * 64
        assert 0.005 < scene.evidence.float().mean() < 0.12


def test_train_and_test_share_no_digit():
    digits, labels = load_digits()
    assert digits.shape == (1797, 8, 8)
    train, test = ClutteredDigits("train"), ClutteredDigits("test")
    assert len(train._digits) + len(test._digits) == 1797
    assert torch.equal(torch.cat((test._digits, train._digits)), digits.flip(0))
    assert set(labels.tolist()) == set(range(10))


def test_labels_are_balanced_enough():
    labels = torch.tensor([ClutteredDigits("train").scene(i).label for i in range(200)])
    assert torch.bincount(labels, minlength=10).min() >= 8


def test_localisation_by_hand():
    evidence = torch.zeros(2, 4, 6, dtype=torch.bool)
    evidence[:, 3, 5] = True
    values = torch.zeros(2, 6)
    values[0, 5], values[1, 0] = 1.0, 1.0
    explanation = Explanation(
        values, torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), (2, 3), (4, 6)
    )
    found = localisation(explanation, evidence)
    assert found.hit.tolist() == [1, 0]
    torch.testing.assert_close(found.chance, torch.full((2,), 1 / 6))
    assert evidence_patches(evidence, (2, 3)).sum() == 2
    with pytest.raises(ArgumentError, match="expected one mask an image"):
        localisation(explanation, evidence[:1])


def test_pretrained_weights_are_real():
    model = efficientnet_lite0().eval()
    assert model.get_classifier().weight.std() > 0.01
    names = [name for name, p in model.named_parameters() if p.abs().sum() == 0]
    assert names == []
    assert model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    new = efficientnet_lite0(num_classes=10)
    assert new.get_classifier().weight.abs().max() == 0
    torch.testing.assert_close(new.conv_stem.weight, model.conv_stem.weight)


@pytest.mark.parametrize(
    "arguments", [{"split": "val"}, {"image_size": (20, 20)}, {"num_images": 0}]
)
def test_refusals(arguments):
    with pytest.raises(ArgumentError):
        ClutteredDigits(**arguments)
    with pytest.raises(IndexError):
        ClutteredDigits(num_images=2)[2]


def write_folder(root, classes=("cat", "dog"), count=5):
    """A folder a class, of small pictures whose colour tells the class."""
    from PIL import Image

    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(count):
            color = (200, 40 * index, 0) if number == 0 else (0, 40 * index, 200)
            Image.new("RGB", (40, 30), color).save(root / name / f"{name}{index}.png")
    return root


STATISTICS = Normalization((0.5,) * 3, (0.5,) * 3)


def test_folder_with_and_without_a_split(tmp_path):
    plain = load_folder(write_folder(tmp_path / "plain"), (16, 24), STATISTICS, batch_size=4)
    assert plain.class_names == ["cat", "dog"]
    assert len(plain.train.dataset) == 8
    assert len(plain.validation.dataset) == 2
    images, labels = next(iter(plain.validation))
    assert images.shape == (2, 3, 16, 24)
    assert labels.tolist() == [0, 1]
    write_folder(tmp_path / "split" / "train")
    write_folder(tmp_path / "split" / "val", count=2)
    split = load_folder(tmp_path / "split", (16, 16), STATISTICS, limit=6)
    assert len(split.train.dataset) == 6
    assert (
        sorted(split.train.dataset.dataset.targets[i] for i in split.train.dataset.indices)
        == [0] * 3 + [1] * 3
    )
    assert len(split.validation.dataset) == 4
    write_folder(tmp_path / "other" / "train", ("a", "b"))
    write_folder(tmp_path / "other" / "val", ("a", "c"))
    with pytest.raises(ArgumentError, match="expected the same"):
        load_folder(tmp_path / "other", (16, 16), STATISTICS)
    with pytest.raises(ArgumentError, match="is no folder"):
        load_folder(tmp_path / "nowhere", (16, 16), STATISTICS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArgumentError, match="no usable images"):
        load_folder(tmp_path / "empty", (16, 16), STATISTICS)


def test_transform_reads_any_mode():
    from PIL import Image

    transform = image_transform((16, 20), STATISTICS, augment=False)
    for mode in ("L", "RGB", "RGBA", "P"):
        assert transform(Image.new(mode, (50, 33))).shape == (3, 16, 20)
