"""Small WebDataset shards, written for a test."""

import io
import json
import tarfile

import torch
from PIL import Image

SIZE = (8, 12)


def picture(number, kind="PNG", size=SIZE):
    """An image that says its number: red is number % 256, green is what is above."""
    image = Image.new("RGB", (size[1], size[0]), (number % 256, number // 256, 7))
    data = io.BytesIO()
    image.save(data, kind, **({"quality": 100} if kind == "JPEG" else {"lossless": True}))
    return data.getvalue()


def write_shard(path, samples):
    """Samples as (key, {extension: bytes or text})."""
    with tarfile.open(path, "w") as archive:
        for key, fields in samples:
            for extension, data in fields.items():
                data = data.encode() if isinstance(data, str) else data
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


def sample(number, **fields):
    several = json.dumps({"captions": [f"text {number}", f"other {number}"], "width": 3})
    return f"{number:06d}", {
        "png": picture(number),
        "txt": f"text {number}",
        "json": several,
    } | fields


def write_shards(folder, sizes=(7, 4, 9, 6), start=0):
    paths = []
    for index, size in enumerate(sizes):
        path = folder / f"part-{index:03d}.tar"
        paths.append(str(write_shard(path, [sample(start + i) for i in range(size)])))
        start += size
    return paths


def pixels(image):
    """A transform: the image as numbers 0 to 255."""
    flat = torch.tensor(list(image.tobytes()), dtype=torch.float32)
    return flat.unflatten(0, (image.height, image.width, 3)).permute(2, 0, 1)


def jittered(image):
    """A transform that draws."""
    return pixels(image) + torch.rand(()) * 0.4


def numbers(batch):
    """Which samples a batch has, by its images, after checking them against its captions."""
    images, texts = batch
    found = [int(image[0, 0, 0]) + 256 * int(image[1, 0, 0]) for image in images]
    assert [text.split()[1] for text in texts] == list(map(str, found))
    return found
