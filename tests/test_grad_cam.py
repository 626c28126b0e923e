"""Grad-CAM against its formula on parts taken by hand, and the layers that introspection finds."""

import numpy as np
import pytest
import timm.models.swin_transformer
import timm.models.vision_transformer
import torch
import torchvision
from torch import nn

from shapwrap import ShapleyWrapper
from shapwrap.errors import ArgumentError, UnsupportedBackboneError
from shapwrap.explainers import GradCAM
from shapwrap.explainers.grad_cam import class_activation_map, resized
from tests.backbones import BUILDERS, SQUARE_KINDS, build
from tests.explained_models import SIZE, tiny


def _images(size, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(3))


def _by_hand(features, logits, target, relu=True):
    """Features [B, N, D] with their graph; the formula in loops."""
    maps = []
    for index in range(len(logits)):
        gradient = torch.autograd.grad(logits[index, target], features, retain_graph=True)[0]
        gradient, values = gradient[index].numpy(), features[index].detach().numpy()
        weights = [gradient[:, channel].mean() for channel in range(values.shape[1])]
        maps.append([sum(w * v for w, v in zip(weights, row, strict=True)) for row in values])
    found = np.array(maps)
    return np.maximum(found, 0) if relu else found


def _check(model, images, features, logits, variant, relu=False, **options):
    explainer = GradCAM(model, relu=relu, **options)
    found = explainer(images, 1)
    assert explainer.variant == variant
    expected = _by_hand(features, logits, 1, relu)
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(found.values.numpy(), expected, rtol=1e-3, atol=1e-6)
    assert found.explained().isnan().all()
    return found


@pytest.mark.parametrize("kind", ["resnet", "convnext"])
@pytest.mark.parametrize("relu", [True, False])
def test_convolutional(kind, relu):
    model, size = build(kind, (2, 3))
    images = _images(size)
    made = model.forward_features(images)
    features = made.flatten(2).transpose(1, 2)
    logits = model.forward_head(features.transpose(1, 2).unflatten(2, (2, 3)))
    found = _check(model, images, features, logits, "cnn", relu)
    assert found.method == "grad-cam" and found.grid == (2, 3)
    wrapped = ShapleyWrapper(model, image_size=size)
    again = GradCAM(wrapped, relu=relu)(images, 1)
    torch.testing.assert_close(again.values, found.values, rtol=1e-3, atol=1e-6)
    assert found.values.min() >= 0 if relu else found.values.min() < 0


def test_layer_before_the_pooling_of_torchvision():
    model, size = build("torchvision-resnet", (2, 3))
    explainer = GradCAM(model)
    explainer(_images(size))
    assert explainer._found.module is model.layer4 and explainer._found.side == "output"


def test_layer_by_name_and_by_module():
    model, images = tiny("cnn")[0], _images(SIZE)
    found = GradCAM(model, relu=False)(images, 1)
    for layer in ("3", model[3], "4"):
        chosen = GradCAM(model, layer=layer, relu=False)
        torch.testing.assert_close(chosen(images, 1).values, found.values)
        assert chosen.variant == "layer" and chosen.name == "grad-cam"


