"""Connected components of many binary images at a time."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional


def component_labels(
    regions: Bool[Tensor, "batch height width"],
) -> Int[Tensor, "batch height width"]:
    """One label a component, 1 or more; 0 outside. Pixels that touch at a corner are connected.

    Labels are taken from neighbours until none changes; following a label to the label of the pixel
    that it names shortens long paths to a few rounds.
    """
    batch, height, width = regions.shape
    # Pixel p is named p + 1; float64 holds every name, and pooling needs a float.
    names = torch.arange(1, height * width + 1, device=regions.device, dtype=torch.float64)
    labels = names.view(1, height, width) * regions
    while True:
        spread = functional.max_pool2d(labels[:, None], 3, stride=1, padding=1)[:, 0] * regions
        flat = spread.view(batch, -1)
        # Name 0 stands for no pixel and names itself.
        table = functional.pad(flat, (1, 0))
        followed = table.gather(1, flat.long()).view_as(labels)
        if torch.equal(followed, labels):
            return labels.long()
        labels = followed


def largest_components(
    regions: Bool[Tensor, "batch height width"],
) -> Bool[Tensor, "batch height width"]:
    """The component with most pixels; where components tie, the one that ends first."""
    labels = component_labels(regions).flatten(1)
    sizes = torch.zeros(
        len(labels), labels.shape[1] + 1, dtype=torch.long, device=labels.device
    ).scatter_add(1, labels, (labels > 0).long())
    largest = sizes.argmax(dim=1, keepdim=True)
    return ((labels == largest) & (labels > 0)).view_as(regions)
