"""What is found out about real architectures, by introspection, and what must hold for them."""

import pytest
import timm
import torch
import torchvision
from torch import nn

from shapwrap import ShapleyWrapper
from shapwrap.errors import ImageError
from tests.backbones import BUILDERS, EXACT_KINDS, READOUTS, TOKEN_KINDS, make_case

# name, masking, readout, grid, whether the logits are those of the original model
TIMM = [
    ("test_vit", "token-removal", "class-token", (10, 10), True),
    ("test_vit2", "token-removal", "shared-norm", (10, 10), True),
    ("test_vit4", "token-removal", "shared-norm", (10, 10), True),
    ("deit_tiny_distilled_patch16_224", "token-removal", "affine", (14, 14), False),
    ("test_resnet", "zero-mask", "affine", (5, 5), True),
    ("test_efficientnet", "zero-mask", "affine", (5, 5), True),
    ("test_convnext", "zero-mask", "shared-norm", (5, 5), True),
    ("regnetx_002", "zero-mask", "affine", (7, 7), True),
    ("mobilenetv3_small_050", "zero-mask", "gap", (7, 7), True),
    ("swin_tiny_patch4_window7_224", "zero-mask", "affine", (7, 7), True),
]
TORCHVISION = [
    ("vit_b_32", "token-removal", "class-token", (7, 7), True),
    ("resnet18", "zero-mask", "affine", (7, 7), True),
    ("convnext_tiny", "zero-mask", "shared-norm", (7, 7), True),
    ("efficientnet_b0", "zero-mask", "affine", (7, 7), True),
    ("mobilenet_v3_small", "zero-mask", "gap", (7, 7), True),
    ("regnet_y_400mf", "zero-mask", "affine", (7, 7), True),
    ("swin_t", "zero-mask", "affine", (7, 7), True),
]
ARCHITECTURES = [("timm", *row) for row in TIMM] + [("torchvision", *row) for row in TORCHVISION]


def create(source, name):
    if source == "timm":
        return timm.create_model(name, num_classes=10)
    return torchvision.models.get_model(name, num_classes=10)


@pytest.mark.parametrize(
    ("source", "name", "masking", "readout", "grid", "exact"),
    ARCHITECTURES,
    ids=[f"{row[0]}-{row[1]}" for row in ARCHITECTURES],
)
def test_architectures(source, name, masking, readout, grid, exact):
    model = create(source, name).eval()
    wrapped = ShapleyWrapper(model)
    images = torch.randn(2, 3, *wrapped.image_size)
    with torch.no_grad():
        original, logits = model(images), wrapped(images)
        values = wrapped.attribute(images)
    report = wrapped.report()
    assert (report.masking, report.readout, wrapped.grid) == (masking, readout, grid)
    gain = logits - wrapped.baseline
    torch.testing.assert_close(values.sum(1), gain, atol=1e-4, rtol=1e-4)
    if exact:
        torch.testing.assert_close(logits, original, atol=1e-4, rtol=1e-4)
        assert report.max_logit_difference <= 1e-4
        # torchvision starts heads at zero.
        assert "logits are those of the original" in report.note or not logits.any()
    else:
        assert "class token, which was dropped" in report.note
        assert "fine-tune before use" in report.note


@pytest.mark.parametrize("kind", list(BUILDERS))
def test_kinds(kind):
    case = make_case(kind)
    report = case.wrapped.report()
    assert report.masking == ("token-removal" if kind in TOKEN_KINDS else "zero-mask")
    assert report.readout == READOUTS.get(kind, "affine")
    with torch.no_grad():
        original = case.wrapped.model(case.images)
        difference = (case.wrapped(case.images) - original).abs().max()
    assert (difference <= 1e-4) == (kind in EXACT_KINDS)
    assert (report.max_logit_difference <= 1e-4) == (kind in EXACT_KINDS)
    assert str(case.wrapped.grid[0]) in str(report)


def test_a_token_grid_covers_the_image():
    model = timm.create_model("test_vit", num_classes=2, dynamic_img_size=True)
    with pytest.raises(ImageError, match=r"refuses images of 63 x 63 pixels.*divisible"):
        ShapleyWrapper(model, image_size=(63, 63))
    with pytest.raises(ImageError, match="refuses images of 3 x 3"):
        ShapleyWrapper(create("torchvision", "vit_b_32"), image_size=(3, 3))


@pytest.mark.parametrize(
    "head",
    [
        nn.Linear(64, 7),
        nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 7)),
        nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Dropout(0.5), nn.Linear(32, 7)),
    ],
)
def test_a_head_of_ones_own(head):
    encoder = timm.create_model("test_vit", num_classes=0, global_pool="avg", fc_norm=False)
    wrapped = ShapleyWrapper(encoder, head=head).eval()
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(wrapped(images), head(encoder(images)), atol=1e-5, rtol=1e-5)
        values = wrapped.attribute(images)
    torch.testing.assert_close(values.sum(1), wrapped(images), atol=1e-5, rtol=1e-5)
    assert {id(p) for p in head.parameters()} <= {id(p) for p in wrapped.parameters()}
    wrapped.train()
    coalitions = torch.ones(2, 2, 100, dtype=torch.bool)
    output = wrapped(images, coalitions)
    torch.testing.assert_close(output.values[:, 0], output.logits, atol=1e-5, rtol=1e-5)


def test_new_classes():
    wrapped = ShapleyWrapper(timm.create_model("test_vit", num_classes=0), num_classes=3)
    assert wrapped.num_classes == 3
    assert torch.equal(wrapped(torch.randn(1, 3, 160, 160)), torch.zeros(1, 3))
    assert "train it before use" in wrapped.report().note
