"""Data sets of the datasets library, with a length and streamed."""

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch.utils.data import DataLoader

pytest.importorskip("datasets")

import datasets

from shapwrap import ShapleyWrapper, Trainer, TrainerConfig
from shapwrap.data import HuggingFaceImages, HuggingFaceStream
from shapwrap.errors import ArgumentError, TrainingError
from shapwrap.training.position import Position, Split
from shapwrap.training.resumable_data import ResumableData

SIZE = 12


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def _dataset(num=20, mode="RGB"):
    """Image i has the colour i everywhere, and the label i % 5."""
    images = [
        Image.fromarray(np.full((SIZE, SIZE, 3), i, dtype=np.uint8)).convert(mode)
        for i in range(num)
    ]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list("abcde"))}
    )
    columns = {"image": images, "label": [i % 5 for i in range(num)]}
    return datasets.Dataset.from_dict(columns, features=features)


def _transform(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def _noisy(image):
    return _transform(image) / 255 + 0.1 * torch.randn(3, SIZE, SIZE) + np.random.rand()  # noqa: NPY002


def _stream(shards=2, transform=_transform, **options):
    options = {"batch_size": 4, "num_samples": 20, "buffer_size": 8, **options}
    return HuggingFaceStream(_dataset().to_iterable_dataset(shards), transform, **options)


def _seen(batches):
    """The numbers of the images, in their order."""
    return [int(number) for images, _ in batches for number in images[:, 0, 0, 0]]


def _wrapped():
    torch.manual_seed(0)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=SIZE, patch_size=4, embed_dim=24, depth=1, num_heads=3, num_classes=5
    )
    return ShapleyWrapper(model)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_data_set_with_a_length(mode):
    images = HuggingFaceImages(_dataset(mode=mode), _transform)
    assert len(images) == 20
    assert images.class_names == list("abcde")
    pixels, label = images[7]
    assert label == 2
    assert torch.equal(pixels, torch.full((3, SIZE, SIZE), 7.0))
    arrays = _dataset(4).with_format("numpy")
    assert torch.equal(
        HuggingFaceImages(arrays, _transform)[3][0], torch.full((3, SIZE, SIZE), 3.0)
    )
    data = DataLoader(HuggingFaceImages(_dataset(), _noisy), batch_size=4, shuffle=True)
    config = TrainerConfig(epochs=1, progress=False)
    assert Trainer(_wrapped(), data, data, config=config).fit()[-1]["images"] == 20


@pytest.mark.parametrize("shards", [1, 2])
def test_an_epoch_of_a_stream_has_every_image_once(shards):
    stream = _stream(shards)
    assert isinstance(stream, ResumableData)
    assert len(stream) == 5
    orders = []
    for _ in range(2):
        batches = list(stream)
        numbers = _seen(batches)
        assert sorted(numbers) == list(range(20))
        assert [int(label) for _, labels in batches for label in labels] == [n % 5 for n in numbers]
        orders.append(numbers)
    assert orders[0] != orders[1]
    stream.set_epoch(0)
    assert _seen(stream) == orders[0]
    in_order = _stream(shards, shuffle=False)
    assert _seen(in_order) == list(range(20))


@pytest.mark.parametrize("shards", [1, 4])
def test_processes_share_an_epoch(shards):
    for epoch in range(2):
        numbers = []
        for process in range(2):
            part = _stream(shards, batch_size=5).split(process, 2)
            part.set_epoch(epoch)
            assert len(part) == 2
            numbers += _seen(part)
        assert sorted(numbers) == list(range(20))


def test_a_share_that_is_too_short_starts_again():
    """Two processes have 10 images each, and are asked for 12."""
    part = _stream(shards=2, batch_size=1, num_samples=24).split(0, 2)
    numbers = _seen(part)
    assert len(numbers) == 12
    assert len(set(numbers)) == 10
    part = _stream(shards=2, batch_size=1, num_samples=24).split(0, 2)
    given = iter(part)
    for _ in range(11):
        next(given)
    state = part.state_dict()
    again = _stream(shards=2, batch_size=1, num_samples=24).split(0, 2)
    again.load_state_dict(state)
    assert _seen(again) == numbers[11:]


