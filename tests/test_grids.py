"""Finer grids of convolutional backbones, and images of other sizes and shapes."""

import copy
import pickle

import pytest
import timm
import timm.models.twins
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from shapwrap import ShapleyWrapper, shapley_loss
from shapwrap.errors import ArgumentError, GridError
from tests.grid_models import GRID_MODELS, build_grid_model

SIZE = (64, 96)
PADDED = ["timm-resnet-d", "timm-nfnet-same", "timm-convnext", "torchvision-convnext"]


def _images(size=SIZE, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(3))


def _structure(model):
    """Everything that a finer grid could have changed in the layers, hooks included."""
    return [
        (
            {k: v for k, v in vars(m).items() if not k.startswith("_")},
            {k: list(v) for k, v in vars(m).items() if "hooks" in k and v is not None},
        )
        for m in model.modules()
    ]


def _same(before, after):
    return repr(before) == repr(after)


@pytest.mark.parametrize("kind", list(GRID_MODELS))
def test_finer_grids(kind):
    model, images = build_grid_model(kind), _images(batch=1)
    with torch.no_grad():
        original = model(images)
    parameters = list(model.named_parameters())
    values = [parameter.clone() for _, parameter in parameters]
    structure = _structure(model)
    for rows, columns in ((4, 6), (8, 12)):
        wrapped = ShapleyWrapper(model, image_size=SIZE, grid=(rows, columns))
        assert wrapped.grid == (rows, columns)
        after = list(model.named_parameters())
        assert [(name, id(p)) for name, p in parameters] == [(name, id(p)) for name, p in after]
        assert all(torch.equal(a, b) for a, (_, b) in zip(values, after, strict=True))
        _check_game(wrapped, images)
        with torch.no_grad():
            change = (wrapped(images) - original).abs().max()
        assert change > 1e-5 * original.abs().max()
        report = wrapped.report()
        assert report.flops.after > report.flops.before
        assert "stride 1" in report.note
        assert wrapped.unwrap() is model
        assert _same(structure, _structure(model))
        with torch.no_grad():
            assert torch.equal(model(images), original)


@torch.no_grad()
def _check_game(wrapped, images):
    """Efficiency, and not one bit of what absent patches hold, at the grid of the wrapper."""
    rows, columns = wrapped.grid
    everybody = torch.ones(len(images), 1, rows * columns, dtype=torch.bool)
    some = torch.rand(everybody.shape) < 0.5
    coalitions = torch.cat((some, everybody, ~everybody), dim=1)
    logits, values, estimates = wrapped(images, coalitions)
    tolerance = {"atol": 1e-4 * float(logits.abs().max()), "rtol": 0.0}
    torch.testing.assert_close(values[:, 1], logits, **tolerance)
    torch.testing.assert_close(estimates[:, 1], logits, **tolerance)
    assert not values[:, 2].any()
    attribution = wrapped.attribute(images)
    assert attribution.shape == (len(images), rows * columns, 5)
    torch.testing.assert_close(attribution.sum(1), logits, **tolerance)
    absent = ~some.reshape(-1, 1, rows, columns)
    absent = absent.repeat_interleave(images.shape[2] // rows, 2)
    absent = absent.repeat_interleave(images.shape[3] // columns, 3)
    repainted = torch.where(absent, 100 * torch.rand_like(images), images)
    assert torch.equal(wrapped.value(repainted, some), wrapped.value(images, some))
    assert not torch.equal(wrapped(repainted), logits)


@pytest.mark.parametrize("kind", PADDED)
def test_copies_of_a_finer_grid(kind):
    model, images = build_grid_model(kind), _images()
    with torch.no_grad():
        original = model(images)
    wrapped = ShapleyWrapper(model, image_size=SIZE, grid=(4, 6))
    assert any(change.padding is not None for change in wrapped._wrapping.stride_changes)
    copies = [copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))]
    with torch.no_grad():
        logits = wrapped(images)
        for copied in copies:
            assert torch.equal(copied(images), logits)
            assert torch.equal(copied.unwrap()(images), original)
            assert torch.equal(wrapped(images), logits)
        assert torch.equal(wrapped.unwrap()(images), original)


