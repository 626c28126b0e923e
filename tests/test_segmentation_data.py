"""Loaders read files of each format, written here pixel by pixel."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from shapwrap.data import ImageNetS, ImageNetSegmentation, PetSegmentation
from shapwrap.errors import ArgumentError

SHARED = Path(__file__).parents[2] / "shared" / "data"
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


def noise(seed, height, width):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def nearest(mask, size):
    """Each pixel from the source pixel that holds its centre; none lies between two."""
    rows, columns = (
        ((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(size, mask.shape, strict=True)
    )
    return mask[rows][:, columns]


def normalised(image, size):
    """By Pillow's bilinear resize, then the formula."""
    drawn = Image.fromarray(image).convert("RGB").resize(size[::-1], Image.Resampling.BILINEAR)
    pixels = (np.asarray(drawn) / 255.0 - np.array(MEAN)) / np.array(STD)
    return torch.from_numpy(pixels.transpose(2, 0, 1)).float()


def check(item, image, mask, size):
    pixels, labels = item
    assert pixels.dtype == torch.float32 and labels.dtype == torch.int64
    torch.testing.assert_close(pixels, normalised(image, size), atol=1e-5, rtol=0)
    assert np.array_equal(labels.numpy(), nearest(mask, size))


@pytest.fixture
def segmentation_file(tmp_path):
    """As MATLAB 7.3 writes cells: object references, every axis reversed."""
    h5py = pytest.importorskip("h5py")
    images = [noise(0, 20, 30), noise(1, 25, 16), noise(2, 9, 12)[..., 0]]
    generator = np.random.default_rng(3)
    masks = [generator.integers(0, 2, image.shape[:2], dtype=np.uint8) for image in images]
    with h5py.File(tmp_path / "gtsegs_ijcv.mat", "w") as file:
        refs = file.create_group("#refs#")
        pointers = {"img": [], "gt": []}
        for number, (image, mask) in enumerate(zip(images, masks, strict=True)):
            first = refs.create_dataset(f"mask{number}", data=mask.T)
            other = refs.create_dataset(f"other{number}", data=1 - mask.T)
            cell = refs.create_dataset(f"gt{number}", (2, 1), dtype=h5py.ref_dtype)
            cell[0, 0], cell[1, 0] = first.ref, other.ref
            pointers["gt"].append(cell.ref)
            pointers["img"].append(refs.create_dataset(f"img{number}", data=image.T).ref)
        for name, references in pointers.items():
            column = file.create_dataset(f"value/{name}", (3, 1), dtype=h5py.ref_dtype)
            for number, reference in enumerate(references):
                column[number, 0] = reference
    return tmp_path / "gtsegs_ijcv.mat", images, masks


def test_imagenet_segmentation(segmentation_file):
    path, images, masks = segmentation_file
    data = ImageNetSegmentation(path, image_size=(16, 32), normalization=(MEAN, STD))
    assert len(data) == 3
    for index in range(3):
        check(data[index], images[index], masks[index], (16, 32))
    with pytest.raises(IndexError):
        data[3]
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again[1][0], data[1][0])
    batches = list(DataLoader(data, batch_size=2, num_workers=1))
    assert torch.equal(batches[0][1][1], data[1][1])


def test_imagenet_segmentation_of_another_kind(tmp_path, segmentation_file):
    h5py = pytest.importorskip("h5py")
    with pytest.raises(ArgumentError, match="cannot be read"):
        ImageNetSegmentation(tmp_path / "absent.mat")
    with h5py.File(tmp_path / "other.mat", "w") as file:
        file["data"] = [1]
    with pytest.raises(ArgumentError, match="expected gtsegs_ijcv"):
        ImageNetSegmentation(tmp_path / "other.mat")
    with h5py.File(segmentation_file[0], "r+") as file:
        file["#refs#/mask0"][0, 0] = 7
    with pytest.raises(ArgumentError, match="0 and 1 alone"):
        ImageNetSegmentation(segmentation_file[0])[0]


