"""`shapwrap demo`: the main job on embedded data, with numbers that can be checked exactly."""

import json
import platform
import time
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from shapwrap._version import __version__
from shapwrap.data import ClutteredDigits, efficientnet_lite0, localisation
from shapwrap.training.config import TrainerConfig
from shapwrap.training.trainer import Trainer
from shapwrap.wrapper import ShapleyWrapper

TRAIN_IMAGES = 1000
TEST_IMAGES = 200
IMAGE_SIZE = (112, 112)
GRID = (7, 7)

# The images are far from ImageNet, so the first stage lets batch statistics adapt to them.
PLAIN = {
    "epochs": 3,
    "learning_rate": 1e-3,
    "shapley_weight": 0.0,
    "masked_cross_entropy": 0.0,
    "freeze_batch_norm": False,
}
SHAPLEY = {
    "epochs": 2,
    "learning_rate": 5e-4,
    "head_multiplier": 1.0,
    "shapley_weight": 1.0,
    "shapley_ramp": 0.5,
}


class Scenes(NamedTuple):
    """A set of canvases, in memory."""

    images: Tensor
    labels: Tensor
    evidence: Tensor

    def batches(self, size: int, *, shuffle: bool = False) -> DataLoader:
        """Batches of images and labels."""
        return DataLoader(TensorDataset(self.images, self.labels), size, shuffle=shuffle)


def run(
    out: Path, *, seed: int, train_images: int, test_images: int, console: Console
) -> dict[str, Any]:
    """Fine-tunes plainly, then with the Shapley loss; prints a table, writes figures and JSON."""
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    train = draw_scenes("train", train_images, seed)
    test = draw_scenes("test", test_images, seed)
    wrapped = ShapleyWrapper(
        efficientnet_lite0(num_classes=10),
        grid=GRID,
        image_size=IMAGE_SIZE,
        class_names=ClutteredDigits.class_names,
    )
    console.print(str(wrapped.report()), soft_wrap=True)
    results: dict[str, dict[str, float]] = {}
    for name, title, settings in (
        ("before", "plain fine-tuning", PLAIN),
        ("after", "fine-tuning with the Shapley loss", SHAPLEY),
    ):
        console.print(f"\n{title}, {settings['epochs']} epochs of {train_images} images")
        config = TrainerConfig(seed=seed, **settings)
        trainer = Trainer(wrapped, train.batches(32, shuffle=True), test.batches(50), config=config)
        trainer.fit()
        results[name] = {**trainer.evaluate(), **_explanation_scores(wrapped, test)}
    _write_figures(wrapped, test, out)
    record = {
        **results,
        "seed": seed,
        "train_images": train_images,
        "test_images": test_images,
        "seconds": round(time.perf_counter() - started, 1),
        "machine": {"platform": platform.platform(), "threads": torch.get_num_threads()},
        "versions": {
            "shapwrap": __version__,
            "torch": str(torch.__version__),
            "timm": timm.__version__,
        },
    }
    (out / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    console.print(_table(results))
    console.print(f"figures and results.json in {out}/, after {record['seconds']:.0f} s")
    return record


def draw_scenes(split: Any, count: int, seed: int) -> Scenes:
    """The first canvases of a split."""
    scenes = ClutteredDigits(split, num_images=count, image_size=IMAGE_SIZE, seed=seed)
    drawn = [scenes.scene(index) for index in range(count)]
    return Scenes(
        torch.stack([scene.image for scene in drawn]),
        torch.tensor([scene.label for scene in drawn]),
        torch.stack([scene.evidence for scene in drawn]),
    )


def _explanation_scores(wrapped: ShapleyWrapper, test: Scenes) -> dict[str, float]:
    """Pointing game of the true class against chance, and the largest efficiency gap."""
    hits, chances, gaps = [], [], []
    for images, labels, evidence in zip(*(part.split(50) for part in test), strict=True):
        explanation = wrapped.explain(images, labels, contrast=True)
        found = localisation(explanation, evidence)
        hits.append(found.hit)
        chances.append(found.chance)
        gaps.append(explanation.efficiency_gap())
    return {
        "localisation_hit_rate": float(torch.cat(hits).mean()),
        "localisation_chance": float(torch.cat(chances).mean()),
        "efficiency_gap": float(torch.cat(gaps).max()),
    }


def _write_figures(wrapped: ShapleyWrapper, test: Scenes, out: Path) -> None:
    for number in range(3):
        rows = slice(4 * number, 4 * number + 4)
        explanation = wrapped.explain(test.images[rows], contrast=True)
        figure = explanation.plot(test.images[rows])
        figure.savefig(out / f"explanation-{number + 1}.png", dpi=100)


def _table(results: dict[str, dict[str, float]]) -> Table:
    table = Table(title="Digits among clutter, held-out writers")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    rows = (
        ("accuracy", "accuracy", "{:.3f}"),
        ("skill", "skill", "{:.3f}"),
        ("localisation hit rate", "localisation_hit_rate", "{:.3f}"),
        ("  by chance", "localisation_chance", "{:.3f}"),
        ("largest efficiency gap", "efficiency_gap", "{:.1e}"),
    )
    for label, key, form in rows:
        table.add_row(label, *(form.format(results[when][key]) for when in ("before", "after")))
    return table
