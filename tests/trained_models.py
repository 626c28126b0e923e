"""Small models, data and settings for the trained explainers."""

import timm
import torch
from torch import nn

from shapwrap.explainers import FastSHAPConfig, ViTShapleyConfig
from shapwrap.training.config import LoopConfig

SIZE = (8, 16)
GRID = (2, 4)
NUM_PATCHES = 8
NUM_CLASSES = 3
READ = [0, 2, 4, 6]


class ReadsSomePatches(nn.Module):
    """Logits from the brightness of every second patch, through a ReLU."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.brightness = nn.Conv2d(3, 4, 4, stride=4, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.weigh = nn.Linear(4 * NUM_PATCHES, NUM_CLASSES, bias=False)
        signs = torch.tensor([1.0, -1.0, 0.5, -0.5])[:, None, None, None]
        read = torch.zeros(NUM_PATCHES).index_fill(0, torch.tensor(READ), 1.0).repeat(4)
        with torch.no_grad():
            self.brightness.weight.copy_(signs.expand(4, 3, 4, 4) / 16)
            self.weigh.weight.copy_(torch.randn(3, 32, generator=generator) * read)

    def forward(self, images):
        return self.weigh(torch.relu(self.norm(self.brightness(images))).flatten(1))


def convolutional():
    """In eval mode; its batch statistics are those of a new layer."""
    return ReadsSomePatches().eval()


def transformer(**options):
    """A class-token ViT whose random weights are large enough to matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.models.vision_transformer.VisionTransformer(
            img_size=SIZE,
            patch_size=4,
            embed_dim=24,
            depth=2,
            num_heads=3,
            num_classes=NUM_CLASSES,
            **options,
        )
        for parameter in model.parameters():
            noise = torch.randn_like(parameter) * (0.3 if parameter.ndim < 2 else 0.15)
            parameter.data.add_(noise)
    return model.eval()


def images(num, seed=0, coarse=False):
    """Noise of pixels, or of whole patches."""
    generator = torch.Generator().manual_seed(seed)
    if not coarse:
        return torch.randn(num, 3, *SIZE, generator=generator)
    drawn = torch.randn(num, 3, *GRID, generator=generator)
    return drawn.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)


def stage(**settings):
    """A short stage of training."""
    defaults = {
        "epochs": 1,
        "learning_rate": 1e-3,
        "head_multiplier": 1.0,
        "weight_decay": 0.0,
        "freeze_batch_norm": False,
        "log_every": 1,
        "progress": False,
    }
    return LoopConfig(**{**defaults, **settings})


def vit_config(surrogate=None, explainer=None, **settings):
    """Settings of ViTShapley for a few seconds."""
    return ViTShapleyConfig(
        surrogate=stage(**surrogate or {}),
        explainer=stage(**explainer or {}),
        **{"num_masks": 4, "mlp_ratio": 2.0, **settings},
    )


def fastshap_config(surrogate=None, explainer=None, **settings):
    """Settings of FastSHAP for a few seconds."""
    return FastSHAPConfig(
        surrogate=stage(**surrogate or {}),
        explainer=stage(**explainer or {}),
        **{"num_masks": 4, "width": 4, **settings},
    )
