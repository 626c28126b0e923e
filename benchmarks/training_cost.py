"""What a training run costs on a cluster, from one measured step time.

    python benchmarks/training_cost.py
    python benchmarks/training_cost.py --step-ms 92.2 --gpus 16 --epochs 30

One number is measured and given: the time of a step of ViT-B/16 at 224 pixels with a complement
pair on one GPU (`benchmarks/step.py --models vit_base_patch16_224`). Another model is taken to run
at the same multiply-adds a second; those are counted here, on the models themselves. Everything
else that is assumed is an option, and printed.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import open_clip
import timm
import torch

from shapwrap import ShapleyWrapper, sample_coalitions
from shapwrap.flops import count_operations

BACKWARD = 2
"""Multiply-adds of a backward pass, in those of the forward pass."""


@dataclass(frozen=True)
class Job:
    """A data set and a model."""

    name: str
    images: int
    kilobytes: float
    """Of an encoded sample, as stored."""
    multiply_adds: float
    """Of a step, an image: forward passes, and backward passes of what is trained."""
    parameters: int
    """That are trained."""
    frozen: int = 0


def trained_passes(model: torch.nn.Module, size: int) -> float:
    """Multiply-adds of both branches with a complement pair, forward and backward, an image."""
    wrapped = ShapleyWrapper(model, image_size=(size, size))
    images = torch.randn(1, 3, size, size)
    generator = torch.Generator().manual_seed(0)
    coalitions = sample_coalitions(1, wrapped.num_patches, generator=generator)
    with torch.no_grad():
        forward = count_operations(lambda: wrapped(images, coalitions, paired=True))
    return (1 + BACKWARD) * forward


def count(module: torch.nn.Module) -> int:
    """Parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def imagenet(kilobytes: float) -> Job:
    """ImageNet-1k with ViT-B/16."""
    model = timm.create_model("vit_base_patch16_224").eval()
    parameters = count(model)
    return Job(
        "ImageNet-1k, ViT-B/16", 1_281_167, kilobytes, trained_passes(model, 224), parameters
    )


def cc3m(images: int, kilobytes: float) -> Job:
    """CC3M with EVA02-B/16, the text tower frozen."""
    clip = open_clip.create_model("EVA02-B-16").eval()
    tokens = torch.zeros(1, clip.context_length, dtype=torch.long)
    with torch.no_grad():
        text = count_operations(lambda: clip.encode_text(tokens))
    tower = ShapleyWrapper(clip)
    pixels = torch.randn(1, 3, 224, 224)
    generator = torch.Generator().manual_seed(0)
    coalitions = sample_coalitions(1, tower.num_patches, generator=generator)
    with torch.no_grad():
        both = count_operations(lambda: tower(pixels, tokens, coalitions))
    visual = both - text
    total, image = count(clip), count(clip.visual)
    work = (1 + BACKWARD) * visual + text
    return Job("CC3M, EVA02-B/16", images, kilobytes, work, image, total - image)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the assumptions and one row a job."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--step-ms", type=float, default=102.3, help="ViT-B/16, a pair, bf16, one GPU")
    add("--step-batch", type=int, default=128, help="images of that step")
    add("--gpus", type=int, default=8)
    add("--efficiency", type=float, default=0.9, help="of the GPUs together, against one alone")
    add("--epochs", type=int, default=10)
    add("--cc3m-images", type=int, default=2_900_000, help="that can still be fetched")
    add("--imagenet-kilobytes", type=float, default=110.0, help="of a JPEG")
    add("--cc3m-kilobytes", type=float, default=50.0, help="of a sample, short side 288")
    options = parser.parse_args(arguments)
    print(f"assumed: {vars(options)}, backward = {BACKWARD} x forward")
    jobs = [
        imagenet(options.imagenet_kilobytes),
        cc3m(options.cc3m_images, options.cc3m_kilobytes),
    ]
    per_second = options.step_batch / options.step_ms * 1000 * jobs[0].multiply_adds
    print(f"one GPU: {per_second / 1e12:.1f} T multiply-adds a second\n")
    print("| run | G multiply-adds an image | images/s | hours | GPU hours | read, MB/s |")
    print("|---|---:|---:|---:|---:|---:|")
    for job in jobs:
        speed = per_second / job.multiply_adds * options.gpus * options.efficiency
        hours = job.images * options.epochs / speed / 3600
        row = (f"{job.multiply_adds / 1e9:.1f}", f"{speed:,.0f}", f"{hours:.1f}")
        row += (f"{hours * options.gpus:.0f}", f"{speed * job.kilobytes / 1000:,.0f}")
        print(f"| {job.name}, {options.epochs} epochs | {' | '.join(row)} |")
    held = "weights, gradients, AdamW, GB a GPU"
    print(f"\n| run | trained parameters, M | {held} | with FSDP2 |")
    print("|---|---:|---:|---:|")
    for job in jobs:
        held = (16 * job.parameters + 4 * job.frozen) / 1e9
        shared = (16 * job.parameters / options.gpus + 4 * job.frozen) / 1e9
        print(f"| {job.name} | {job.parameters / 1e6:.1f} | {held:.2f} | {shared:.2f} |")


if __name__ == "__main__":
    main()
