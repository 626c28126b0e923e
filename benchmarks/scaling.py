"""Time and memory of a training step as patches, classes, batch and coalitions grow.

python benchmarks/scaling.py --model vit_tiny_patch16_224 --json scaling.json --figure scaling.png

One of the four is changed at a time. At each point the step with coalitions and the plain fine-tune
step of the unwrapped model are measured in turns, so that every ratio is of one moment. The figure
shows both, in multiples of the plain step at the base point; `--redraw` draws it from the file.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring import (
    PRECISIONS,
    Step,
    as_line,
    default_device,
    measure,
    plain_and_wrapped,
    random_images,
    surroundings,
)

AXES = {
    "size": "patches N",
    "classes": "classes K",
    "batch": "batch B",
    "coalitions": "coalitions S",
}
BASE = {"size": 224, "classes": 1000, "batch": 8, "coalitions": 2}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the numbers, draw the figure."""
    device = default_device()
    cuda = device.type == "cuda"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--sizes", type=int, nargs="*", default=[112, 160, 224, 320, 448])
    parser.add_argument("--classes", type=int, nargs="*", default=[10, 100, 1000, 10000, 21841])
    parser.add_argument("--batches", type=int, nargs="*", default=[2, 4, 8, 16, 32])
    parser.add_argument("--coalitions", type=int, nargs="*", default=[2, 4, 8, 16])
    for name, value in BASE.items():
        text = f"{AXES[name]} where another one grows"
        if name == "size":
            text = "pixels of a side where another one grows"
        parser.add_argument(f"--base-{name}", type=int, default=value, help=text)
    parser.add_argument(
        "--precision", choices=list(PRECISIONS), default="bf16" if cuda else "float32"
    )
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--rounds", type=int, default=20 if cuda else 5)
    parser.add_argument("--json", type=Path, required=True, help="file of the numbers")
    parser.add_argument("--figure", type=Path, default=None, help="image file to draw")
    parser.add_argument("--redraw", action="store_true", help="draw what the file holds")
    options = parser.parse_args(arguments)
    if options.redraw:
        found = json.loads(options.json.read_text())
    else:
        found = _measure(options, device)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.figure is not None:
        _draw(found, options.figure)


def _measure(options, device) -> dict[str, Any]:
    facts = surroundings(device)
    print(f"{options.model}, {as_line(facts)}, {options.precision}")
    base = {name: getattr(options, f"base_{name}") for name in BASE}
    grown = {
        "size": options.sizes,
        "classes": options.classes,
        "batch": options.batches,
        "coalitions": options.coalitions,
    }
    points = []
    for axis, values in grown.items():
        for value in values:
            at = base | {axis: value}
            point = _point(options, at, device)
            points.append({"axis": axis, **at, **point})
            growing = point["patches"] if axis == "size" else value
            time, memory = point["seconds_ratio"], point["bytes_ratio"]
            print(f"  {AXES[axis]:14} {growing:6} time {time:5.2f} x, memory {memory:5.2f} x")
    return {
        "model": options.model,
        "precision": options.precision,
        "compiled": options.compiled,
        "rounds": options.rounds,
        "base": base,
        "surroundings": facts,
        "points": points,
    }


def _point(options, at: dict[str, int], device) -> dict[str, Any]:
    plain, wrapped = plain_and_wrapped(options.model, at["classes"], at["size"], device)
    images = random_images(at["batch"], wrapped, device)
    how = {"compiled": options.compiled, "precision": PRECISIONS[options.precision]}
    steps = {
        "plain": Step(plain, images, **how),
        "shapley": Step(wrapped, images, at["coalitions"], **how),
    }
    held = {label: step.held_bytes() for label, step in steps.items()}
    measured = measure(steps, options.rounds, device, held)
    return {
        "patches": wrapped.num_patches,
        "plain_seconds": measured["plain"].seconds,
        "shapley_seconds": measured["shapley"].seconds,
        "seconds_ratio": measured["shapley"].ratio,
        "seconds_ratio_spread": measured["shapley"].spread,
        "plain_bytes": measured["plain"].peak_bytes,
        "shapley_bytes": measured["shapley"].peak_bytes,
        "bytes_ratio": measured["shapley"].peak_ratio,
    }


def _draw(found: dict[str, Any], file: Path) -> None:
    """Four columns, one for each of what grows; time above, peak memory below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = found["points"]
    axes = [axis for axis in AXES if any(point["axis"] == axis for point in points)]
    reference = next(
        (p for p in points if all(p[name] == value for name, value in found["base"].items())),
        points[0],
    )
    figure = Figure(figsize=(3 * len(axes), 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(axes), squeeze=False)
    for column, axis in enumerate(axes):
        own = [point for point in points if point["axis"] == axis]
        across = [point["patches" if axis == "size" else axis] for point in own]
        for row, (quantity, label) in enumerate((("seconds", "time"), ("bytes", "peak memory"))):
            panel = grid[row][column]
            unit = reference[f"plain_{quantity}"]
            for kind, style, name in (
                ("plain", "o--", "plain step"),
                ("shapley", "o-", "SVO step"),
            ):
                panel.plot(across, [p[f"{kind}_{quantity}"] / unit for p in own], style, label=name)
            panel.set_xscale("log", base=2 if axis in ("batch", "coalitions") else 10)
            panel.set_yscale("log", base=2)
            panel.yaxis.set_major_formatter("{x:g}")
            panel.grid(alpha=0.3)
            if row:
                panel.set_xlabel(AXES[axis])
            if column == 0:
                panel.set_ylabel(f"{label}, in plain steps\nat the base point")
    grid[0][0].legend(frameon=False)
    base = ", ".join(f"{AXES[name]} {reference[_named(name)]}" for name in found["base"])
    figure.suptitle(f"{found['model']}, {found['precision']}; base: {base}", fontsize=9)
    figure.savefig(file, dpi=150)


def _named(axis: str) -> str:
    return "patches" if axis == "size" else axis


if __name__ == "__main__":
    main()
