"""Tables and figure of `compare_flickr8k.py`."""

import argparse
import json
from pathlib import Path
from textwrap import wrap

import matplotlib.pyplot as plt
import torch
from torch import Tensor


def table(rows: dict[str, dict[str, float]], columns: list[str]) -> str:
    """Markdown."""
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(f'{row[c]:.3f}' for c in columns)} |")
    return "\n".join(lines) + "\n"


def write(folder: Path, recalls: dict, curves: dict, options: argparse.Namespace) -> None:
    """JSON and Markdown."""
    recall_columns = list(next(iter(recalls.values())))
    parts = [table(recalls, recall_columns)]
    for kind in ("insertion", "deletion"):
        columns = [name for name in next(iter(curves.values())) if name.startswith(kind)]
        parts.append(table(curves, columns))
    (folder / "tables.md").write_text("\n".join(parts))
    found = {"retrieval": recalls, "curves": curves, "options": str(options)}
    found["torch"] = str(torch.__version__)
    (folder / "results.json").write_text(json.dumps(found, indent=2) + "\n")


def draw(folder: Path, pictures: Tensor, texts: list[str], maps: dict[str, Tensor]) -> None:
    """With photographs, and captions with maps alone for where photographs may not be shown."""
    draw_one(folder / "maps.png", pictures, texts, maps)
    draw_one(folder / "maps-alone.png", None, texts, maps)


def draw_one(
    file: Path, pictures: Tensor | None, texts: list[str], maps: dict[str, Tensor]
) -> None:
    """Images, and the maps of all methods: one colour scale a method, red for the text."""
    num = len(texts)
    figure, axes = plt.subplots(num, len(maps) + 1, figsize=(1.6 * len(maps) + 1.6, 1.9 * num))
    for row, text in enumerate(texts):
        caption = "\n".join(wrap(text, 34))
        if pictures is None:
            axes[row, 0].text(0.02, 0.5, caption, fontsize=5, va="center")
            axes[row, 0].axis("off")
        else:
            axes[row, 0].imshow(pictures[row].permute(1, 2, 0))
            axes[row, 0].set_xlabel(caption, fontsize=5, loc="left")
        for axis, (name, values) in zip(axes[row, 1:], maps.items(), strict=True):
            limit = float(values[:num].abs().max())
            axis.imshow(values[row], cmap="RdBu_r", vmin=-limit, vmax=limit)
            axis.set_title(name.strip("*") if row == 0 else "", fontsize=6)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.savefig(file, dpi=120, bbox_inches="tight")
    plt.close(figure)
