"""Models to save, and what a loaded one has to have in common with the saved one."""

import copy

import torch

from shapwrap.saving.wrapping import facts_of


def noise(wrapped, seed=0, num=2):
    parameter = next(wrapped.parameters())
    channels = wrapped._wrapping.backbone.in_channels()
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, channels, *wrapped.image_size, generator=generator).to(parameter.dtype)


def shifted(model, seed=11):
    """The same model with other weights and statistics, as training would leave it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                moved = torch.rand(tensor.shape, generator=generator).to(tensor)
                tensor.mul_(1 + 0.1 * moved).add_(0.01 * moved)
    return model


@torch.no_grad()
def assert_same(loaded, wrapped, images=None):
    images = noise(wrapped) if images is None else images
    wrapped = copy.deepcopy(wrapped).eval()
    assert type(loaded) is type(wrapped)
    assert not any(module.training for module in loaded.modules())
    for name in ("class_names", "normalization"):
        assert getattr(loaded, name) == getattr(wrapped, name)
    assert facts_of(loaded) == facts_of(wrapped)
    assert torch.equal(loaded(images), wrapped(images))
    assert torch.equal(loaded.attribute(images), wrapped.attribute(images))
    generator = torch.Generator().manual_seed(1)
    coalitions = torch.rand(len(images), 3, wrapped.num_patches, generator=generator) < 0.5
    assert torch.equal(loaded.value(images, coalitions), wrapped.value(images, coalitions))
    state, other = wrapped.state_dict(), loaded.state_dict()
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, other[name]) and tensor.dtype == other[name].dtype
