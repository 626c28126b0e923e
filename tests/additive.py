"""A model whose logits are sums over patches that do not see each other, and 0 for black."""

import torch
from torch import nn

from shapwrap import ShapleyWrapper

CELL = 4
GRID = (2, 3)
NUM_CLASSES = 5


def additive(grid=GRID):
    """Wrapped: each patch's value is its Shapley value, exactly, without any training."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, CELL, stride=CELL, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, NUM_CLASSES, bias=False),
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return ShapleyWrapper(model.eval(), image_size=(grid[0] * CELL, grid[1] * CELL))


def images_for(grid=GRID, batch=2, seed=5):
    size = (grid[0] * CELL, grid[1] * CELL)
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))
