"""Fine-tune ViT-S/14 and EfficientNet-Lite0 on Imagenette, plainly and with the Shapley loss.

    python examples/finetune_imagenette.py --data ../shared/data --weights ../shared/weights

Prints accuracy, skill and time a step, and writes them with three figures to --out. The defaults
are for a CPU: a subset of the images at 112 pixels. On a GPU: --train-images 9469 --size 224
--val-images 3925 --epochs 8 --batch-size 128 --precision bf16.
"""

import argparse
import json
import time
from pathlib import Path

import timm
import torch
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import Imagenette

from shapwrap import ShapleyWrapper, Trainer, TrainerConfig
from shapwrap.data import efficientnet_lite0
from shapwrap.data.folder import image_transform

VIT_WEIGHTS = "vit_small_patch14_saliency.fp16.safetensors"


def make_model(name: str, size: int, weights: Path) -> ShapleyWrapper:
    """A wrapped model with pretrained weights and a new head for 10 classes."""
    names = [names[0] for names in Imagenette._WNID_TO_CLASS.values()]
    if name == "efficientnet_lite0":
        model = efficientnet_lite0(num_classes=10)
        grid = (size // 16, size // 16)
        return ShapleyWrapper(model, grid=grid, image_size=(size, size), class_names=names)
    overlay = {"file": str(weights / VIT_WEIGHTS), "custom_load": False}
    model = timm.create_model(
        "vit_small_patch14_dinov2", pretrained=True, img_size=size, pretrained_cfg_overlay=overlay
    )
    return ShapleyWrapper(model, num_classes=10, class_names=names)


def evenly(dataset: Imagenette, count: int) -> Subset:
    """`count` images, spread over the classes."""
    count = min(count, len(dataset))
    return Subset(dataset, [i * len(dataset) // count for i in range(count)])


def main() -> None:
    """Train each model twice; print and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="holds imagenette2-160")
    parser.add_argument("--weights", type=Path, required=True, help=f"holds {VIT_WEIGHTS}")
    parser.add_argument("--out", type=Path, default=Path("out/imagenette"))
    parser.add_argument("--models", nargs="+", default=["vit_small_patch14", "efficientnet_lite0"])
    parser.add_argument("--shapley-weights", nargs="+", type=float, default=[100.0, 10.0])
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--train-images", type=int, default=1000)
    parser.add_argument("--val-images", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--precision", default="no")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    table = {"torch": str(torch.__version__), "timm": timm.__version__, "options": str(options)}
    for name, weight in zip(options.models, options.shapley_weights, strict=True):
        for run, terms in (
            ("plain", {"shapley_weight": 0.0, "masked_cross_entropy": 0.0}),
            ("shapley", {"shapley_weight": weight}),
        ):
            torch.manual_seed(options.seed)
            wrapped = make_model(name, options.size, options.weights)
            square = (options.size, options.size)
            statistics = wrapped.normalization
            loaders = []
            for split, count in (("train", options.train_images), ("val", options.val_images)):
                transform = image_transform(square, statistics, augment=split == "train")
                images = Imagenette(options.data, split=split, size="160px", transform=transform)
                loaders.append(
                    DataLoader(
                        evenly(images, count),
                        options.batch_size,
                        shuffle=split == "train",
                        num_workers=options.workers,
                    )
                )
            config = TrainerConfig(
                epochs=options.epochs,
                head_multiplier=50.0,
                precision=options.precision,
                seed=options.seed,
                **terms,
            )
            trainer = Trainer(wrapped, loaders[0], config=config)
            started = time.perf_counter()
            trainer.fit()
            seconds = (time.perf_counter() - started) / trainer.total_steps
            row = {"seconds_a_step": seconds, **trainer.evaluate(loaders[1])}
            table[f"{name}, {run}"] = row
            print(f"{name:20} {run:8}", {k: round(v, 4) for k, v in row.items()}, flush=True)
            (options.out / "results.json").write_text(json.dumps(table, indent=2) + "\n")
        torch.save(wrapped.state_dict(), options.out / f"{name}.pt")
        images = torch.stack([loaders[1].dataset[i * 50 + 3][0] for i in range(10)][:8])
        figure = wrapped.explain(images, contrast=True).plot(images)
        figure.savefig(options.out / f"{name}.png", dpi=70)


if __name__ == "__main__":
    main()
