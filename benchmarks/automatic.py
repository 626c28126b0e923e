"""shapley_weight="auto" on three backbones and data sets, with the same numbers everywhere.

    python benchmarks/automatic.py --data ../shared/data --weights ../shared/weights

Trains ViT-S/14 and EfficientNet-Lite0 on a part of Imagenette, and EfficientNet-Lite0 on the
embedded digits, each once plainly (the reference of the budget) and once with the automatic weight.
Accuracy is held on training images that are kept out of training; the table is measured on others:
the validation split with --final, else a held-out part of the training split. One JSON a run, and a
run that is there is not made again; then `table.md` of all. Without --data, the digits alone.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import timm
import torch
from ablation import BASE, make_model, mean_and_spread, measure
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision.datasets import Imagenette

from shapwrap import ShapleyWrapper, Trainer, TrainerConfig, __version__
from shapwrap.cli.demo import Scenes, draw_scenes
from shapwrap.data import efficientnet_lite0
from shapwrap.data.folder import evenly_spread, image_transform

RATES = {"vit": 5e-5, "cnn": 3e-4, "digits": 1e-3}
CONTROL = 400


def imagenette(options, wrapped) -> tuple[Dataset, Dataset, Dataset]:
    """Training, control and test images."""
    size = (options.size, options.size)

    def read(split: str, augment: bool) -> Imagenette:
        transform = image_transform(size, wrapped.normalization, augment=augment)
        return Imagenette(options.data, split=split, size="160px", transform=transform)

    training, plain = read("train", True), read("train", False)
    control, held_out = (list(range(first, len(plain), 10)) for first in (0, 1))
    rest = [i for i in range(len(plain)) if i % 10 > 1]
    test = read("val", False) if options.final else evenly_spread(Subset(plain, held_out), 900)
    return (
        evenly_spread(Subset(training, rest), options.train_images),
        evenly_spread(Subset(plain, control), CONTROL),
        test,
    )


def digits(options) -> tuple[Dataset, Dataset, Dataset]:
    """Canvases of the demo: control images are of the training writers, test images of others."""

    def read(split: str, count: int, seed: int) -> Dataset:
        scenes: Scenes = draw_scenes(split, count, seed)
        return TensorDataset(scenes.images, scenes.labels)

    seed = options.seed
    return (
        read("train", 1000, seed),
        read("train", CONTROL, seed + 1000),
        read("test", CONTROL, seed),
    )


def make(name: str, options) -> ShapleyWrapper:
    """A wrapped pretrained model with a new head."""
    if name == "vit":
        return make_model(options, BASE)
    size = 112 if name == "digits" else options.size
    cells = size // 16
    return ShapleyWrapper(
        efficientnet_lite0(num_classes=10), grid=(cells, cells), image_size=(size, size)
    )


def run(name: str, options) -> dict[str, dict[str, float]]:
    """Measures of the plain model and of ours."""
    wrapped = make(name, options)
    data = digits(options) if name == "digits" else imagenette(options, wrapped)
    training, control, test = data
    batch = 32 if name == "digits" else options.batch_size
    config = TrainerConfig(
        epochs=options.epochs,
        learning_rate=RATES[name],
        head_multiplier=20.0,
        shapley_weight="auto",
        freeze_batch_norm=name != "digits",
        precision=options.precision,
        seed=options.seed,
        progress=False,
    )
    loader = DataLoader(training, batch, shuffle=True, drop_last=True, num_workers=options.workers)
    held = DataLoader(control, batch, num_workers=options.workers)
    trainer = Trainer(wrapped, loader, held, config=config)
    history = trainer.fit()
    found = DataLoader(test, batch, num_workers=options.workers)
    ours = measure(wrapped, options, found) | {"share": history[-1]["share"]}
    wrapped.load_state_dict(trainer.reference.weights, strict=False)
    return {"plain": measure(wrapped, options, found), "ours": ours}


def draw(out: Path) -> None:
    """One table of all runs in the folder: means over seeds, and standard deviations."""
    rows = [json.loads(file.read_text()) for file in sorted(out.glob("*.json"))]
    columns = ["accuracy", "skill", "aopc", "log_odds", "saco"]
    lines = [f"| setting | model | seeds | {' | '.join(columns)} |", "|---|---|---:" + "|---:" * 6]
    for name in dict.fromkeys(row["name"] for row in rows):
        for kind in ("plain", "ours"):
            runs = [row["result"][kind] for row in rows if row["name"] == name]
            cells = []
            for column in columns:
                cells.append(mean_and_spread([one[column] for one in runs]))
            lines.append(f"| {name} | {kind} | {len(runs)} | {' | '.join(cells)} |")
    (out / "table.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Train, measure, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=None, help="holds imagenette2-160")
    parser.add_argument("--weights", type=Path, default=None, help="as for ablation.py")
    parser.add_argument("--out", type=Path, default=Path("out/automatic"))
    parser.add_argument("--settings", nargs="+", default=None, choices=list(RATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    for name, default in (("size", 112), ("train-images", 1200), ("explained", 96), ("epochs", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--precision", default="no")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--final", action="store_true", help="measure on the validation split")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for name in options.settings or (RATES if options.data else ["digits"]):
            file = options.out / f"{name}-{seed}.json"
            if file.exists():
                continue
            options.seed = seed
            torch.manual_seed(seed)
            started = time.perf_counter()
            result = run(name, options)
            print(name, seed, result, flush=True)
            record = {"name": name, "seed": seed, "result": result, "options": vars(options)}
            record |= {"minutes": (time.perf_counter() - started) / 60}
            record |= {"machine": platform.platform(), "shapwrap": __version__}
            record |= {"torch": str(torch.__version__), "timm": timm.__version__}
            file.write_text(json.dumps(record, indent=2, default=str) + "\n")
    draw(options.out)


if __name__ == "__main__":
    main()
