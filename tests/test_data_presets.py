"""ImageNet and Imagenette folders with timm's transforms."""

import numpy as np
import pytest
import timm
import torch
import torchvision
from accelerate.state import AcceleratorState
from PIL import Image
from timm.data import create_transform, resolve_data_config

from shapwrap import ShapleyWrapper, Trainer, TrainerConfig
from shapwrap.backbones.base import Normalization
from shapwrap.data import (
    Augmentation,
    SkippedSampleWarning,
    imagenet,
    imagenette,
    timm_transforms,
)
from shapwrap.errors import ArgumentError, ImageFileError

IDS = ("n01440764", "n02102040", "n03888257")


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def _image(seed, size=(20, 14)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _folder(root, ids=IDS, train=4, val=2):
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(ids):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                _image(100 * label + index).save(folder / f"{name}_{index}.png")
    return root


def _wrapped(classes=3, **options):
    torch.manual_seed(0)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=3, num_classes=classes
    )
    configuration = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "crop_pct": 0.5}
    configuration |= {
        "interpolation": "nearest",
        "input_size": (3, 224, 224),
        "crop_mode": "center",
    }
    model.pretrained_cfg = {**configuration, **options}
    return ShapleyWrapper(model)


def test_an_imagenet_folder(tmp_path):
    wrapped = _wrapped()
    data = imagenet(_folder(tmp_path), wrapped, batch_size=4)
    assert data.class_names == ["tench", "English springer", "parachute"]
    state = torch.get_rng_state()
    batches = list(data.train)
    torch.set_rng_state(state)
    assert [len(labels) for _, labels in batches] == [4, 4, 4]
    assert torch.cat([labels for _, labels in batches]).bincount().tolist() == [4, 4, 4]
    images, labels = next(iter(data.validation))
    assert images.shape == (4, 3, 16, 16)
    assert labels.tolist() == [0, 0, 1, 1]
    # The centre, by hand: the short side to 32 with nearest pixels, then 16 x 16.
    pixels = np.asarray(_image(0).resize((32, int(20 * 32 / 14)), Image.Resampling.NEAREST))
    top, left = round((pixels.shape[0] - 16) / 2), 8
    expected = torch.from_numpy(pixels[top : top + 16, left : left + 16] / 255.0).permute(2, 0, 1)
    mean, std = (torch.tensor(s)[:, None, None] for s in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
    torch.testing.assert_close(images[0].double(), (expected - mean) / std, atol=1e-5, rtol=1e-5)


def test_transforms_are_those_of_timm():
    wrapped = _wrapped()
    training, validation = timm_transforms(wrapped)
    configuration = resolve_data_config({}, pretrained_cfg=wrapped.model.pretrained_cfg)
    configuration["input_size"] = (3, 16, 16)
    recipe = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25, "re_mode": "pixel"}
    common = {k: configuration[k] for k in ("input_size", "mean", "std", "interpolation")}
    for ours, theirs in (
        (training, create_transform(**common, is_training=True, **recipe)),
        (validation, create_transform(**common, crop_pct=0.5)),
    ):
        assert repr(ours) == repr(theirs)
    plain = timm_transforms(wrapped, Augmentation(auto_augment=None, erasing=0.0, flip=0.0))
    names = repr(plain.training)
    assert "RandomResizedCrop" in names
    assert not any(name in names for name in ("RandAugment", "Erasing", "Flip", "Jitter"))
    assert all(name in repr(training) for name in ("RandAugment", "RandomErasing", "Flip"))


def test_imagenette_is_found_in_any_size(tmp_path):
    wrapped = _wrapped()
    _folder(tmp_path / "imagenette2-160")
    for root in (tmp_path, tmp_path / "imagenette2-160"):
        data = imagenette(root, wrapped, batch_size=2, limit=6)
        assert len(data.train.dataset) == 6
        assert sorted(label for _, label in data.train.dataset) == [0, 0, 1, 1, 2, 2]
    assert "scale=(0.35, 1.0)" in repr(data.train.dataset.dataset.transform)
    _folder(tmp_path / "imagenette2")
    with pytest.raises(ArgumentError, match="imagenette2, imagenette2-160; expected one"):
        imagenette(tmp_path, wrapped)


@pytest.mark.parametrize("preset", [imagenet, imagenette])
def test_a_corrupt_image_is_named_or_skipped(tmp_path, preset):
    root = _folder(tmp_path)
    (root / "train" / IDS[1] / f"{IDS[1]}_2.png").write_bytes(b"no picture")
    with pytest.raises(ImageFileError, match=r"_2\.png cannot be read"):
        list(preset(root, _wrapped(), batch_size=4).train)
    data = preset(root, _wrapped(), batch_size=4, corrupt="skip")
    with pytest.warns(SkippedSampleWarning, match="_2.png"):
        labels = torch.cat([labels for _, labels in data.train])
    assert labels.bincount().tolist() == [4, 4, 4]
    assert data.skipped == 1
    with pytest.raises(ArgumentError, match="corrupt is 'ignore'"):
        preset(root, _wrapped(), corrupt="ignore")


def test_training_on_a_folder_with_all_augmentations(tmp_path):
    data = imagenet(_folder(tmp_path / "data"), _wrapped(), batch_size=4)
    histories = []
    for _ in range(2):
        config = TrainerConfig(
            epochs=1, progress=False, log_every=1, mixup=0.8, cutmix=1.0, label_smoothing=0.1
        )
        trainer = Trainer(_wrapped(), data.train, data.validation, config=config)
        histories.append(trainer.fit())
    assert histories[0] == histories[1]
    assert histories[0][-1]["images"] == 6


def test_names_and_statistics_of_other_models(tmp_path, monkeypatch):
    torch.manual_seed(0)
    block = torchvision.models.resnet.BasicBlock
    model = torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=2)
    monkeypatch.setattr(type(model), "__module__", "own")
    wrapped = ShapleyWrapper(model, image_size=(64, 64))
    root = _folder(tmp_path, ids=("cat", "dog"))
    told = wrapped.normalization or Normalization((0.5,) * 3, (0.25,) * 3)
    data = imagenet(root, wrapped, batch_size=2, normalization=told)
    assert data.class_names == ["cat", "dog"]
    transform = data.validation.dataset.transform
    assert "Resize(size=73, interpolation=bilinear" in repr(transform)


def test_refusals(tmp_path):
    wrapped = _wrapped()
    with pytest.raises(ArgumentError, match="no folder train and no val"):
        imagenet(tmp_path, wrapped)
    root = _folder(tmp_path / "data")
    with pytest.raises(ArgumentError, match=r"has 3 classes, the model has 5.*num_classes=3"):
        imagenet(root, _wrapped(5))
    with pytest.raises(ArgumentError, match=r"batch_size is 13, and .* gives 12 images"):
        imagenet(root, wrapped, batch_size=13)
    with pytest.raises(ArgumentError, match="auto_augment is 'random'"):
        timm_transforms(wrapped, Augmentation(auto_augment="random"))
    with pytest.raises(ArgumentError, match="does not tell mean and standard deviation"):
        timm_transforms(_wrapped(mean=None))
