"""Explanations made by hand, and what a page holds of them, read without the page's own code."""

import base64
import json
import re
import struct
import zlib

import torch

from shapwrap import Explanation

HOSTILE = "</script><img src=x onerror=document.title='hacked'>\u2028{{data}}"


def made_explanation(grid=(5, 7), num_classes=400, batch=2, seed=0, size=(50, 70), **changes):
    """Values of all classes that add up with a baseline, of 400 classes: too many to keep whole."""
    generator = torch.Generator().manual_seed(seed)
    patches = grid[0] * grid[1]
    values = torch.randn(batch, patches, num_classes, generator=generator)
    baseline = torch.randn(num_classes, generator=generator)
    logits = baseline + values.double().sum(dim=1).float()
    target = logits.argmax(dim=1)
    names = [f"thing {index}" for index in range(num_classes)]
    names[3] = HOSTILE
    fields = {
        "values": values[torch.arange(batch), :, target],
        "logits": logits,
        "target": target,
        "grid": grid,
        "image_size": size,
        "class_names": names,
        "baseline": baseline,
        "all_values": values,
    }
    return Explanation(**(fields | changes))


def pictures(batch=2, size=(50, 70)):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(7))


def held(page):
    """The data of a page, as JSON."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found[1])


def floats(text):
    raw = base64.b64decode(text)
    return torch.tensor(struct.unpack(f"<{len(raw) // 4}f", raw), dtype=torch.float64)


def counts(text, patches):
    raw = zlib.decompress(base64.b64decode(text))
    numbers = torch.tensor([byte - 256 if byte > 127 else byte for byte in raw])
    return numbers.reshape(-1, patches).double()
