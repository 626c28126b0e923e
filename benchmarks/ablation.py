"""What each part of the recipe brings: accuracy, skill and faithfulness of one change at a time.

    python benchmarks/ablation.py --data ../shared/data --weights ../shared/weights

Fine-tunes a ViT-S/14 on a part of Imagenette's training split and measures on another part of it;
the validation split is not touched. Each run writes `NAME-SEED.json`, and a run that is there is
not made again. Then `table.md` and `ablation.png` (accuracy against skill) are drawn of all runs.
The defaults are a CPU's. On a GPU: --size 224 --train-images 8000 --epochs 6 --batch-size 128
--precision bf16 --device cuda.
"""

import argparse
import json
import platform
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import timm
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import Imagenette
from tqdm import tqdm

from shapwrap import ShapleyWrapper, Trainer, TrainerConfig, sample_coalitions, shapley_loss
from shapwrap.data.folder import image_transform
from shapwrap.metrics import faithfulness, predictor
from shapwrap.training.optimizer import make_optimizer, make_scheduler
from shapwrap.values.game import masked_logits

MODEL = "vit_small_patch14_dinov2"
WEIGHTS = "vit_small_patch14_saliency.fp16.safetensors"


@dataclass(frozen=True)
class Recipe:
    """One way to train; the default is what the others change one thing of."""

    patch_readout: bool = False
    """The class token dropped, as in the paper."""
    automatic: bool = False
    """shapley_weight="auto" of the Trainer; lambda and its ramp are not used."""
    shapley_weight: float = 10.0
    ramp: float = 0.6
    masked_cross_entropy: float = 1.0
    num_coalitions: int = 2
    paired: bool = True
    distribution: str = "shapley"
    one_class: bool = False
    stop_gradient: bool = False


BASE = Recipe()
PLAIN = replace(BASE, shapley_weight=0.0, masked_cross_entropy=0.0)
PAPER = Recipe(
    patch_readout=True,
    shapley_weight=30.0,
    ramp=0.0,
    masked_cross_entropy=0.0,
    num_coalitions=1,
    paired=False,
    one_class=True,
)
RECIPES = {
    "plain": PLAIN,
    "base": BASE,
    "automatic": replace(BASE, automatic=True),
    "lambda 1": replace(BASE, shapley_weight=1.0),
    "lambda 30": replace(BASE, shapley_weight=30.0),
    "lambda 100": replace(BASE, shapley_weight=100.0),
    "no masked cross-entropy": replace(BASE, masked_cross_entropy=0.0),
    "no ramp": replace(BASE, ramp=0.0),
    "not paired": replace(BASE, paired=False),
    "one class": replace(BASE, one_class=True),
    "four coalitions": replace(BASE, num_coalitions=4),
    "uniform sizes": replace(BASE, distribution="uniform"),
    "stop-gradient": replace(BASE, stop_gradient=True),
    "patch readout, plain": replace(PLAIN, patch_readout=True),
    "patch readout": replace(BASE, patch_readout=True),
    "patch readout, lambda 100": replace(BASE, patch_readout=True, shapley_weight=100.0),
    "paper (Eq. 13), lambda 30": PAPER,
}


def make_model(options: argparse.Namespace, recipe: Recipe) -> ShapleyWrapper:
    """A wrapped pretrained ViT-S/14 with a new head."""
    overlay = {"file": str(options.weights / WEIGHTS), "custom_load": False}
    model = timm.create_model(
        MODEL, pretrained=True, img_size=options.size, pretrained_cfg_overlay=overlay
    )
    prefix_tokens = "drop" if recipe.patch_readout else "auto"
    wrapped = ShapleyWrapper(model, num_classes=10, prefix_tokens=prefix_tokens)
    return wrapped.to(options.device)


