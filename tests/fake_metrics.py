"""Small stand-ins with the interface of the real metrics: cheap, and their values are known."""

from types import SimpleNamespace
from typing import NamedTuple

import torch


class Scores(dict):
    def __init__(self, values, curves, fractions, settings):
        super().__init__(values)
        self.curves, self.fractions = curves, fractions
        self.protocol = SimpleNamespace(settings=settings)


class Segmented(NamedTuple):
    correct: torch.Tensor
    labelled: torch.Tensor
    intersection: torch.Tensor
    union: torch.Tensor
    average_precision: torch.Tensor
    constant: torch.Tensor


def predictor(model, normalization=None):
    mean, std = (torch.tensor(part)[:, None, None] for part in normalization)

    def predict(images):
        with torch.no_grad():
            return model((images - mean) / std)

    return predict


def faithfulness(
    predict, images, maps, *, target, fill="black", ranking="pixel", chunk_size, generator
):
    """AOPC is the probability, log-odds the mean of the map, SaCo undefined for every image."""
    assert images.min() >= 0 and images.max() <= 1
    assert maps.shape[-2:] == images.shape[-2:] or ranking == "patch"
    probability = predict(images).softmax(dim=1).gather(1, target[:, None])[:, 0]
    values = {
        "aopc": probability,
        "log_odds": maps.mean(dim=(1, 2)),
        "saco": probability * torch.nan,
    }
    curve = torch.stack((probability, probability + 1), dim=1)
    settings = {"fill": fill, "class": "given", "images": "a batch"}
    return Scores(values, {"aopc": curve}, torch.tensor([0.1, 0.9]), settings)


def segmentation_statistics(maps, masks, *, chunk_size):
    found = maps > maps.mean(dim=(1, 2), keepdim=True)
    known, real = masks >= 0, masks == 1
    sides = [((found == side) & known, (real == side) & known) for side in (False, True)]
    return Segmented(
        ((found == real) & known).sum((1, 2)),
        known.sum((1, 2)),
        torch.stack([(a & b).sum((1, 2)) for a, b in sides], 1),
        torch.stack([(a | b).sum((1, 2)) for a, b in sides], 1),
        torch.full((len(maps),), 0.5),
        torch.zeros(len(maps), dtype=torch.bool),
    )


def pointing_game(maps, masks):
    hit = masks.flatten(1).gather(1, maps.flatten(1).argmax(1, keepdim=True))[:, 0] == 1
    return SimpleNamespace(hit=hit.float(), chance=(masks == 1).float().mean((1, 2)))


def cost(explainer, images, target=None, *, repeats=0):
    explainer(images, target)
    return SimpleNamespace(forward_equivalents=2.0, explainer_parameters=0, seconds_ratio=None)


def fine_tune(model, data, *, config, resume):
    """One step of plain gradient descent, so that weights differ from those at the start."""
    images, labels = next(iter(data))
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            if gradient is not None:
                parameter -= 0.01 * gradient
    return [{"kind": "train", "loss": loss.item(), "epochs": config.epochs}]