@pytest.mark.parametrize("kind", ["timm-resnext", "timm-resnet-blur", "torchvision-resnext"])
@pytest.mark.parametrize("size", [(64, 96), (70, 101)])
def test_a_finer_block_holds_the_native_one(kind, size):
    """Bottlenecks mix places in their strided layer alone, so every second place is exact."""
    model, images = build_grid_model(kind), _images(size)
    outputs = []
    model.layer4[0].register_forward_hook(lambda *call: outputs.append(call[-1]))
    with torch.no_grad():
        model(images)
        native = outputs[-1]
        rows, columns = (-(-length // 16) for length in size)
        wrapped = ShapleyWrapper(model, image_size=size, grid=(rows, columns))
        wrapped(images)
    assert outputs[-1].shape[-2:] == (rows, columns)
    torch.testing.assert_close(outputs[-1][..., ::2, ::2], native, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", PADDED)
@pytest.mark.parametrize("size", [(96, 64), (90, 61)])
def test_a_finer_grid_follows_the_image(kind, size):
    wrapped = ShapleyWrapper(build_grid_model(kind), image_size=SIZE, grid=(4, 6))
    images = _images(size)
    rows, columns = wrapped.explain(images).grid
    native = ShapleyWrapper(build_grid_model(kind)).explain(images).grid
    for finer, coarse in zip((rows, columns), native, strict=True):
        assert finer in (2 * coarse - 1, 2 * coarse)
    coalitions = torch.rand(2, 2, rows * columns) < 0.5
    with torch.no_grad():
        output = wrapped(images, coalitions)
        torch.testing.assert_close(
            wrapped.attribute(images).sum(1), output.logits, atol=1e-5, rtol=1e-4
        )
    assert wrapped.grid == (4, 6)


@pytest.mark.parametrize("kind", ["timm-resnet-d", "timm-convnext", "timm-tf-efficientnet"])
def test_a_finer_grid_trains(kind):
    wrapped = ShapleyWrapper(build_grid_model(kind), image_size=SIZE, grid=(4, 6)).train()
    coalitions = torch.rand(2, 2, 24) < 0.5
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=1e-3)
    output = wrapped(_images(), coalitions)
    loss = shapley_loss(output) + output.logits.square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in wrapped.parameters())
    optimizer.step()


def test_a_model_in_half_precision_has_a_finer_grid():
    model = build_grid_model("timm-resnet-d").bfloat16()
    wrapped = ShapleyWrapper(model, image_size=SIZE, grid=(4, 6))
    assert wrapped.attribute(_images().bfloat16()).shape == (2, 24, 5)


@pytest.mark.parametrize("source", ["timm", "torchvision"])
def test_resnet50_with_a_grid_of_14(source):
    """The paper's ResNet-50: last stage at stride 1, 4.1 -> 6.6 G multiply-adds."""
    get = timm.create_model if source == "timm" else torchvision.models.get_model
    model = get("resnet50", num_classes=10)
    wrapped = ShapleyWrapper(model, grid=(14, 14)).eval()
    assert wrapped.grid == (14, 14)
    report = wrapped.report()
    assert report.params.before == report.params.after
    assert report.flops.before == pytest.approx(4.1e9, rel=0.02)
    # The classifier here has 10 classes; on 196 patches the paper's has 1000.
    classifier = 196 * 2048 * (1000 - 10)
    assert report.flops.after + classifier == pytest.approx(6.6e9, rel=0.01)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        wrapped.attribute(torch.randn(1, 3, 224, 224))
    assert counter.get_total_flops() / 2 == report.flops.after
    assert wrapped.unwrap().layer4[0].conv2.stride == (2, 2)


def test_a_coarse_copy_for_attention_is_no_level():
    """PVT-v2 shrinks keys and values of early stages to the size of its last map."""
    model = timm.create_model("pvt_v2_b0", num_classes=5).eval()
    wrapped = ShapleyWrapper(model, image_size=SIZE, grid=(4, 6))
    assert [change.layer for change in wrapped._wrapping.stride_changes] == [
        model.stages[3].downsample.proj
    ]


class _Halved(nn.Module):
    def forward(self, images):
        return images[..., ::2, ::2]


class _OneSize(nn.Conv2d):
    def forward(self, images):
        return super().forward(images) + torch.arange(24)


def _own(*layers):
    stem = nn.Conv2d(3, 8, 3, 2, padding=1)
    return nn.Sequential(stem, *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def _resnet():
    return timm.create_model("test_resnet", num_classes=5)


REFUSALS = {
    "slices": (
        lambda: _own(_Halved()),
        (32, 48),
        r"made by 1 \(_Halved\), which has no stride",
    ),
    "one-size": (
        lambda: _own(_OneSize(8, 8, 3, 2, padding=1), nn.Identity()),
        (32, 48),
        r"with 1 \(_OneSize\) at stride 1 its forward pass fails",
    ),
    "normalized": (
        lambda: _own(nn.LayerNorm([32, 48])),
        (64, 96),
        r"with 0 \(Conv2d\) at stride 1 .* keeps that size",
    ),
    "convmixer": (
        lambda: timm.models.convmixer.ConvMixer(16, 1, 3, 8, num_classes=5),
        (16, 24),
        r"stem.0 \(Conv2d\) of stride \(8, 8\)",
    ),
    "swin": (
        lambda: torchvision.models.SwinTransformer(
            [4, 4], 8, [1, 1], [1, 1], [2, 2], num_classes=5
        ),
        (16, 24),
        r"features.2 \(PatchMerging\), which has no stride",
    ),
    "twins": (
        lambda: timm.models.twins.Twins(
            num_classes=5, depths=(1, 1, 1, 1), embed_dims=(8, 16, 16, 32), num_heads=(1, 1, 1, 2)
        ),
        (4, 6),
        r"patch_embeds.3.proj \(Conv2d\) at stride 1 .* fails",
    ),
    "coatnet": (
        lambda: timm.create_model("coatnet_pico_rw_224", img_size=SIZE, num_classes=5),
        (4, 6),
        r"stages.3.blocks.0.* keeps that size",
    ),
    "vit": (
        lambda: timm.create_model("test_vit", img_size=SIZE),
        (8, 12),
        r"patch embedding makes \(4, 6\) tokens",
    ),
    "between": (_resnet, (5, 7), r"its finer grids are \(4, 6\), \(8, 12\), …"),
    "rows": (_resnet, (4, 7), r"its finer grids are \(4, 6\)"),
    "columns": (_resnet, (2, 6), r"its finer grids are \(4, 6\)"),
    "coarser": (_resnet, (1, 1), "that is coarser"),
    "pixels": (_resnet, (1000, 1000), "more than one patch a pixel"),
}


@pytest.mark.parametrize("kind", list(REFUSALS))
def test_grids_out_of_reach_leave_the_model_alone(kind):
    make, grid, why = REFUSALS[kind]
    model = make()
    model.eval()
    structure, images = _structure(model), _images()
    with torch.no_grad():
        original = model(images)
    with pytest.raises(GridError, match=why) as caught:
        ShapleyWrapper(model, image_size=SIZE, grid=grid)
    assert "out of reach" in str(caught.value)
    assert _same(structure, _structure(model))
    with torch.no_grad():
        assert torch.equal(model(images), original)


def test_a_refused_option_leaves_the_strides_alone():
    model = build_grid_model("timm-convnext")
    structure = _structure(model)
    with pytest.raises(ArgumentError, match="class_names"):
        ShapleyWrapper(model, image_size=SIZE, grid=(4, 6), class_names=["one"])
    assert _same(structure, _structure(model))
