"""Two processes train one explainer: the same weights in both, and no parameter waited for."""

from tests.two_processes import needs_distributed, run_in_two_processes

SCRIPT = """
import sys

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset

from shapwrap.explainers import FastSHAP, ViTShapley
from shapwrap.training.plain import fine_tune
from tests.trained_models import GRID, convolutional, fastshap_config, images, stage
from tests.trained_models import transformer, vit_config

torch.set_num_threads(1)
data = DataLoader(TensorDataset(images(8), torch.arange(8) % 3), batch_size=2)
trained = [
    ViTShapley.train(transformer(), data, config=vit_config()).state_dict(),
    FastSHAP.train(convolutional(), data, config=fastshap_config(), grid=GRID).state_dict(),
]
model = transformer()
validated = fine_tune(model, data, data, config=stage())[-1]
assert validated["images"] == 8, validated
trained.append(model.state_dict())
for state in trained:
    for name, tensor in state.items():
        if "running" in name:
            continue
        both = [torch.zeros_like(tensor) for _ in range(2)]
        dist.all_gather(both, tensor.contiguous())
        assert torch.equal(*both), name
dist.destroy_process_group()
"""


@needs_distributed
def test_two_processes(tmp_path):
    run_in_two_processes(SCRIPT, tmp_path)
