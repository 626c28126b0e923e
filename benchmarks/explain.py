"""Cost of an explanation, as multiples of the plain forward pass of the unwrapped model.

python benchmarks/explain.py --models vit_small_patch16_224 resnet50 --batch 8

Every number is taken in the same run, in turns: the median over rounds of the time divided by that
of the plain forward pass of the same round. The wrapped model gives logits with the explanation of
the predicted class, or of all classes; Grad-CAM, integrated gradients and KernelSHAP explain the
predicted class of the same images, each with its forward pass for that class.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from measuring import (
    PRECISIONS,
    Call,
    Measured,
    as_line,
    as_records,
    as_table,
    bytes_of,
    default_device,
    measure,
    plain_and_wrapped,
    random_images,
    surroundings,
    write,
)

from shapwrap.explainers import GradCAM, IntegratedGradients, KernelSHAP


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one table a model."""
    device = default_device()
    cuda = device.type == "cuda"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["vit_tiny_patch16_224", "resnet18"])
    parser.add_argument("--batch", type=int, default=32 if cuda else 8)
    parser.add_argument("--size", type=int, default=None, help="pixels; the model's own if unset")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--ig-steps", type=int, default=50)
    parser.add_argument("--coalitions", type=int, default=512, help="of KernelSHAP, an image")
    parser.add_argument(
        "--precision", choices=list(PRECISIONS), default="bf16" if cuda else "float32"
    )
    parser.add_argument("--rounds", type=int, default=30 if cuda else 15)
    parser.add_argument("--slow-rounds", type=int, default=5 if cuda else 1, help="of the others")
    parser.add_argument("--json", type=Path, default=None, help="file to write the numbers to")
    options = parser.parse_args(arguments)
    facts = surroundings(device)
    print(f"{as_line(facts)}, {options.precision}, batch {options.batch}")
    results = []
    for name in options.models:
        measured = _measure(name, options, device)
        print(f"{name}\n{as_table(measured)}")
        results.append({"model": name, "calls": as_records(measured)})
    if options.json is not None:
        write(options.json, facts, options, results)


def _measure(name, options, device) -> dict[str, Measured]:
    plain, wrapped = plain_and_wrapped(name, options.classes, options.size, device)
    plain.eval()
    wrapped.eval()
    images = random_images(options.batch, wrapped, device)
    precision = PRECISIONS[options.precision]

    def without_gradients(call) -> Call:
        def run() -> None:
            with torch.no_grad(), autocast():
                call(images)

        return run

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, dtype=precision, enabled=precision is not None)

    def all_classes(given) -> tuple[torch.Tensor, torch.Tensor]:
        values = wrapped.attribute(given)
        return values.sum(dim=1), values

    forward = {"plain forward": without_gradients(plain)}
    ours = {
        "wrapped forward": without_gradients(wrapped),
        "predicted class": without_gradients(wrapped.explain),
        f"all {options.classes} classes": without_gradients(all_classes),
    }
    others = {
        "Grad-CAM": GradCAM(plain),
        f"integrated gradients, {options.ig_steps}": IntegratedGradients(
            plain, n_steps=options.ig_steps
        ),
        f"KernelSHAP, {options.coalitions}": KernelSHAP(plain, num_coalitions=options.coalitions),
    }

    def explaining(method) -> Call:
        def run() -> None:
            with autocast():
                method(images)

        return run

    slow = {label: explaining(method) for label, method in others.items()}
    weights = bytes_of([*plain.parameters(), *plain.buffers()])
    held = dict.fromkeys([*forward, *ours, *slow], weights)
    measured = measure(forward | ours, options.rounds, device, held)
    beside = measure(forward | slow, options.slow_rounds, device, held)
    del beside["plain forward"]
    return measured | beside


if __name__ == "__main__":
    main()
