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


@needs_distributed
@pytest.mark.parametrize("what", ["loop", "trainer"])
def test_two_processes(tmp_path, what):
    printed = run_in_two_processes(SCRIPT, tmp_path, what, str(tmp_path / "run"))
    assert printed.count("fine") == 2
