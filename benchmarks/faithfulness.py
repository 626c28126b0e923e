"""Throughput of region perturbation and pixel flipping against Quantus, on the same numbers.

python benchmarks/faithfulness.py --models none resnet18 --batch 8 --rounds 3

Both sides get the same images, maps, model, class, filler (black) and precision. `--batch` images
of Quantus go through the model at a time, and `--chunk-size` perturbed copies of ours; equal by
default. Three comparisons:

AOPC of patches: mean drop with 10 to 90 % of the 16 x 16 patches gone. Quantus' RegionPerturbation
    takes one patch after the other and runs the model each time; its curve is read where
    floor(k N / 100) patches are gone. We run the model at the nine points.
Every patch: the whole curve of the same run of RegionPerturbation, one model run a patch on both
    sides.
Pixel flipping: 1/9 to 9/9 of the pixels gone. PixelFlipping ranks pixel and channel apart, so the
    map is the same for the three channels and a step is a third of the pixels' number, which takes
    whole pixels. One model run a step on both sides, and one more on ours, for the clean image.

The numbers of both must agree, or the script fails.
"""

import argparse
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from shapwrap import __version__
from shapwrap.metrics import faithfulness, predictor

HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
PATCH = 16
Curve = np.ndarray
"""Probability drops [B, S]."""


class Normalized(nn.Module):
    """Images in [0, 1] in, as Quantus needs a module."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.model((images - 0.5) / 0.5)


def make_model(name: str, size: int) -> nn.Module:
    """A timm model with random weights, or one that costs nothing: the mean colours."""
    if name == "none":
        model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))
        return model.eval()
    try:
        return timm.create_model(name, num_classes=10, img_size=size).eval()
    except TypeError:
        return timm.create_model(name, num_classes=10).eval()


def timed(call: Callable[[], Curve], rounds: int) -> tuple[float, float, Curve]:
    """Median wall and processor seconds, and what came out."""
    walls, processors, result = [], [], np.empty(0)
    for _ in range(rounds):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        wall, processor = time.perf_counter(), time.process_time()
        result = call()
        walls.append(time.perf_counter() - wall)
        processors.append(time.process_time() - processor)
    return statistics.median(walls), statistics.median(processors), result


def compare(name: str, size: int, options: argparse.Namespace, device: str) -> None:
    """Print three lines for a model."""
    import quantus

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = make_model(name, size).to(device)
    images = torch.rand(options.batch, 3, size, size, generator=generator).to(device)
    maps = torch.randn(options.batch, size, size, generator=generator).to(device)
    predict, module = predictor(model, HALVES), Normalized(model).eval()
    with torch.no_grad():
        target = module(images).argmax(dim=1)
    side = size // PATCH
    cells, pixels = side * side, size * size
    counts = [cells * k // 100 for k in range(10, 100, 10)]

    def ours(**chosen: Any) -> Curve:
        scores = faithfulness(
            predict,
            images,
            maps,
            target=target,
            metrics="aopc",
            chunk_size=options.chunk_size,
            **chosen,
        )
        return scores.curves["aopc"].cpu().numpy()

    def theirs(metric: Callable) -> Curve:
        result = metric(
            model=module,
            x_batch=images.cpu().numpy(),
            y_batch=target.cpu().numpy(),
            a_batch=maps[:, None].cpu().numpy(),
            device=device,
            softmax=True,
            channel_first=True,
            batch_size=options.batch,
        )
        return np.asarray(result)

    common = {"normalise": False, "abs": False, "disable_warnings": True, "perturb_baseline": 0.0}
    regions = quantus.RegionPerturbation(
        patch_size=PATCH, regions_evaluation=counts[-1], order="morf", **common
    )
    flipping = quantus.PixelFlipping(features_in_step=pixels // 3, **common)
    patches = {"ranking": "patch", "grid": (side, side)}
    every = [n / cells for n in range(1, counts[-1] + 1)]
    ours(**patches)

    whole = timed(lambda: theirs(regions), options.rounds)
    at_points = timed(lambda: ours(**patches), options.rounds)
    at_every = timed(lambda: ours(**patches, fractions=every), options.rounds)
    flipped = timed(lambda: theirs(flipping), options.rounds)
    attcat = timed(lambda: ours(fractions="attcat"), options.rounds)
    with torch.no_grad():
        clean = module(images).softmax(dim=1).gather(1, target[:, None]).cpu().numpy()

    selected = whole[2][:, [n - 1 for n in counts]]
    rows = [
        ("AOPC of patches", whole, at_points, selected, counts[-1] + 1, len(counts) + 1),
        ("every patch", whole, at_every, whole[2], counts[-1] + 1, counts[-1] + 1),
        ("pixel flipping", flipped, attcat, clean - flipped[2], 9, 10),
    ]
    for row, other, own, expected, runs, own_runs in rows:
        difference = np.abs(own[2] - expected).max()
        if not difference < 1e-4:
            raise SystemExit(f"{name}, {row}: the numbers differ by {difference:.2g}")
        print(
            f"| {name} | {row} | {runs} | {own_runs} | {other[0]:.3f} ({other[1]:.3f}) | "
            f"{own[0]:.3f} ({own[1]:.3f}) | {other[0] / own[0]:.1f} ({other[1] / own[1]:.1f}) | "
            f"{difference:.0e} |",
            flush=True,
        )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["none", "resnet18", "vit_tiny_patch16_224"])
    parser.add_argument("--batch", type=int, default=8, help="images of Quantus at a time")
    parser.add_argument("--size", type=int, default=240, help="pixels, a multiple of 48")
    parser.add_argument("--chunk-size", type=int, default=8, help="copies of ours at a time")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.size % 48:
        parser.error("--size must be a multiple of 48: whole patches, and thirds of all pixels")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    print(
        f"shapwrap {__version__}, quantus "
        f"{version('quantus')}, torch {torch.__version__}, timm {timm.__version__}, numpy "
        f"{np.__version__}, {where}, {torch.get_num_threads()} of {os.cpu_count()} threads; "
        f"{options.batch} images of {options.size} x {options.size}, chunks of "
        f"{options.chunk_size}, median of {options.rounds}, seconds: wall (processor)"
    )
    print(
        "| model | metric | model runs an image, Quantus | ours | Quantus | ours | ratio | differ |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in options.models:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compare(name, options.size, options, device)


if __name__ == "__main__":
    main()
