"""Cost of a training step, as multiples of the plain fine-tune step of the unwrapped model.

python benchmarks/step.py --models vit_small_patch16_224 resnet50 --batch 32

Every number is taken in the same run, in turns: the median over rounds of the time of a step (draw
coalitions, forward, loss, backward, AdamW) divided by that of the plain step of the same round, and
the peak memory (weights, optimizer state, gradients, activations) too. "compiled" compares with
the plain step under torch.compile. On CUDA the default is bf16 autocast and both modes; on a CPU
float32 and eager.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from measuring import (
    PRECISIONS,
    Measured,
    Step,
    as_line,
    as_records,
    as_table,
    default_device,
    measure,
    plain_and_wrapped,
    random_images,
    surroundings,
    write,
)

MODES = ("eager", "compiled")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one table a model and mode."""
    device = default_device()
    cuda = device.type == "cuda"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["vit_tiny_patch16_224", "resnet18"])
    parser.add_argument("--batch", type=int, default=128 if cuda else 8)
    parser.add_argument("--size", type=int, default=None, help="pixels; the model's own if unset")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--coalitions", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES[: 2 if cuda else 1])
    parser.add_argument(
        "--precision", choices=list(PRECISIONS), default="bf16" if cuda else "float32"
    )
    parser.add_argument("--rounds", type=int, default=20 if cuda else 7)
    parser.add_argument("--json", type=Path, default=None, help="file to write the numbers to")
    options = parser.parse_args(arguments)
    facts = surroundings(device)
    print(f"{as_line(facts)}, {options.precision}, batch {options.batch}")
    results = []
    for name in options.models:
        for mode in options.modes:
            measured, masking = _measure(name, mode, options, device)
            print(f"{name}, {masking}, {mode}\n{as_table(measured)}")
            results.append(
                {"model": name, "masking": masking, "mode": mode, "steps": as_records(measured)}
            )
    if options.json is not None:
        write(options.json, facts, options, results)


def _measure(name, mode, options, device) -> tuple[dict[str, Measured], str]:
    plain, wrapped = plain_and_wrapped(name, options.classes, options.size, device)
    images = random_images(options.batch, wrapped, device)
    how = {"compiled": mode == "compiled", "precision": PRECISIONS[options.precision]}
    steps = {"plain step": Step(plain, images, **how)}
    for num in options.coalitions:
        words = {1: "one coalition", 2: "a complement pair"}.get(num, f"{num} coalitions")
        steps[words] = Step(wrapped, images, num, **how)
    held = {label: step.held_bytes() for label, step in steps.items()}
    return measure(steps, options.rounds, device, held), wrapped.report().masking


if __name__ == "__main__":
    main()
