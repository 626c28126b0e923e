"""Connected components of many binary images at a time."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional


def component_labels(
    regions: Bool[Tensor, "batch height width"],
) -> Int[Tensor, "batch height width"]:
    """One label a component, 1 or more; 0 outside. Pixels that touch at a corner are connected.

    Every pixel points at one of its component, at first at itself. In each round a pixel, and the
    one that it points at, turn to the largest that a neighbour leads to; the number of rounds grows
    with the logarithm of the size of a component, whatever its shape.

    References:
        Zhang, Azad & Buluc 2020, "Parallel algorithms for finding connected components using
        linear algebra" (FastSV).
    """
    batch, height, width = regions.shape
    inside = regions.flatten(1)
    # float32 holds every whole number up to 2^24; pooling needs a float.
    dtype = torch.float32 if height * width < 2**24 else torch.float64
    numbers = torch.arange(1, height * width + 1, device=regions.device) * inside
    # Pixel p has number p + 1; number 0 stands for everything outside and points at itself.
    pointers = functional.pad(numbers, (1, 0))
    while True:
        ahead = pointers.gather(1, pointers)
        image = ahead[:, 1:].view(batch, 1, height, width).to(dtype)
        largest = functional.max_pool2d(image, 3, stride=1, padding=1).flatten(1).long() * inside
        largest = functional.pad(largest, (1, 0))
        turned = torch.maximum(ahead, largest).scatter_reduce(1, pointers, largest, "amax")
        if torch.equal(turned, pointers):
            return pointers[:, 1:].view(batch, height, width)
        pointers = turned


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
