"""Fine-tune ViT-S/14 and EfficientNet-Lite0 on Imagenette, plainly and with the Shapley loss.

    python examples/finetune_imagenette.py --data ../shared/data --weights ../shared/weights

Writes accuracy, skill, time a step and figures. The defaults are a CPU's: few images, 112 pixels.
On a GPU: --train-images 9469 --val-images 3925 --size 224 --epochs 8 --batch-size 128
--shapley-weights 100 30 --precision bf16.
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
RUNS = {"plain": {"shapley_weight": 0.0, "masked_cross_entropy": 0.0}, "shapley": {}}


def make_model(name: str, size: int, weights: Path, prefix: str = "auto") -> ShapleyWrapper:
    """A wrapped model with pretrained weights and a new head for 10 classes."""
    names = ["tench", "springer", "cassette player", "chain saw", "church", "French horn"]
    names += ["garbage truck", "gas pump", "golf ball", "parachute"]
    if name == "efficientnet_lite0":
        sizes = {"grid": (size // 16, size // 16), "image_size": (size, size)}
        return ShapleyWrapper(efficientnet_lite0(num_classes=10), class_names=names, **sizes)
    overlay = {"file": str(weights / VIT_WEIGHTS), "custom_load": False}
    model = timm.create_model(
        "vit_small_patch14_dinov2", pretrained=True, img_size=size, pretrained_cfg_overlay=overlay
    )
    return ShapleyWrapper(model, num_classes=10, class_names=names, prefix_tokens=prefix)


def load(options: argparse.Namespace, split: str, count: int, statistics: tuple) -> DataLoader:
    """Batches of `count` images, spread evenly over the classes."""
    training = split == "train"
    transform = image_transform((options.size, options.size), statistics, augment=training)
    images = Imagenette(options.data, split=split, size="160px", transform=transform)
    indices = [i * len(images) // count for i in range(min(count, len(images)))]
    subset = Subset(images, indices)
    return DataLoader(subset, options.batch_size, shuffle=training, num_workers=options.workers)


def main() -> None:
    """Train each model twice; print and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="holds imagenette2-160")
    parser.add_argument("--weights", type=Path, required=True, help=f"holds {VIT_WEIGHTS}")
    parser.add_argument("--out", type=Path, default=Path("out/imagenette"))
    parser.add_argument("--models", nargs="+", default=["vit_small_patch14", "efficientnet_lite0"])
    parser.add_argument("--shapley-weights", nargs="+", type=float, default=[10.0, 1.0])
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[5e-5, 3e-4])
    for name, default in (("size", 112), ("train-images", 1200), ("val-images", 400), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("epochs", 4), ("batch-size", 16), ("workers", 0), ("precision", "no")):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--prefix-tokens", default="auto", help="drop: as the paper does")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    table = {"torch": str(torch.__version__), "timm": timm.__version__, "options": str(options)}
    settings = (options.models, options.shapley_weights, options.learning_rates)
    for name, weight, rate in zip(*settings, strict=True):
        for run, terms in RUNS.items():
            wrapped = make_model(name, options.size, options.weights, options.prefix_tokens)
            statistics = wrapped.normalization
            config = TrainerConfig(
                epochs=options.epochs,
                learning_rate=rate,
                head_multiplier=20.0,
                precision=options.precision,
                seed=options.seed,
                **{"shapley_weight": weight, **terms},
            )
            train = load(options, "train", options.train_images, statistics)
            validation = load(options, "val", options.val_images, statistics)
            trainer = Trainer(wrapped, train, config=config)
            started = time.perf_counter()
            trainer.fit()
            seconds = (time.perf_counter() - started) / trainer.total_steps
            row = table[f"{name}, {run}"] = {"seconds": seconds, **trainer.evaluate(validation)}
            print(name, run, row, flush=True)
            (options.out / "results.json").write_text(json.dumps(table, indent=2) + "\n")
            torch.save(wrapped.state_dict(), options.out / f"{name}-{run}.pt")
        shown = validation.dataset
        images = torch.stack([shown[i * len(shown) // 8][0] for i in range(8)])
        explanation = wrapped.explain(images, contrast=True)
        explanation.plot(images).savefig(options.out / f"{name}.png", dpi=80)


if __name__ == "__main__":
    main()