def coloured(ids):
    """Class ids as R + 256 G."""
    return np.stack((ids % 256, ids // 256, np.zeros_like(ids)), axis=-1).astype(np.uint8)


@pytest.fixture
def imagenet_s(tmp_path):
    """Three of the classes of a set whose last has the id 300."""
    wnids = [f"n{number:08d}" for number in range(300)]
    written = []
    for seed, (wnid, own) in enumerate((("n00000002", 3), ("n00000299", 300), ("n00000000", 1))):
        for part in ("validation", "validation-segmentation"):
            (tmp_path / "ImageNetS300" / part / wnid).mkdir(parents=True)
        ids = np.random.default_rng(seed).choice([0, own, 1000, 44], (12 + seed, 17))
        image = Image.fromarray(noise(seed, 12 + seed, 17))
        root = tmp_path / "ImageNetS300"
        image.save(root / "validation" / wnid / f"ILSVRC2012_val_{seed}.JPEG")
        Image.fromarray(coloured(ids)).save(
            root / "validation-segmentation" / wnid / f"ILSVRC2012_val_{seed}.png"
        )
        written.append((wnid, ids, own))
    return tmp_path / "ImageNetS300", wnids, sorted(written, key=lambda item: item[0])


def test_imagenet_s(imagenet_s):
    root, wnids, written = imagenet_s
    data = ImageNetS(root, classes=wnids, image_size=(16, 20), normalization=(MEAN, STD))
    assert len(data) == 3
    for index, (wnid, ids, own) in enumerate(written):
        (path,) = (root / "validation" / wnid).iterdir()
        mask = np.where(ids == 1000, -1, np.where(ids == own, 1, 0))
        assert (mask == 1).any() and (mask == -1).any()
        check(data[index], np.asarray(Image.open(path)), mask, (16, 20))


def test_imagenet_s_that_is_not_whole(imagenet_s):
    root, wnids, _ = imagenet_s
    with pytest.raises(ArgumentError, match="has 3 class folders, not 300"):
        ImageNetS(root)
    with pytest.raises(ArgumentError, match=r"n00000299'\], which classes= lacks"):
        ImageNetS(root, classes=wnids[:-1])
    with pytest.raises(ArgumentError, match="train-semi is no folder"):
        ImageNetS(root, "train-semi")
    next((root / "validation-segmentation" / "n00000002").iterdir()).unlink()
    with pytest.raises(ArgumentError, match="lacks 1 of their masks"):
        ImageNetS(root, classes=wnids)
    with pytest.raises(ArgumentError, match="two positive ints"):
        ImageNetS(root, classes=wnids, image_size=(0, 3))
    for wrong in (((0.5,) * 3, (0.5, 0.5, 0.0)), ((0.5, 0.5), (0.5,) * 3)):
        with pytest.raises(ArgumentError, match="one number a channel"):
            ImageNetS(root, classes=wnids, normalization=wrong)


def test_imagenet_s_by_its_own_folders(imagenet_s, tmp_path):
    """Without classes=, the place among the folders is the class id."""
    root, _, _ = imagenet_s
    renamed = root.rename(tmp_path / "three-classes")
    data = ImageNetS(renamed, image_size=(12, 17))
    assert data.classes == ["n00000000", "n00000002", "n00000299"]
    # Ids 1, 2, 3: the first folder's pixels are 1, the second's are 3, the third's 300.
    assert [(data[i][1] == 1).any().item() for i in range(3)] == [True, False, False]


@pytest.fixture
def pets(tmp_path):
    base = tmp_path / "oxford-iiit-pet"
    (base / "images").mkdir(parents=True)
    (base / "annotations" / "trimaps").mkdir(parents=True)
    trimaps = {}
    for seed, name in enumerate(("Abyssinian_1", "beagle_2")):
        Image.fromarray(noise(seed, 21, 15)).save(base / "images" / f"{name}.jpg")
        trimaps[name] = np.random.default_rng(seed).integers(1, 4, (21, 15), dtype=np.uint8)
        Image.fromarray(trimaps[name]).save(base / "annotations" / "trimaps" / f"{name}.png")
    lines = "Abyssinian_1 1 1 1\nbeagle_2 2 2 1\n"
    (base / "annotations" / "test.txt").write_text(lines)
    return tmp_path, trimaps


def test_pets(pets):
    root, trimaps = pets
    data = PetSegmentation(root, image_size=(30, 16), normalization=(MEAN, STD))
    assert len(data) == 2 and data.class_names == ["Abyssinian", "Beagle"]
    for index, name in enumerate(("Abyssinian_1", "beagle_2")):
        mask = np.select([trimaps[name] == 1, trimaps[name] == 2], [1, 0], -1)
        image = np.asarray(Image.open(root / "oxford-iiit-pet" / "images" / f"{name}.jpg"))
        check(data[index], image, mask, (30, 16))


def test_pets_that_are_not_there(pets):
    root, _ = pets
    with pytest.raises(ArgumentError, match="download=True"):
        PetSegmentation(root / "absent")
    with pytest.raises(ArgumentError, match="expected 'test' or 'trainval'"):
        PetSegmentation(root, "val")
    path = root / "oxford-iiit-pet" / "annotations" / "trimaps" / "beagle_2.png"
    Image.fromarray(np.zeros((21, 15), dtype=np.uint8)).save(path)
    with pytest.raises(ArgumentError, match="1, 2 and 3 alone"):
        PetSegmentation(root)[1]


@pytest.mark.skipif(
    not (SHARED / "oxford-iiit-pet" / "images").is_dir(), reason="Oxford-IIIT Pet is not here"
)
def test_real_pets_stand_in_the_middle():
    data = PetSegmentation(SHARED, image_size=(64, 96))
    masks = torch.stack([data[index][1] for index in range(0, len(data), max(1, len(data) // 20))])
    assert set(masks.unique().tolist()) == {-1, 0, 1}
    objects = (masks == 1).float()
    assert 0.1 < objects.mean() < 0.6
    assert objects[:, 24:40, 36:60].mean() > 2 * objects[:, :8].mean()
