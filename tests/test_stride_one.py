"""At stride 1 a layer computes at every position what it computed at every second one."""

import copy
import pickle

import pytest
import timm.layers
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import std_conv
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from torch import nn

from shapwrap.backbones.stride_one import LayerCall, native_strides, to_stride_one
from shapwrap.errors import GridError

CHANNELS = 4
SAME = {
    "conv": lambda k, s: timm.layers.Conv2dSame(CHANNELS, CHANNELS, k, stride=s),
    "depthwise": lambda k, s: timm.layers.Conv2dSame(
        CHANNELS, CHANNELS, k, stride=s, groups=CHANNELS
    ),
    "standardized": lambda k, s: std_conv.StdConv2dSame(CHANNELS, CHANNELS, k, stride=s),
    "average": lambda k, s: AvgPool2dSame(k, stride=s),
    "maximum": lambda k, s: MaxPool2dSame(k, stride=s),
}
FIXED = {
    "conv": lambda k, p, s: nn.Conv2d(CHANNELS, CHANNELS, k, stride=s, padding=p),
    "depthwise": lambda k, p, s: nn.Conv2d(CHANNELS, 8, k, stride=s, padding=p, groups=CHANNELS),
    "reflected": lambda k, p, s: nn.Conv2d(
        CHANNELS, 8, k, stride=s, padding=p, padding_mode="reflect"
    ),
    "standardized": lambda k, p, s: std_conv.StdConv2d(CHANNELS, 8, k, stride=s, padding=p),
    "average": lambda k, p, s: nn.AvgPool2d(k, stride=s, padding=p),
    "average-present": lambda k, p, s: nn.AvgPool2d(k, s, padding=p, count_include_pad=False),
    "maximum": lambda k, p, s: nn.MaxPool2d(k, stride=s, padding=p),
}
sizes = st.tuples(st.integers(7, 12), st.integers(7, 12))
strides = st.sampled_from([2, (2, 2), (2, 1), (1, 2)])


def _call(layer, size, batch=2):
    layer = layer.double().eval()
    generator = torch.Generator().manual_seed(size[0] * 16 + size[1])
    images = torch.randn(batch, CHANNELS, *size, generator=generator, dtype=torch.float64)
    return LayerCall("it", layer, (images,), {}, layer(images).detach())


def _attributes(layer):
    kept = {name: value for name, value in vars(layer).items() if not name.startswith("_")}
    return kept, {name: dict(value) for name, value in vars(layer).items() if "hooks" in name}


@torch.no_grad()
def _check(call, expected_size=None):
    """Returns the offset, having checked values, size and undo."""
    layer = call.layer
    before = copy.deepcopy(_attributes(layer))
    pair = (layer.stride,) * 2 if isinstance(layer.stride, int) else tuple(layer.stride)
    parameters = [*layer.parameters()]
    change, offset = to_stride_one(call)
    assert type(layer.stride) is type(change.stride) and layer.stride in (1, (1, 1))
    finer = layer(call.args[0])
    native = finer[..., offset[0] :: pair[0], offset[1] :: pair[1]]
    assert native.shape == call.output.shape
    torch.testing.assert_close(native, call.output, atol=1e-12, rtol=1e-12)
    if expected_size is not None:
        assert tuple(finer.shape[-2:]) == expected_size(call, pair)
    with native_strides([change]):
        assert torch.equal(layer(call.args[0]), call.output)
    assert torch.equal(layer(call.args[0]), finer)
    copied = pickle.loads(pickle.dumps(change))
    assert torch.equal(copied.layer(call.args[0]), finer)
    copied.undo()
    assert torch.equal(copied.layer(call.args[0]), call.output)
    assert torch.equal(layer(call.args[0]), finer)
    change.undo()
    assert _attributes(layer) == before
    assert all(a is b for a, b in zip(parameters, layer.parameters(), strict=True))
    assert torch.equal(layer(call.args[0]), call.output)
    return offset


def _two_for_one(call, pair):
    """Two positions for each native one, as far as the input goes."""
    sizes = zip(call.args[0].shape[-2:], call.output.shape[-2:], pair, strict=True)
    return tuple(native if step == 1 else min(size, 2 * native) for size, native, step in sizes)