@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_windows_with_channels_last(size):
    model = timm.models.swin_transformer.SwinTransformer(
        img_size=size,
        patch_size=4,
        window_size=4,
        embed_dim=8,
        depths=(1, 1, 2),
        num_heads=(1, 2, 2),
        num_classes=5,
    ).eval()
    images = _images(size)
    features = model.forward_features(images).flatten(1, 2)
    grid = (size[0] // 16, size[1] // 16)
    logits = model.forward_head(features.unflatten(1, grid))
    assert _check(model, images, features, logits, "cnn").grid == grid


@pytest.mark.parametrize("kind", ["vit-class-token", "vit-registers", "vit-average"])
def test_tokens_enter_the_last_attention(kind):
    model, size = build(kind, (2, 3))
    images = _images(size)
    block, prefix = model.blocks[-1], model.num_prefix_tokens
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for earlier in model.blocks[:-1]:
        tokens = earlier(tokens)
    normed = block.norm1(tokens)
    first, features = normed[:, :prefix], normed[:, prefix:]
    tokens = tokens + block.ls1(block.attn(torch.cat((first, features), dim=1)))
    tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
    logits = model.forward_head(model.norm(tokens))
    torch.testing.assert_close(logits, model(images))
    found = _check(model, images, features, logits, "tokens")
    assert found.method == "grad-cam (tokens)"
    by_layer = GradCAM(model, layer=block.norm1, relu=False)(images, 1)
    torch.testing.assert_close(by_layer.values, found.values)


def test_block_without_a_norm_before_attention():
    model, size = build("relpos-average-class-token", (2, 3))
    images = _images(size)
    patches = model.patch_embed(images)
    tokens = torch.cat((model.cls_token.expand(len(images), -1, -1), patches), dim=1)
    shared = model.shared_rel_pos.get_bias()
    for earlier in model.blocks[:-1]:
        tokens = earlier(tokens, shared_rel_pos=shared)
    block = model.blocks[-1]
    first, features = tokens[:, :1], tokens[:, 1:]
    tokens = torch.cat((first, features), dim=1)
    tokens = tokens + block.norm1(block.attn(tokens, shared_rel_pos=shared))
    tokens = tokens + block.norm2(block.mlp(tokens))
    logits = model.forward_head(model.norm(tokens))
    torch.testing.assert_close(logits, model(images))
    explainer = GradCAM(model, relu=False)
    found = explainer(images, 1)
    site = explainer._found
    assert site.module is block.attn.qkv and site.side == "input"
    # The layer's input is the block's, so its gradient past the attention counts too.
    expected = _by_hand(features, logits, 1, relu=False)
    np.testing.assert_allclose(found.values, expected, rtol=1e-3, atol=1e-6)


KINDS = [k for k in BUILDERS if k not in ("deepseek-average-align", "gemma-average-soft")]
# Plain, models without a size of their own are looked at with thousands of patches.
PLAIN = [k for k in KINDS if "naflex" not in k]


@pytest.mark.parametrize(("kind", "wrap"), [(k, True) for k in KINDS] + [(k, False) for k in PLAIN])
def test_finds_a_layer_that_the_logits_depend_on(kind, wrap):
    grid = (3, 3) if kind in SQUARE_KINDS else (2, 3)
    model, size = build(kind, grid)
    explained = ShapleyWrapper(model, image_size=size) if wrap else model
    if wrap and explained.patch_layer is not None:
        nn.init.normal_(explained.patch_layer.weight)
    found = GradCAM(explained, relu=False)(_images(size), 1)
    assert found.grid == grid
    assert found.values.count_nonzero() == found.values.numel()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_tower_inside_another_model():
    vit = timm.models.vision_transformer.VisionTransformer(
        patch_size=56, embed_dim=24, depth=2, num_heads=3, num_classes=5
    )
    model = nn.Sequential(vit, nn.Linear(5, 4)).eval()
    explainer = GradCAM(model)
    assert explainer(_images((224, 224), batch=1), 1).grid == (4, 4)
    assert explainer.variant == "tokens" and explainer.name == "grad-cam (tokens)"
    assert explainer._found.module is vit.blocks[-1].norm1


def test_resized_to_the_grid_that_was_asked_for():
    model, size = build("resnet", (2, 3))
    images = _images(size)
    own = GradCAM(model, relu=False)(images, 1).values
    found = GradCAM(model, grid=(4, 6), relu=False)(images, 1)
    assert found.grid == (4, 6)
    torch.testing.assert_close(
        found.values,
        nn.functional.interpolate(
            own.unflatten(1, (2, 3))[:, None], (4, 6), mode="bilinear"
        ).flatten(1),
    )
    # An earlier, finer map comes back on the grid of the patches.
    early = GradCAM(model, layer="layer1", relu=False)(images, 1)
    assert early.grid == (2, 3)


def test_resizing_by_averages():
    values = torch.arange(24.0)[None]
    torch.testing.assert_close(resized(values, (4, 6), (4, 6)), values)
    constant = resized(torch.full((1, 24), 2.5), (4, 6), (2, 3))
    torch.testing.assert_close(constant, torch.full((1, 6), 2.5))
    found = resized(values, (4, 6), (2, 3)).unflatten(1, (2, 3))
    assert (found.diff(dim=1) > 0).all() and (found.diff(dim=2) > 0).all()


def test_heads_as_channels():
    attention, gradients = torch.rand(2, 6, 3), torch.randn(2, 6, 3)
    expected = np.zeros((2, 6))
    for image in range(2):
        for patch in range(6):
            for head in range(3):
                weight = gradients[image, :, head].mean()
                expected[image, patch] += weight * attention[image, patch, head]
    found = class_activation_map(attention.bfloat16(), gradients.bfloat16(), relu=False)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, atol=0.02)
    found = class_activation_map(attention, gradients)
    np.testing.assert_allclose(found, np.maximum(expected, 0), rtol=1e-4, atol=1e-6)


