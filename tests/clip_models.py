"""Small image-text models: any tower of `tests.towers` beside a small encoder of texts."""

import json

import open_clip
import torch
from torch import nn

from tests.towers import EMBEDDING, build

VOCABULARY, LENGTH = 50, 8


def clip_model(kind="vit-average", *, bias=None, **options):
    """An open_clip model around this tower; with `bias` it has SigLIP's logit bias."""
    vision = {"image_size": 16, "patch_size": 4, "width": 24, "layers": 1, "head_width": 8}
    text = {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": 16, "heads": 2}
    model = open_clip.CustomTextCLIP(
        EMBEDDING, vision, {**text, "layers": 1}, init_logit_bias=bias, **options
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.text.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    tower = build(kind)
    if kind == "vit-without-projection":
        tower.proj = nn.Parameter(torch.randn(24, EMBEDDING, generator=generator))
    model.visual = tower
    return model.eval()


def known_to_open_clip(folder):
    """The name of a small model that `open_clip.create_model` builds afterwards."""
    vision = {"image_size": 16, "patch_size": 4, "width": 24, "layers": 2, "head_width": 8}
    text = {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": 16, "heads": 2}
    config = {"embed_dim": EMBEDDING, "vision_cfg": vision, "text_cfg": {**text, "layers": 1}}
    (folder / "shapwrap-tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "shapwrap-tiny.json")
    return "shapwrap-tiny"


def images_of(wrapped, num=2, seed=1):
    return torch.randn(num, 3, *wrapped.image_size, generator=torch.Generator().manual_seed(seed))


def tokens(num=3, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (num, LENGTH), generator=generator)


def tokenizer(strings):
    """Letters as token ids, the highest last, where CLIP's encoders read the text off."""
    rows = [
        [1 + ord(letter) % (VOCABULARY - 3) for letter in text][: LENGTH - 1] for text in strings
    ]
    return torch.tensor([row + [VOCABULARY - 1] + [0] * (LENGTH - 1 - len(row)) for row in rows])


def coalitions_of(wrapped, num_images=2, num=4, seed=3):
    generator = torch.Generator().manual_seed(seed)
    coalitions = torch.rand(num_images, num, wrapped.num_patches, generator=generator) < 0.5
    coalitions[:, 1::2] = ~coalitions[:, 0::2]
    return coalitions
