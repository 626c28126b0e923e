r"""Train a small CLIP on Flickr8k, plainly, wrapped, and with the Shapley loss.

    python examples/clip/train_flickr8k.py --data ../shared/data/flickr8k-1k \
        --weights ../shared/weights

The image tower is a ViT-S/14 that was trained on images alone, the text tower starts from nothing.
Writes one safetensors file a run, and what validation said. The defaults are a CPU's. On a GPU:
--size 224 --batch-size 256 --epochs 30 --precision bf16.
"""

# %% What is asked for
import argparse
import json
from pathlib import Path

import open_clip
import timm
import torch
from safetensors.torch import save_model
from torch import nn

from shapwrap import ContrastiveConfig, ContrastiveTrainer, ShapleyCLIP
from shapwrap.data import ImageTextShards

TOWER = "vit_small_patch14_dinov2"
WEIGHTS = "vit_small_patch14_saliency.fp16.safetensors"
CONTEXT = 40

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--data", type=Path, required=True, help="holds train-*.tar and val-*.tar")
parser.add_argument("--weights", type=Path, help=f"holds {WEIGHTS}; random weights without")
parser.add_argument("--out", type=Path, default=Path("out/flickr8k"))
parser.add_argument("--runs", nargs="+", default=["plain", "wrapped", "shapley"])
parser.add_argument("--shapley-weight", type=float, default=1000.0)
parser.add_argument("--learning-rate", type=float, default=5e-5)
for name, default in (("size", 112), ("epochs", 15), ("batch-size", 64), ("seed", 0)):
    parser.add_argument(f"--{name}", type=int, default=default)
parser.add_argument("--text-width", type=int, default=256)
parser.add_argument("--precision", default="no")


# %% The model: open_clip's classes around the pretrained tower
def make_clip(weights: Path | None, size: int, text_width: int) -> nn.Module:
    """An image tower with average pooling and a projection, beside four layers of text."""
    vision = {"timm_model_name": TOWER, "timm_pool": "avg", "timm_proj": "linear"}
    text = {"context_length": CONTEXT, "width": text_width, "heads": text_width // 64, "layers": 4}
    model = open_clip.CustomTextCLIP(256, {**vision, "image_size": size}, text)
    overlay = None if weights is None else {"file": str(weights / WEIGHTS), "custom_load": False}
    trunk = timm.create_model(
        TOWER,
        pretrained=weights is not None,
        img_size=size,
        pretrained_cfg_overlay=overlay,
    )
    trunk.reset_classifier(0, global_pool="avg")
    model.visual.trunk = trunk
    statistics = {name: tuple(trunk.pretrained_cfg[name]) for name in ("mean", "std")}
    open_clip.model.set_model_preprocess_cfg(model.visual, {**statistics, "size": size})
    return model


def transform(model: nn.Module, *, augment: bool) -> object:
    """From pictures to what the model takes."""
    tower = model.visual
    return open_clip.image_transform(
        tower.image_size, is_train=augment, mean=tower.image_mean, std=tower.image_std
    )


# %% Each run: the same data, schedule and seed
def main() -> None:
    """Train; write weights and results."""
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)
    results = {
        "torch": str(torch.__version__),
        "options": {k: str(v) for k, v in vars(options).items()},
    }
    for run in options.runs:
        torch.manual_seed(options.seed)
        model = make_clip(options.weights, options.size, options.text_width)
        trained = model if run == "plain" else ShapleyCLIP(model, tokenizer=tokenizer)
        settings = {"batch_size": options.batch_size, "seed": options.seed}
        train = ImageTextShards(
            f"{options.data}/train-*.tar",
            transform(model, augment=True),
            tokenizer,
            captions="random",
            **settings,
        )
        held_out = ImageTextShards(
            f"{options.data}/val-*.tar",
            transform(model, augment=False),
            tokenizer,
            shuffle=False,
            drop_last=False,
            **settings,
        )
        config = ContrastiveConfig(
            epochs=options.epochs,
            learning_rate=options.learning_rate,
            head_multiplier=20.0,
            train_text=True,
            shapley_weight=options.shapley_weight if run == "shapley" else 0.0,
            precision=options.precision,
            seed=options.seed,
            output_dir=str(options.out / run),
        )
        new = [*model.text.parameters(), *model.visual.head.parameters()]
        trainer = ContrastiveTrainer(trained, train, held_out, config=config, head=new)
        trainer.fit(resume=(options.out / run).is_dir())
        results[run] = trainer.evaluate()
        print(run, results[run], flush=True)
        save_model(model, str(options.out / f"{run}.safetensors"))
        (options.out / "training.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
