"""Tiny random ViTs in timm's and torchvision's layouts, and images for them."""

import timm.models.vision_transformer
import torch
import torchvision

from tests.backbones import NUM_CLASSES

PARTS = ("weight", "bias")


def random_images(size, batch=2, dtype=torch.float64):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1)).to(dtype)


GRID = {"grid": (3, 3)}
"""Of the models of `vit`: theirs, without a search for it."""


def relative(one, other):
    return float((one - other).abs().max() / other.abs().max())


def vit(**options):
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=12,
        patch_size=4,
        embed_dim=24,
        depth=2,
        num_heads=3,
        mlp_ratio=2,
        num_classes=NUM_CLASSES,
        **options,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def renamed(state, pairs, block, names):
    """Weights of timm's layers under the names of a library on nn.MultiheadAttention.

    Args:
        state: Of a model of `vit`.
        pairs: The library's name of a layer outside the blocks to timm's.
        block: The library's name of block {}.
        names: Of its two norms, its attention, and the two layers of its MLP.
    """
    pairs = dict(pairs)
    packed = {}
    for place in range(2):
        ours, theirs = block.format(place), f"blocks.{place}."
        norm1, norm2, attention, fc1, fc2 = (ours + name for name in names)
        pairs |= {
            norm1: theirs + "norm1",
            norm2: theirs + "norm2",
            attention + ".out_proj": theirs + "attn.proj",
            fc1: theirs + "mlp.fc1",
            fc2: theirs + "mlp.fc2",
        }
        for part in PARTS:
            packed[f"{attention}.in_proj_{part}"] = state[f"{theirs}attn.qkv.{part}"]
    return packed | {
        f"{a}.{part}": state[f"{b}.{part}"] for a, b in pairs.items() for part in PARTS
    }


def as_torchvision(model):
    other = torchvision.models.VisionTransformer(
        image_size=12,
        patch_size=4,
        num_layers=2,
        num_heads=3,
        hidden_dim=24,
        mlp_dim=48,
        num_classes=NUM_CLASSES,
    )
    pairs = {"conv_proj": "patch_embed.proj", "encoder.ln": "norm", "heads.head": "head"}
    names = ("ln_1", "ln_2", "self_attention", "mlp.0", "mlp.3")
    state = model.state_dict()
    given = renamed(state, pairs, "encoder.layers.encoder_layer_{}.", names)
    given |= {"class_token": state["cls_token"], "encoder.pos_embedding": state["pos_embed"]}
    other.load_state_dict(given)
    return other.eval()
