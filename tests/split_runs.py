"""Runs whose steps are shared out among one or two processes, and what each of them sees."""

import torch
from torch.utils.data import DataLoader, TensorDataset

from shapwrap import Trainer, TrainerConfig
from tests.backbones import make_case

TOTAL, STEP = 20, 4


class Stopped(Exception):
    """Ends a run."""


class Recording(Trainer):
    """Remembers which samples each step has taken; may stop after a step."""

    stop_after = None

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.seen = {}

    def _terms(self, batch, position):
        found = self.seen.setdefault(position.step, [])
        found += [round(float(image[0, 0, 0]) * 100) for image in batch[0]]
        return super()._terms(batch, position)

    def _after_step(self, position, window, bar):
        super()._after_step(position, window, bar)
        if position.step == self.stop_after:
            raise Stopped


def samples():
    """Images that say their number in a corner."""
    images = torch.randn(TOTAL, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    images[:, 0, 0, 0] = torch.arange(TOTAL) / 100
    return TensorDataset(images, torch.arange(TOTAL) % 5)


def run(folder, batch_size, accumulation=1, accelerator=None, val_data=None, **settings):
    """Two epochs of five steps, without a game: nothing but the order of samples is drawn."""
    settings = {"shapley_weight": 0.0, "masked_cross_entropy": 0.0, **settings}
    config = TrainerConfig(
        output_dir=folder, epochs=2, log_every=1, progress=False, accumulation=accumulation,
        **{"checkpoint_every": 1, **settings},
    )  # fmt: skip
    data = DataLoader(samples(), batch_size=batch_size, shuffle=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wrapped = make_case("vit-class-token", batch=2).wrapped
    return Recording(wrapped, data, val_data, config=config, accelerator=accelerator)


def logits(trainer):
    """Of a few samples: what training has made of the model."""
    with torch.no_grad():
        return trainer.wrapped.eval()(samples().tensors[0][:6])