def test_warns_where_patches_have_no_gradient():
    model, images = tiny("vit")[0], _images(SIZE)
    with pytest.warns(UserWarning, match="variant='tokens'"):
        found = GradCAM(model, layer="norm")(images)
    assert not found.values.any()


def test_chunks():
    model, size = build("vit-class-token", (2, 3))
    images, seen = _images(size, batch=5), []
    handle = model.patch_embed.register_forward_hook(lambda *given: seen.append(len(given[2])))
    explainer = GradCAM(model, chunk_size=2)
    explainer(images)
    seen.clear()
    found = explainer(images)
    handle.remove()
    assert max(seen) == 2
    torch.testing.assert_close(found.values, GradCAM(model)(images).values)


def test_gradient_checkpointing():
    model, size = build("vit-class-token", (2, 3))
    images = _images(size)
    expected = GradCAM(model)(images).values
    model.set_grad_checkpointing(True)
    torch.testing.assert_close(GradCAM(model)(images).values, expected)
    assert model.grad_checkpointing


def test_a_function_with_a_layer():
    model, size = build("resnet", (2, 3))
    images = _images(size)
    found = GradCAM(lambda x: model(x), layer=model.layer4, grid=(2, 3))(images)
    torch.testing.assert_close(found.values, GradCAM(model)(images).values)
    with pytest.raises(UnsupportedBackboneError, match="function"):
        GradCAM(lambda x: model(x))
    with pytest.raises(ArgumentError, match="layer is 'layer4'"):
        GradCAM(lambda x: model(x), layer="layer4", grid=(2, 3))


def test_options_that_are_none():
    model, _ = build("resnet", (2, 3))
    with pytest.raises(ArgumentError, match="variant"):
        GradCAM(model, variant="heads")
    with pytest.raises(ArgumentError, match="one of the two"):
        GradCAM(model, variant="cnn", layer="layer4")
    with pytest.raises(ArgumentError, match="layer is 'layer9'"):
        GradCAM(model, layer="layer9")
    with pytest.raises(ArgumentError, match="no module of the model"):
        GradCAM(model, layer=nn.Linear(2, 2))


def test_layers_that_show_no_patches():
    model, size = build("resnet", (2, 3))
    with pytest.raises(UnsupportedBackboneError, match="aspect ratio"):
        GradCAM(model, layer="fc")(_images(size))
    with pytest.raises(UnsupportedBackboneError, match="last block of tokens"):
        GradCAM(model, variant="tokens")(_images(size))
    with pytest.raises(UnsupportedBackboneError, match="ran 2 times"):
        act = nn.ReLU()
        twice = nn.Sequential(
            nn.Conv2d(3, 4, 4, 4),
            act,
            nn.Conv2d(4, 4, 1),
            act,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 2),
        )
        GradCAM(twice, layer="1")(_images(size))
    vit, size = build("vit-class-token", (2, 3))
    with pytest.raises(UnsupportedBackboneError, match="map that its head reads"):
        GradCAM(vit, variant="cnn")(_images(size))
    assert not any(m._forward_hooks for m in (*model.modules(), *vit.modules(), *twice.modules()))


def test_torchvision_models_of_other_shapes():
    model = torchvision.models.SwinTransformer([4, 4], 8, [1, 1], [1, 2], [4, 4], num_classes=5)
    found = GradCAM(model.eval())(_images((64, 96)), 1)
    assert found.grid == (8, 12) and found.values.any()
    model = torchvision.models.DenseNet(8, (1, 1, 1, 1), 16, num_classes=5).eval()
    explainer = GradCAM(model, relu=False)
    found = explainer(_images((64, 96)), 1)
    # The ReLU after the last layer is a function that works in place on its output.
    features = torch.relu(model.features(_images((64, 96))))
    flat = features.flatten(2).transpose(1, 2)
    logits = model.classifier(flat.mean(dim=1))
    np.testing.assert_allclose(found.values, _by_hand(flat, logits, 1, False), rtol=1e-3, atol=1e-6)
