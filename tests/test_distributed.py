"""Two processes: gradients are shared, data is split, and nothing waits for an unused parameter."""

import pytest

from tests.two_processes import needs_distributed, run_in_two_processes

SCRIPT = """
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from shapwrap import ShapleyWrapper, Trainer, TrainerConfig, sample_coalitions, shapley_loss
from tests.backbones import make_case

torch.set_num_threads(1)
torch.manual_seed(0)
case = make_case("vit-class-token", batch=4)
if sys.argv[1] == "loop":
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    coalitions = sample_coalitions(4, 12, generator=torch.Generator().manual_seed(0))
    own = slice(2 * rank, 2 * rank + 2)
    whole = case.wrapped(case.images, coalitions)
    (shapley_loss(whole) + whole.logits.square().mean()).backward()
    expected = {n: p.grad.clone() for n, p in case.wrapped.named_parameters() if p.requires_grad}
    case.wrapped.zero_grad()
    model = DistributedDataParallel(case.wrapped)
    for _ in range(2):
        case.wrapped.zero_grad()
        output = model(case.images[own], coalitions[own])
        (shapley_loss(output) + output.logits.square().mean()).backward()
    for name, parameter in case.wrapped.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-4)
    dist.destroy_process_group()
else:
    images = torch.randn(10, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(images, torch.arange(10) % 5), batch_size=2)
    config = TrainerConfig(
        epochs=2, log_every=1, progress=False, output_dir=sys.argv[2], checkpoint_every=2
    )
    trainer = Trainer(case.wrapped, data, data, config=config)
    trainer.fit()
    assert trainer.evaluate()["images"] == 10, "images are counted once"
    resumed = Trainer(make_case("vit-class-token", batch=4).wrapped, data, data, config=config)
    resumed.fit(resume=True)
    for one, other in zip(
        case.wrapped.state_dict().values(), resumed.wrapped.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other)
    trainer.accelerator.end_training()
print("fine")
"""


STEPS = """
import copy
import sys

import torch
import torch.distributed as dist
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from shapwrap import Trainer, TrainerConfig, shapley_loss
from tests.backbones import make_case

torch.set_num_threads(1)
torch.manual_seed(0)
wrapped = make_case("vit-class-token").wrapped
start = copy.deepcopy(wrapped)
images = torch.randn(16, 3, 12, 16, generator=torch.Generator().manual_seed(0))
labels = torch.arange(16) % 5
data = DataLoader(TensorDataset(images, labels), batch_size=2, shuffle=True)
config = TrainerConfig(
    epochs=1, progress=False, accumulation=2, num_coalitions=4, gradient_clip=None,
    shapley_weight=2.0, shapley_ramp=0.0, masked_cross_entropy=0.5, seed=3,
)
trainer = Trainer(wrapped, data, config=config)
seen, steps = [], []
wrapped.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
trainer.optimizer.optimizer.register_step_pre_hook(
    lambda *_: steps.append([p.grad.clone() for p in wrapped.parameters() if p.requires_grad])
)
trainer.fit()
assert (len(seen), len(steps)) == (4, 2)


def everywhere(tensor):
    parts = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(parts, tensor)
    return parts


shown = everywhere(torch.stack([images for images, _ in seen]))
drawn = everywhere(torch.stack([coalitions for _, coalitions in seen]).to(torch.uint8))
every = [part.bool() for part in drawn]
order = torch.cat(shown).flatten(0, 1)
assert len({float(image.sum()) for image in order}) == 16, "each image once"
for part in every:
    assert torch.equal(part[:, :, ::2], ~part[:, :, 1::2]), "complement pairs"
    assert not torch.equal(part[0], part[1]), "new ones each batch"
assert all(not torch.equal(one, other) for one, other in zip(*every, strict=True)), "own ones"

# One process, with the batches of both and of the whole step at once.
batch = torch.cat([part[:2] for part in shown]).flatten(0, 1)
asked = torch.cat([part[:2] for part in every]).flatten(0, 1)
classes = torch.stack([
    labels[next(i for i in range(16) if torch.equal(images[i], image))] for image in batch
])
start.train()
output = start(batch, asked)
loss = functional.cross_entropy(output.logits, classes) + 2.0 * shapley_loss(output)
masked = output.values.flatten(0, 1)
loss = loss + 0.5 * functional.cross_entropy(masked, classes.repeat_interleave(4))
loss.backward()
expected = [p.grad for p in start.parameters() if p.requires_grad]
for found, reference in zip(steps[0], expected, strict=True):
    torch.testing.assert_close(found, reference, atol=1e-6, rtol=1e-4)
trainer.accelerator.end_training()
print("fine")
"""


@needs_distributed
def test_a_step_of_the_trainer_has_the_gradients_of_one_process(tmp_path):
    """Two processes, two batches a step, coalitions of their own, against one pass over all."""
    assert run_in_two_processes(STEPS, tmp_path).count("fine") == 2


@needs_distributed
@pytest.mark.parametrize("what", ["loop", "trainer"])
def test_two_processes(tmp_path, what):
    printed = run_in_two_processes(SCRIPT, tmp_path, what, str(tmp_path / "run"))
    assert printed.count("fine") == 2