@given(st.sampled_from(list(FIXED)), st.integers(1, 5), st.integers(0, 2), sizes, strides)
def test_layers_with_fixed_padding(kind, kernel, padding, size, stride):
    padding = min(padding, (kernel - 1) // 2)
    if kind.startswith(("average", "reflected")) and 2 * padding != kernel - 1:
        padding = 0  # Their border counts, and another one before it would change them.
    call = _call(FIXED[kind](kernel, padding, stride), size)
    assert _check(call, _two_for_one) == (0, 0)


@given(st.sampled_from(list(SAME)), st.integers(1, 5), sizes, strides)
def test_layers_with_dynamic_padding(kind, kernel, size, stride):
    call = _call(SAME[kind](kernel, stride), size)
    offset = _check(call, lambda call, _: tuple(call.args[0].shape[-2:]))
    pair = (stride, stride) if isinstance(stride, int) else stride
    for axis in (0, 1):
        # At stride 1 an odd kernel has its middle over its own pixel, in images of any size.
        after = pair[axis] == 2 and kernel % 2 == 1 and kernel > 1 and size[axis] % 2 == 0
        assert offset[axis] == after


@given(st.sampled_from([3, 5]), st.sampled_from(["reflect", "constant"]), st.booleans(), sizes)
def test_blur_pools(kernel, mode, known, size):
    channels = CHANNELS if known else None
    layer = timm.layers.BlurPool2d(channels, filt_size=kernel, stride=2, pad_mode=mode)
    assert _check(_call(layer, size), _two_for_one) == (0, 0)


@given(st.integers(2, 4), st.integers(0, 1), sizes)
def test_maximum_over_windows_beyond_the_border(kernel, padding, size):
    padding = min(padding, kernel - 2)
    call = _call(nn.MaxPool2d(kernel, 2, padding=padding, ceil_mode=True), size)
    assert _check(call) == (0, 0)


@given(st.booleans(), sizes)
def test_averages_over_windows_beyond_the_border(count, size):
    """The shortcuts of resnet-d, resnet-v2 and nfnet."""
    layer = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=count)
    call = _call(layer, size)
    assert _check(call, lambda call, _: tuple(call.args[0].shape[-2:])) == (0, 0)


@given(st.sampled_from([3, 5]), sizes)
def test_a_pool_beside_dynamic_padding_sees_the_same_place(kernel, size):
    conv = _call(SAME["conv"](kernel, 2), size)
    pool = _call(nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False), size)
    _, beside = to_stride_one(conv)
    change, offset = to_stride_one(pool, leading=True)
    assert offset == beside == tuple(1 - length % 2 for length in size)
    # The same form serves images of other sizes, even and odd.
    other = (size[0] + 1, size[1])
    change.undo()
    native = _call(pool.layer, other)
    change.apply()
    finer = pool.layer(native.args[0])
    found = finer[..., 1 - other[0] % 2 :: 2, 1 - other[1] % 2 :: 2]
    torch.testing.assert_close(found, native.output)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.AvgPool2d(3, 2, ceil_mode=True), "does not compute what it did at stride 2"),
        (nn.AdaptiveMaxPool2d(4), "has no stride to set to 1"),
        (nn.PixelUnshuffle(2), "has no stride to set to 1"),
        (nn.Conv2d(CHANNELS, 3, 4, stride=4), "of stride .4, 4., and only layers of stride 2"),
        (nn.Conv2d(CHANNELS, 3, 3, stride=(2, 3)), "only layers of stride 2"),
        (nn.Conv2d(CHANNELS, 3, 5), "only layers of stride 2"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_layers_without_such_a_form_stay_as_they_are(layer, why):
    call = _call(layer, (8, 8))
    before = copy.deepcopy(_attributes(layer))
    with pytest.raises(GridError, match=why) as caught:
        to_stride_one(call)
    assert type(layer).__name__ in str(caught.value)
    assert _attributes(layer) == before
    assert torch.equal(layer(call.args[0]), call.output)
