"""Contrastive training in two processes: what one process does with the whole batch."""

import pytest

pytest.importorskip("open_clip")

from tests.two_processes import needs_distributed, run_in_processes, run_in_two_processes

SCRIPT = """
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from torch.utils.data import DataLoader, TensorDataset

from shapwrap import ShapleyCLIP, sample_coalitions
from shapwrap.data import ImageTextShards
from shapwrap.training.contrastive import ContrastiveTrainer
from shapwrap.training.contrastive_config import ContrastiveConfig
from shapwrap.training.contrastive_objective import ContrastiveObjective
from tests.clip_models import clip_model, images_of, tokenizer, tokens
from tests.shards import pixels

torch.set_num_threads(1)
folder = Path(sys.argv[1])


def model(**options):
    torch.manual_seed(0)
    return ShapleyCLIP(clip_model(**options))


def everybodys(tensor):
    both = [torch.zeros_like(tensor) for _ in range(2)]
    dist.all_gather(both, tensor)
    return both


def check_losses(rank, loss, train_text):
    clip = model(bias=-2.0)
    if not train_text:
        clip.model.text.requires_grad_(False)
    config = ContrastiveConfig(loss=loss, shapley_weight=500.0, shapley_ramp=0.0)
    images, texts = images_of(clip, 6), tokens(6)
    draw = torch.Generator().manual_seed(0)
    coalitions = sample_coalitions(6, clip.num_patches, generator=draw)
    whole = ContrastiveObjective(config)(clip(images, texts, coalitions), 1.0)
    whole["loss"].backward()
    named = dict(clip.named_parameters())
    expected = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
    assert len(expected) > 10 and any("text" in n for n in expected) == train_text
    parallel = DistributedDataParallel(clip)
    objective = ContrastiveObjective(config, rank=rank, world_size=2)
    own = slice(3 * rank, 3 * rank + 3)
    for _ in range(2):
        clip.zero_grad()
        terms = objective(parallel(images[own], texts[own], coalitions[own]), 1.0)
        terms["loss"].backward()
    for name, term in terms.items():
        mean = sum(everybodys(term.detach())) / 2
        torch.testing.assert_close(mean, whole[name].detach(), atol=1e-6, rtol=1e-5)
    for name, gradient in expected.items():
        largest = float(gradient.abs().max())
        found = named[name].grad
        torch.testing.assert_close(found, gradient, atol=1e-5 * largest + 1e-7, rtol=1e-4)


seen = []


def transform(image):
    seen.append(int(pixels(image)[0, 0, 0]))
    return torch.nn.functional.interpolate(pixels(image)[None] / 255, (12, 16))[0]


def run(resume=False):
    stream = ImageTextShards(str(folder / "*.tar"), transform, tokenizer, batch_size=4)
    config = ContrastiveConfig(
        epochs=2, log_every=1, progress=False, checkpoint_every=1, output_dir=folder / "out",
        keep_checkpoints=100,
    )
    trainer = ContrastiveTrainer(model(), stream, stream, config=config)
    return trainer, trainer.fit(resume=resume)


def check_a_run(accumulation):
    # A whole run against that of one process with batches of both; no game, which is drawn.
    images, texts = images_of(model(), 10), tokens(10)

    def train(batch_size):
        config = ContrastiveConfig(
            shapley_weight=0.0, epochs=2, log_every=1, progress=False, learning_rate=1e-2,
            accumulation=accumulation, train_text=True,
        )
        parts = [DataLoader(TensorDataset(images[:n], texts[:n]), batch_size) for n in (8, 10)]
        # Ten do not divide: what fills up the last batch of the validation is not counted.
        trainer = ContrastiveTrainer(model(), *parts, config=config)
        return trainer.fit()

    # Not the weights: AdamW makes steps of rounding where a gradient is 0, as of biases of keys.
    history = train(4 // int(os.environ["WORLD_SIZE"]))
    if len(sys.argv) > 2:
        torch.save(history, folder / f"alone-{accumulation}.pt")
        return
    alone = torch.load(folder / f"alone-{accumulation}.pt")
    assert len(history) == len(alone) == 4 // accumulation + 2
    for found, record in zip(history, alone, strict=True):
        assert found.keys() == record.keys()
        for name in found.keys() - {"kind", "skill", "residual", "trivial_residual"}:
            assert abs(found[name] - record[name]) < 1e-4, (name, found, record)
    assert history[-1]["images"] == 10


for accumulation in (1, 2):
    check_a_run(accumulation)
if len(sys.argv) > 2:
    sys.exit()
trainer, history = run()
rank = dist.get_rank()
# Two epochs of three batches of four a process, each followed by a validation on as many.
assert [record["kind"] for record in history] == (["train"] * 3 + ["validation"]) * 2
assert history[-1]["images"] == 24
assert len(set(torch.cat(everybodys(torch.tensor(seen[:12]))).tolist())) == 24
losses = torch.tensor([r["loss"] for r in history if r["kind"] == "train"])
torch.testing.assert_close(*everybodys(losses))
dist.barrier()
if rank == 0:
    for later in sorted((folder / "out").glob("step-*"))[4:]:
        later.rename(folder / later.name)
dist.barrier()
resumed, again = run(resume=True)
assert rank != 0 or again == history
for one, other in zip(
    trainer.clip.state_dict().values(), resumed.clip.state_dict().values(), strict=True
):
    assert torch.equal(one, other)
    assert torch.equal(*everybodys(one.contiguous()))
for loss in ("clip", "siglip"):
    for train_text in (False, True):
        check_losses(rank, loss, train_text)
trainer.accelerator.end_training()
print("fine")
"""


@needs_distributed
def test_two_processes(tmp_path):
    """Runs, losses and gradients of one process with both batches; a split stream, resumed."""
    pytest.importorskip("webdataset")
    from tests.shards import write_shards

    write_shards(tmp_path)
    run_in_processes(1, SCRIPT, tmp_path, str(tmp_path), "alone")
    assert run_in_two_processes(SCRIPT, tmp_path, str(tmp_path)).count("fine") == 2