@pytest.mark.parametrize("stopped", [1, 4])
def test_a_stream_goes_on_bit_for_bit(stopped):
    whole = [list(stream) for stream in [_stream(transform=_noisy)] for _ in range(2)]
    stream = _stream(transform=_noisy)
    list(stream)
    given = iter(stream)
    for _ in range(stopped):
        next(given)
    resumed = _stream(transform=_noisy)
    torch.manual_seed(123)
    resumed.load_state_dict(stream.state_dict())
    rest = list(resumed)
    assert len(rest) == 5 - stopped
    for (images, labels), (expected, classes) in zip(rest, whole[1][stopped:], strict=True):
        assert torch.equal(images, expected)
        assert torch.equal(labels, classes)
    with pytest.raises(TrainingError, match="the stream changed"):
        _stream(seed=1).load_state_dict(stream.state_dict())


def test_what_was_given_is_not_decoded_again(monkeypatch):
    decoded = []
    original = datasets.Image.decode_example
    monkeypatch.setattr(
        datasets.Image,
        "decode_example",
        lambda self, value, **options: decoded.append(1) or original(self, value, **options),
    )
    stream = _stream()
    stream.load_state_dict({**_stream().state_dict(), "place": [0, 3, 0, 12]})
    assert len(list(stream)) == 2
    assert len(decoded) == 8


class Killed(Exception):
    """Stands for a process that dies."""


class Dying(Trainer):
    """Dies after the seventh step."""

    def _after_step(self, position, window, bar):
        super()._after_step(position, window, bar)
        if position.step == 7:
            raise Killed


def test_training_on_a_stream_resumes_exactly(tmp_path):
    def trainer(folder, kind=Trainer):
        config = TrainerConfig(
            output_dir=folder, epochs=2, checkpoint_every=3, log_every=1, progress=False
        )
        data = DataLoader(HuggingFaceImages(_dataset(), _noisy), batch_size=10)
        return kind(_wrapped(), _stream(transform=_noisy), data, config=config)

    expected = trainer(tmp_path / "whole").fit()
    assert expected[-1]["step"] == 10
    with pytest.raises(Killed):
        trainer(tmp_path / "parts", Dying).fit()
    assert trainer(tmp_path / "parts").fit(resume=True) == expected


def test_another_number_of_processes_takes_over_between_epochs():
    def position(stream):
        split = Split(stream._processes, stream._process, len(stream), 1)
        return Position(0, stream, split, {"total_steps": 10}, torch.device("cpu"))

    parts = [_stream(batch_size=2).split(rank, 2) for rank in range(2)]
    before = [position(part) for part in parts]
    for one, part in zip(before, parts, strict=True):
        one.open_epoch()
        list(part)
        one.step, one.epoch = 5, 1
    whole = _stream(batch_size=4)
    now = position(whole)
    shared, owns = before[0].shared_state(), [one.own_state() for one in before]
    now.load(shared, owns)
    assert (now.step, now.open_epoch()) == (5, 0)
    expected = _stream(batch_size=4)
    expected.set_epoch(1)
    assert _seen(whole) == _seen(expected)
    with pytest.raises(TrainingError, match=r"the stream changed .*'seed': \(0, 1\)"):
        position(_stream(seed=1)).load(shared, owns)
    with pytest.raises(TrainingError, match="in the middle of epoch 2"):
        position(_stream()).load(shared | {"batch": 2}, owns)


def test_refusals():
    data, stream = _dataset(), _dataset().to_iterable_dataset()
    for act, words in (
        (lambda: HuggingFaceImages(stream, _transform), "use HuggingFaceStream"),
        (lambda: HuggingFaceStream(data, _transform), "use HuggingFaceImages"),
        (lambda: HuggingFaceImages(datasets.DatasetDict(train=data), _transform), "splits"),
        (lambda: HuggingFaceImages(data, _transform, image="img"), "no column img"),
        (lambda: HuggingFaceStream(stream, _transform, label="fine"), "no column fine"),
        (lambda: HuggingFaceStream(stream, _transform), "pass num_samples"),
        (lambda: _stream(num_samples=3), "at least 4"),
        (lambda: _stream().split(0, 8), "for each of 8 processes"),
        (lambda: HuggingFaceImages(data, lambda image: image)[0], "the transform made"),
        (lambda: HuggingFaceImages(data, _transform, image="label")[0], "expected a PIL image"),
        (lambda: HuggingFaceImages(data, _transform, label="image")[0], "expected a class index"),
    ):
        with pytest.raises(ArgumentError, match=words):
            act()
