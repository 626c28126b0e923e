"""Images of other sizes than a model was built for: the grid follows, or a clear error."""

import pytest
import timm
import torch

from shapwrap import ShapleyWrapper
from shapwrap.errors import ImageError
from tests.grid_models import build_grid_model

FAMILIES = [
    "timm-resnet-d",
    "timm-nfnet-same",
    "timm-convnext",
    "timm-resnetv2",
    "timm-densenet",
    "timm-regnetx",
    "timm-tf-efficientnet",
    "timm-mobilenetv3",
    "torchvision-convnext",
    "torchvision-resnext",
]


def _images(size, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(3))


def test_other_image_sizes_have_other_grids():
    wrapped = ShapleyWrapper(timm.create_model("test_resnet", num_classes=10)).eval()
    images = torch.randn(2, 3, 96, 64)
    explanation = wrapped.explain(images)
    assert explanation.grid == (3, 2)
    assert explanation.heatmap().shape == (2, 96, 64)
    coalitions = torch.rand(2, 2, 6) < 0.5
    with torch.no_grad():
        assert wrapped(images, coalitions).values.shape == (2, 2, 10)
    assert wrapped.grid == (5, 5)
    dynamic = ShapleyWrapper(timm.create_model("test_vit", dynamic_img_size=True)).eval()
    assert dynamic.explain(torch.randn(1, 3, 96, 64)).grid == (6, 4)
    assert dynamic.value(torch.randn(1, 3, 96, 64), torch.ones(1, 1, 24).bool()).shape == (
        1,
        1,
        1000,
    )


@pytest.mark.parametrize("kind", FAMILIES)
def test_other_image_sizes_of_convolutional_families(kind):
    wrapped = ShapleyWrapper(build_grid_model(kind), image_size=(64, 96))
    assert wrapped.grid == (2, 3)
    images = _images((96, 64))
    assert wrapped.explain(images).grid == (3, 2)
    with torch.no_grad():
        logits = wrapped(images, torch.rand(2, 2, 6) < 0.5).logits
        torch.testing.assert_close(logits, wrapped.model(images), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(wrapped.attribute(images).sum(1), logits, atol=1e-5, rtol=1e-4)


def _swin(name, **options):
    return timm.create_model(
        name, depths=(1, 1), embed_dim=8, num_heads=(1, 1), num_classes=5, **options
    )


@pytest.mark.parametrize(
    ("make", "built", "refused"),
    [
        (lambda size: _swin("swin_tiny_patch4_window7_224", img_size=size), (56, 112), (112, 56)),
        (
            lambda size: _swin("swinv2_tiny_window8_256", img_size=size, window_size=4),
            (64, 96),
            (96, 64),
        ),
        (
            lambda size: timm.create_model("maxvit_rmlp_pico_rw_256", img_size=size, num_classes=5),
            (64, 64),
            (64, 72),
        ),
        (
            lambda size: timm.create_model("test_vit", dynamic_img_size=False, img_size=size),
            (64, 96),
            (96, 64),
        ),
        (lambda size: timm.create_model("test_vit", dynamic_img_size=True), (64, 96), (60, 96)),
        (lambda size: timm.create_model("test_convnext"), (64, 96), (8, 8)),
    ],
    ids=["swin", "swinv2", "maxvit", "vit", "dynamic-vit", "convnext"],
)
def test_sizes_that_a_model_refuses(make, built, refused):
    wrapped = ShapleyWrapper(make(built).eval(), image_size=built)
    images = _images(built, batch=1)
    rows, columns = wrapped.explain(images).grid
    assert (rows, columns) == wrapped.grid and rows * built[1] == columns * built[0]
    with torch.no_grad():
        logits = wrapped(images, torch.rand(1, 2, rows * columns) < 0.5).logits
        gains = logits - wrapped.baseline
        torch.testing.assert_close(wrapped.attribute(images).sum(1), gains, atol=1e-5, rtol=1e-4)
    with pytest.raises(ImageError, match=f"refuses images of {refused[0]} x {refused[1]} pixels"):
        wrapped.explain(_images(refused, batch=1))


def test_a_cell_that_does_not_divide_the_image():
    model = timm.create_model("test_resnet", num_classes=10)
    wrapped = ShapleyWrapper(model, image_size=(70, 101)).eval()
    rows, columns = wrapped.grid
    images = torch.randn(1, 3, 70, 101)
    coalitions = torch.zeros(1, 1, rows * columns, dtype=torch.bool)
    coalitions[..., :columns] = True
    changed = images.clone()
    changed[..., -(-70 // rows) :, :] = 5.0
    with torch.no_grad():
        assert torch.equal(wrapped.value(images, coalitions), wrapped.value(changed, coalitions))
