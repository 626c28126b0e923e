"""Tiny models to explain, and models of which one knows what they read."""

import timm.models.vision_transformer
import torch
from torch import nn
from torch.nn import functional

NUM_CLASSES = 5
GRID = (2, 3)
SIZE = (8, 12)
EVIDENCE = (1, 3)
"""Patches that the models of `reader` look at; the others are zeroed by their first layer."""


class Fuse(nn.Identity):
    """Raises once the calls that it was given are used up."""

    calls_left = None

    def forward(self, given):
        if self.calls_left is not None:
            self.calls_left -= 1
            if self.calls_left < 0:
                raise RuntimeError("the model failed")
        return given


class MaskedConv(nn.Conv2d):
    """Zeroes all patches but those of the evidence, at any image size."""

    def forward(self, images):
        seen = images.new_zeros(1, 1, GRID[0] * GRID[1])
        seen[..., list(EVIDENCE)] = 1
        seen = functional.interpolate(seen.unflatten(2, GRID), size=images.shape[-2:])
        return super().forward(images * seen)


def tiny(kind):
    """A random model with dropout in eval mode, and its fuse."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return {"cnn": _cnn, "vit": _vit}[kind]()


def reader(kind):
    """A model whose logit of class 1 grows with the pixels of the evidence, and of nothing else."""
    return {"cnn": _reading_cnn, "vit": _reading_vit}[kind]()


def _cnn():
    fuse = Fuse()
    model = nn.Sequential(
        nn.Conv2d(3, 8, 4, stride=4),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Dropout(0.3),
        fuse,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, NUM_CLASSES),
    )
    return _shaken(model), fuse


def _vit():
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=SIZE,
        patch_size=4,
        embed_dim=24,
        depth=2,
        num_heads=3,
        num_classes=NUM_CLASSES,
        drop_rate=0.2,
        proj_drop_rate=0.2,
        attn_drop_rate=0.2,
    )
    model.norm_pre = fuse = Fuse()
    return _shaken(model), fuse


def _shaken(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@torch.no_grad()
def _reading_cnn():
    model = nn.Sequential(
        MaskedConv(3, 4, 4, stride=4, bias=False),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, NUM_CLASSES, bias=False),
    )
    generator = torch.Generator().manual_seed(2)
    model[0].weight.uniform_(0.1, 0.3, generator=generator)
    model[-1].weight.zero_()[1].uniform_(0.5, 1, generator=generator)
    return model.eval()


@torch.no_grad()
def _reading_vit():
    """The class token attends to the evidence and carries it to class 1, in plain sight.

    Channels come in pairs of opposite numbers, so that norms take no mean off: 0 for what a patch
    shows, 2 for being the class token, 4 for being a patch.
    """
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=SIZE, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=NUM_CLASSES
    )
    first = MaskedConv(3, 8, 4, stride=4)
    model.patch_embed.proj = first
    for parameter in model.parameters():
        parameter.zero_()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.fill_(1)
    first.weight[0], first.weight[1] = 1 / 48, -1 / 48
    model.cls_token[..., 2], model.cls_token[..., 3] = 1, -1
    model.pos_embed[:, 1:, 4], model.pos_embed[:, 1:, 5] = 1, -1
    for block in model.blocks:
        query, key, value = block.attn.qkv.weight.chunk(3)
        query[0, 2], key[0, 0] = 1, 1
        value[0, 0], value[1, 0] = 1, -1
        block.attn.proj.weight[0, 0], block.attn.proj.weight[1, 1] = 1, 1
    model.head.weight[1, 0], model.head.weight[1, 1] = 1, -1
    return model.eval()
