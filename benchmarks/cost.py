"""Cost of forward, explanation and training step, as multiples of the plain model in the same run.

python benchmarks/cost.py --models vit_tiny_patch16_224 resnet18 --batch 8
"""

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch
from torch.nn.functional import cross_entropy

from shapwrap import ShapleyWrapper, sample_coalitions, shapley_loss


def make_model(name: str, size: int | None) -> torch.nn.Module:
    """A model with ten classes, built for this size where it must be."""
    if size is not None:
        try:
            return timm.create_model(name, num_classes=10, img_size=size)
        except TypeError:
            pass
    return timm.create_model(name, num_classes=10)


def measure(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median over rounds of each call's time, relative to the first one's in the same round."""
    ratios: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        times = {}
        for name, call in calls.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            started = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name] = time.perf_counter() - started
        first = next(iter(times.values()))
        for name, seconds in times.items():
            ratios[name].append(seconds / first)
    # The first round warms up.
    return {name: statistics.median(values[1:]) for name, values in ratios.items()}


def main() -> None:
    """Print one table a model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["vit_tiny_patch16_224", "resnet18"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=None, help="pixels; the model's own if unset")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"torch {torch.__version__}, timm {timm.__version__}, {device}, batch {options.batch}")
    for name in options.models:
        torch.manual_seed(0)
        plain = make_model(name, options.size).to(device)
        size = None if options.size is None else (options.size, options.size)
        wrapped = ShapleyWrapper(make_model(name, options.size).to(device), image_size=size)
        images = torch.randn(options.batch, 3, *wrapped.image_size, device=device)
        labels = torch.zeros(options.batch, dtype=torch.long, device=device)
        generator = torch.Generator().manual_seed(0)

        def plain_step(plain=plain, images=images, labels=labels) -> None:
            cross_entropy(plain(images), labels).backward()

        def shapley_step(
            wrapped=wrapped, images=images, labels=labels, generator=generator
        ) -> None:
            coalitions = sample_coalitions(
                len(images), wrapped.num_patches, generator=generator, device=images.device
            )
            output = wrapped(images, coalitions, paired=True)
            (cross_entropy(output.logits, labels) + shapley_loss(output)).backward()

        plain.eval(), wrapped.eval()
        with torch.no_grad():
            forward = measure(
                {
                    "plain forward": lambda plain=plain, images=images: plain(images),
                    "wrapped forward": lambda w=wrapped, images=images: w(images),
                    "explain": lambda w=wrapped, images=images: w.explain(images),
                    "all patch values": lambda w=wrapped, images=images: w.attribute(images),
                },
                options.rounds,
            )
        plain.train(), wrapped.train()
        step = measure(
            {"plain step": plain_step, "step with a complement pair": shapley_step},
            max(3, options.rounds // 3),
        )
        print(name)
        for what, ratio in {**forward, **step}.items():
            print(f"  {what:28} {ratio:.2f} x")


if __name__ == "__main__":
    main()