def images_of(options: argparse.Namespace, part: str, statistics: tuple) -> DataLoader:
    """Every tenth image of the training split is held out; the rest is for training.

    "control", on which the automatic weight holds accuracy, is neither of them.
    """
    training = part == "train"
    transform = image_transform((options.size, options.size), statistics, augment=training)
    data = Imagenette(options.data, split="train", size="160px", transform=transform)
    indices = [i for i in range(len(data)) if (i % 10 == 0) == (part == "held out")]
    counts = {"train": options.train_images, "control": options.control}
    count = min(counts.get(part, options.held_out), len(indices))
    chosen = [indices[i * len(indices) // count] for i in range(count)]
    if part == "control":
        trained = min(options.train_images, len(indices))
        used = {indices[i * len(indices) // trained] for i in range(trained)}
        free = [i for i in indices if i not in used]
        count = min(count, len(free))
        chosen = [free[i * len(free) // count] for i in range(count)]
    generator = torch.Generator().manual_seed(options.seed)
    return DataLoader(
        Subset(data, chosen),
        options.batch_size,
        shuffle=training,
        drop_last=training,
        num_workers=options.workers,
        generator=generator,
    )


def loss_of(wrapped: ShapleyWrapper, images: Tensor, labels: Tensor, recipe: Recipe, **step):
    """Task loss, Shapley loss and masked cross-entropy of one batch, as the recipe weighs them."""
    weight, generator, autocast = step["weight"], step["generator"], step["autocast"]
    if not (recipe.shapley_weight or recipe.masked_cross_entropy):
        with autocast:
            logits = wrapped(images)
        return cross_entropy(logits, labels)
    coalitions = sample_coalitions(
        len(images),
        wrapped.patches_of(images),
        recipe.num_coalitions,
        distribution=recipe.distribution,
        paired=recipe.paired,
        generator=generator,
        device=images.device,
    )
    with autocast:
        output = wrapped(images, coalitions, paired=recipe.paired)
    errors = shapley_loss(output, reduction="none", detach_values=recipe.stop_gradient)
    if recipe.one_class:
        drawn = torch.randint(errors.shape[2], (len(images),), generator=generator)
        errors = errors[torch.arange(len(images)), :, drawn]
    total = cross_entropy(output.logits, labels) + weight * errors.mean()
    if recipe.masked_cross_entropy:
        masked = output.values
        if wrapped.has_baseline:
            masked = masked_logits(output) if recipe.paired else masked + wrapped.baseline
        repeated = labels.repeat_interleave(masked.shape[1])
        total = total + recipe.masked_cross_entropy * cross_entropy(masked.flatten(0, 1), repeated)
    return total


def train(wrapped: ShapleyWrapper, recipe: Recipe, options: argparse.Namespace) -> None:
    """The optimizer and schedule of the Trainer around this script's own loss."""
    data = images_of(options, "train", wrapped.normalization)
    if recipe.automatic:
        settings = {"epochs": options.epochs, "seed": options.seed, "progress": False}
        config = TrainerConfig(
            **settings,
            shapley_weight="auto",
            learning_rate=options.learning_rate,
            head_multiplier=20.0,
            masked_cross_entropy=recipe.masked_cross_entropy,
            precision=options.precision,
        )
        control = images_of(options, "control", wrapped.normalization)
        Trainer(wrapped, data, control, config=config).fit()
        return
    steps = options.epochs * len(data)
    config = TrainerConfig(learning_rate=options.learning_rate, head_multiplier=20.0)
    optimizer = make_optimizer(wrapped, config)
    schedule = make_scheduler(optimizer, config, steps)
    generator = torch.Generator().manual_seed(options.seed)
    autocast = torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16")
    wrapped.train()
    with tqdm(total=steps, leave=False) as bar:
        for _ in range(options.epochs):
            for images, labels in data:
                images, labels = images.to(options.device), labels.to(options.device)
                ramp = min(1.0, bar.n / steps / recipe.ramp) if recipe.ramp else 1.0
                weight = recipe.shapley_weight * ramp
                step = {"weight": weight, "generator": generator, "autocast": autocast}
                loss_of(wrapped, images, labels, recipe, **step).backward()
                torch.nn.utils.clip_grad_norm_(wrapped.parameters(), config.gradient_clip)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                bar.update()


@torch.no_grad()
def measure(
    wrapped: ShapleyWrapper, options: argparse.Namespace, data: DataLoader
) -> dict[str, float]:
    """Accuracy, skill, and faithfulness of the predicted class."""
    wrapped.eval()
    predict = predictor(wrapped, wrapped.normalization)
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in wrapped.normalization)
    correct, residuals, scores = [], [], []
    for index, (images, labels) in enumerate(data):
        images = images.to(options.device)
        explanation = wrapped.explain(images)
        correct += (explanation.target.cpu() == labels).tolist()
        generator = torch.Generator().manual_seed(index)
        audit = wrapped.audit(images, num_coalitions=4, generator=generator)
        residuals.append(torch.stack((audit.residual, audit.trivial_residual), dim=1).cpu())
        if index * options.batch_size < options.explained:
            maps = explanation.values.unflatten(1, explanation.grid)
            pixels = (images * std.to(images) + mean.to(images)).clamp(0, 1)
            found = faithfulness(
                predict, pixels, maps, fill="zero_normalised", ranking="patch", on_constant="zero"
            )
            scores.append(torch.stack([found[name].cpu() for name in found], dim=1))
    residual, trivial = torch.cat(residuals).mean(dim=0).tolist()
    row = dict(zip(found, torch.cat(scores).nanmean(dim=0).tolist(), strict=True))
    return {"accuracy": sum(correct) / len(correct), "skill": 1 - residual / trivial, **row}


def mean_and_spread(values: list[float]) -> str:
    """Mean over seeds, and their standard deviation where there are several."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def draw(out: Path) -> None:
    """One table and one figure of all runs in the folder."""
    rows = [json.loads(file.read_text()) for file in sorted(out.glob("*.json"))]
    names = dict.fromkeys(row["name"] for row in rows)
    columns = ["accuracy", "skill", "aopc", "log_odds", "saco"]
    lines = [f"| recipe | seeds | {' | '.join(columns)} |", "|---|---:" + "|---:" * 5 + "|"]
    figure, axis = plt.subplots(figsize=(7, 5))
    for name in names:
        runs = [row["result"] for row in rows if row["name"] == name]
        cells = []
        for column in columns:
            cells.append(mean_and_spread([run[column] for run in runs]))
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
        point = [statistics.fmean(run[column] for run in runs) for column in ("skill", "accuracy")]
        axis.plot(*point, "s" if "patch" in name or "paper" in name else "o")
        axis.annotate(name, point, fontsize=6, xytext=(4, 2), textcoords="offset points")
    axis.set(xlabel="skill", ylabel="accuracy on held-out training images")
    figure.savefig(out / "ablation.png", dpi=120, bbox_inches="tight")
    (out / "table.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Train, measure, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="holds imagenette2-160")
    parser.add_argument("--weights", type=Path, required=True, help=f"holds {WEIGHTS}")
    parser.add_argument("--out", type=Path, default=Path("out/ablation"))
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    for name, default in (
        ("size", 112),
        ("train-images", 1200),
        ("held-out", 900),
        ("control", 400),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("explained", 100), ("epochs", 4), ("batch-size", 16), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--precision", default="no")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.recipes:
        kept = "".join(letter for letter in name if letter.isalnum() or letter in " -")
        file = options.out / f"{kept.replace(' ', '-')}-{options.seed}.json"
        if file.exists():
            continue
        recipe = RECIPES[name]
        wrapped = make_model(options, recipe)
        started = time.perf_counter()
        train(wrapped, recipe, options)
        minutes = (time.perf_counter() - started) / 60
        held_out = images_of(options, "held out", wrapped.normalization)
        result = measure(wrapped, options, held_out)
        print(name, {key: round(value, 3) for key, value in result.items()}, flush=True)
        record = {"name": name, "recipe": asdict(recipe), "options": vars(options)}
        record |= {"result": result, "minutes": minutes, "machine": platform.processor()}
        record |= {"torch": str(torch.__version__), "timm": timm.__version__}
        file.write_text(json.dumps(record, indent=2, default=str) + "\n")
    draw(options.out)


if __name__ == "__main__":
    main()
