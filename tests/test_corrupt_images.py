"""Image files that cannot be read: named, or skipped and counted."""

import warnings

import pytest
import torch
from accelerate.state import AcceleratorState

from shapwrap.data import SkippedSampleWarning
from shapwrap.data.folder import load_folder
from shapwrap.errors import ArgumentError, ImageFileError
from tests.test_data import STATISTICS, write_folder
from tests.test_faults import _trainer


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def _corrupt(folder):
    """Three of ten pictures: cut off, empty, text."""
    write_folder(folder)
    cut = folder / "cat" / "cat1.png"
    cut.write_bytes(cut.read_bytes()[:-30])
    (folder / "dog" / "dog2.png").write_bytes(b"")
    (folder / "dog" / "dog0.png").write_text("no picture")
    return folder


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_named(tmp_path, workers):
    data = load_folder(_corrupt(tmp_path), (16, 16), STATISTICS, workers=workers)
    with pytest.raises(ImageFileError, match=r"(cat1|dog2|dog0).png cannot be read as an image"):
        list(data.train)


def test_training_stops_at_a_corrupt_image_and_says_so(tmp_path):
    data = load_folder(_corrupt(tmp_path / "data"), (12, 16), STATISTICS, batch_size=4)
    trainer = _trainer(tmp_path / "run", data.train)
    with pytest.raises(ImageFileError):
        trainer.fit()
    assert trainer.history.records[-1]["error"] == "ImageFileError"


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_images_are_skipped_and_counted(tmp_path, workers):
    folder = _corrupt(tmp_path)
    data = load_folder(folder, (16, 16), STATISTICS, workers=workers, corrupt="skip")
    clean = load_folder(folder, (16, 16), STATISTICS, corrupt="skip")
    assert data.skipped == 0
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        labels = torch.cat([labels for _, labels in data.train])
        # Every fifth validates: dog0 is one of them, and its place is taken by the other.
        held_out = torch.cat([images for images, _ in data.validation])
        expected = clean.validation.dataset[0][0]
        again = list(data.train)
    assert len(labels) == 8 == sum(len(labels) for _, labels in again)
    assert torch.equal(held_out, torch.stack([expected, expected]))
    assert data.skipped == 3
    assert data.train.dataset.skipped == [0, 5]
    if not workers:
        mine = [w for w in said if w.category is SkippedSampleWarning]
        # Three of this data, and dog0 was not asked for in the other.
        assert len(mine) == 3, "each once"
        assert any("dog2.png" in str(w.message) for w in mine)


def test_nothing_that_can_be_read(tmp_path):
    write_folder(tmp_path)
    for path in tmp_path.glob("*/*.png"):
        path.write_text("no picture")
    data = load_folder(tmp_path, (16, 16), STATISTICS, corrupt="skip")
    with (
        pytest.warns(SkippedSampleWarning),
        pytest.raises(ImageFileError, match="none of 8 images"),
    ):
        list(data.train)
    with pytest.raises(ArgumentError, match="corrupt is 'ignore'"):
        load_folder(tmp_path, (16, 16), STATISTICS, corrupt="ignore")
