"""B-cosified towers: layers against loops, the linear map they are, and what is left alone."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from shapwrap.backbones.base import Normalization
from shapwrap.errors import (
    ArgumentError,
    BackboneTypeError,
    TrainingError,
    UnsupportedBackboneError,
)
from shapwrap.explainers import BcosifiedTower, bcosify
from shapwrap.explainers.bcosified.batch_norm import UncentredBatchNorm2d
from shapwrap.explainers.bcosified.dynamic import explanation_mode, set_b
from shapwrap.explainers.bcosified.layers import BcosConv2d, BcosLinear
from shapwrap.explainers.bcosified.linear_summary import linear_summary
from shapwrap.explainers.bcosified.similarity import BcosifiedSimilarity

pytest.importorskip("open_clip")

from tests.bcosified_reference import SlowTower, slow_convolution, slow_unit
from tests.clip_models import clip_model
from tests.towers import EMBEDDING, build

SIZE = (32, 64)
"""One row of two places."""


def original():
    """A small ModifiedResNet in float64, whose running statistics are those of some data."""
    tower = build("resnet").double()
    generator = torch.Generator().manual_seed(1)
    for layer in tower.modules():
        if isinstance(layer, nn.BatchNorm2d):
            count = len(layer.running_var)
            layer.running_var.copy_(torch.rand(count, generator=generator) * 0.2 + 0.01)
            layer.running_mean.copy_(torch.randn(count, generator=generator) * 0.2)
    return tower


def images(num=2, size=SIZE, seed=0):
    return torch.randn(num, 3, *size, generator=torch.Generator().manual_seed(seed)).double()


def texts(num=4, seed=3):
    drawn = torch.randn(num, EMBEDDING, generator=torch.Generator().manual_seed(seed)).double()
    return drawn / drawn.norm(dim=1, keepdim=True)


def traces(module):
    return (
        {name: tensor.clone() for name, tensor in module.state_dict().items()},
        [m.training for m in module.modules()],
        [sorted(m.__dict__) for m in module.modules()],
        [(p.requires_grad, p.grad) for p in module.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()],
    )


def check_untouched(before, module):
    after = traces(module)
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1:] == after[1:]


# --- layers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", ["cosine", "response"])
@pytest.mark.parametrize("b", [1.0, 1.25, 2.0, 2.5])
@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 1)])
def test_convolution_against_loops(b, factor, stride, padding):
    layer = nn.Conv2d(3, 4, 3, stride=stride, padding=padding).double()
    made = BcosConv2d(layer, b=b, factor=factor)
    assert made.bias is None
    x = torch.randn(2, 3, 5, 7).double()
    x[0, :, :3, :3] = 0
    found = made(x)
    for i in range(2):
        expected = slow_convolution(
            x[i].numpy(), layer.weight.detach().numpy(), stride, padding, b, factor
        )
        np.testing.assert_allclose(found[i].detach().numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("factor", ["cosine", "response"])
@pytest.mark.parametrize("b", [1.0, 1.5, 2.0])
def test_linear_against_loops(b, factor):
    layer = nn.Linear(5, 3).double()
    made = BcosLinear(layer, b=b, factor=factor)
    x = torch.randn(2, 4, 5).double()
    found = made(x).detach()
    weight = layer.weight.detach().numpy()
    for i in range(2):
        for n in range(4):
            expected = [slow_unit(x[i, n].numpy(), w, b, factor) for w in weight]
            np.testing.assert_allclose(found[i, n].numpy(), expected, rtol=1e-10)


def test_factor_is_at_most_one_and_ignores_lengths():
    layer = nn.Conv2d(3, 4, 3, bias=False).double()
    made = BcosConv2d(layer, b=2.0)
    x = torch.randn(1, 3, 6, 6).double()
    ratio = made(x) / layer(x)
    assert ratio.min() > 0
    assert ratio.max() <= 1
    torch.testing.assert_close(made(7 * x), 7 * made(x))


@pytest.mark.parametrize("b", [1.0, 1.3, 2.0])
def test_gradients_at_zero_are_finite(b):
    layer = BcosConv2d(nn.Conv2d(2, 2, 3, padding=1), b=b)
    x = torch.zeros(1, 2, 4, 4, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.isfinite().all()
    assert layer.weight.grad.isfinite().all()


def test_batch_norm_divides_and_subtracts_nothing():
    layer = nn.BatchNorm2d(3, eps=1e-3, momentum=0.3).double()
    nn.init.uniform_(layer.weight, 0.5, 2)
    nn.init.normal_(layer.bias)
    layer.running_var.uniform_(0.5, 2)
    layer.running_mean.normal_()
    made = UncentredBatchNorm2d(layer)
    x = 2 + torch.randn(4, 3, 5, 6).double()
    variances = {False: layer.running_var.numpy().copy(), True: x.numpy().var(axis=(0, 2, 3))}
    gains = layer.weight.detach().numpy()
    for training in (True, False):
        made.running_var.copy_(layer.running_var)
        found = made.train(training)(x).detach().numpy()
        for c in range(3):
            expected = gains[c] * x[:, c].numpy() / math.sqrt(variances[training][c] + 1e-3)
            np.testing.assert_allclose(found[:, c], expected, rtol=1e-12)
        moved = 0.7 * variances[False] + 0.3 * variances[True]
        wanted = moved if training else variances[False]
        np.testing.assert_allclose(made.running_var.numpy(), wanted, rtol=1e-12)
    assert set(made.state_dict()) == {"weight", "running_var", "num_batches_tracked"}
    with pytest.raises(TrainingError, match="one value a channel"):
        made.train()(x[:1, :, :1, :1])


def test_cumulative_and_frozen_batch_norms():
    made = UncentredBatchNorm2d(nn.BatchNorm2d(2, momentum=None)).train()
    batches = torch.randn(3, 4, 2, 5, 5)
    for batch in batches:
        made(batch)
    expected = torch.stack([batch.var(dim=(0, 2, 3), unbiased=False) for batch in batches])
    torch.testing.assert_close(made.running_var, expected.mean(dim=0))
    made.reset_running_stats()
    assert torch.equal(made.running_var, torch.ones(2))
    frozen = FrozenBatchNorm2d(2)
    frozen.running_var.fill_(4)
    x = torch.randn(1, 2, 3, 3)
    torch.testing.assert_close(UncentredBatchNorm2d(frozen).eval()(x), x / math.sqrt(4 + 1e-5))


# --- the tower ------------------------------------------------------------------------------


def test_six_channels_give_the_first_response_of_the_original():
    tower = original()
    made = bcosify(tower, b=1.0)
    batch = images()
    encoded = made.encode(batch)
    assert encoded.shape == (2, 6, *SIZE)
    torch.testing.assert_close(made.body.conv1(encoded), tower.conv1(batch))
    # Pixels of 0 to 1, their inverse, and the normalisation of both, as they are defined.
    mean, std = torch.tensor([0.48, 0.46, 0.41]).double(), torch.tensor([0.27, 0.26, 0.28]).double()
    pixels = batch * std[:, None, None] + mean[:, None, None]
    both = torch.cat((pixels, 1 - pixels), dim=1)
    means, stds = torch.cat((mean, 1 - mean)), torch.cat((std, std))
    torch.testing.assert_close(encoded, (both - means[:, None, None]) / stds[:, None, None])


def test_without_biases_and_with_b_one_it_is_the_original():
    tower = original()
    with torch.no_grad():
        for layer in tower.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.zero_()
            if getattr(layer, "bias", None) is not None:
                layer.bias.zero_()
        tower.attnpool.positional_embedding.zero_()
    batch = images(size=(64, 64))
    torch.testing.assert_close(bcosify(tower, b=1.0)(batch), tower(batch), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(bcosify(tower, b=2.0)(batch), tower(batch), rtol=1e-2)


@pytest.mark.parametrize("b", [1.0, 1.5, 2.0])
@torch.no_grad()
def test_tower_against_windows(b):
    tower = original()
    made, slow = bcosify(tower, b=b), SlowTower(tower, b)
    batch = images()
    encoded = made.encode(batch)
    expected = slow.run(encoded)
    torch.testing.assert_close(made(batch), expected, rtol=1e-8, atol=0)
    for i in range(2):
        torch.testing.assert_close(made(batch[i : i + 1])[0], expected[i], rtol=1e-8, atol=0)
    torch.testing.assert_close(made.embed_places(encoded), slow.places(encoded), rtol=1e-7, atol=0)


def test_the_given_tower_is_left_alone():
    tower = original()
    next(tower.children()).train()
    tower.conv2.weight.requires_grad_(False)
    before, state = traces(tower), torch.get_rng_state()
    made = bcosify(tower)
    made(images()).sum().backward()
    check_untouched(before, tower)
    assert torch.equal(torch.get_rng_state(), state)
    shared = {p.data_ptr() for p in tower.parameters()} | {p.data_ptr() for p in tower.buffers()}
    assert not shared & {p.data_ptr() for p in (*made.parameters(), *made.buffers())}
    assert all(p.requires_grad for p in made.parameters())
    names = {name.rpartition(".")[2] for name, _ in made.named_parameters()}
    assert names == {"weight"}
    assert not made.training


def test_it_is_a_drop_in_image_tower_and_can_be_copied_and_saved():
    model = clip_model("resnet")
    model.visual = made = bcosify(model.visual)
    batch = images(size=(64, 96)).float()
    assert torch.equal(model.encode_image(batch), made(batch))
    assert torch.equal(copy.deepcopy(made)(batch), made(batch))
    other = bcosify(build("resnet"))
    nn.init.normal_(other.body.conv2.weight)
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(batch), made(batch))


def test_half_precision_and_autocast():
    made = bcosify(build("resnet").half())
    assert {p.dtype for p in made.parameters()} == {torch.float32}
    made.train()
    batch = images().float()
    plain = made(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = made(batch)
    assert torch.nn.functional.cosine_similarity(plain, rounded.float()).min() > 0.99


def test_max_pools_become_average_pools():
    tower, batch = original(), images()
    expected = bcosify(tower)(batch)
    tower.avgpool = nn.MaxPool2d(2)
    assert torch.equal(bcosify(tower)(batch), expected)


def test_set_b():
    tower = original()
    made = bcosify(tower, b=1.0)
    expected = bcosify(tower, b=1.5)(images())
    set_b(made, 1.5)
    assert torch.equal(made(images()), expected)
    for b in (0.5, math.nan, math.inf):
        with pytest.raises(ArgumentError, match="at least 1"):
            set_b(made, b)


# --- the linear map -------------------------------------------------------------------------


@pytest.mark.parametrize("b", [1.0, 1.5, 2.0])
def test_dynamic_weights_are_the_linear_map(b):
    """Gains, masks and attention are those of the image; everything else is linear."""
    tower = original()
    made, slow = bcosify(tower, b=b), SlowTower(tower, b)
    target = torch.tensor([2, 0])
    summary = linear_summary(BcosifiedSimilarity(made, texts()), images(), target)
    with torch.no_grad():
        embedding = slow.run(summary.encoded)
        for seed in range(3):
            other = images(seed=10 + seed).repeat(1, 2, 1, 1)
            other[:, 3:] += images(seed=20 + seed)
            mapped = (slow.again(other) * texts()[target]).sum(dim=1) / embedding.norm(dim=1)
            found = (summary.weights * other).flatten(1).sum(dim=1)
            torch.testing.assert_close(found, mapped, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("b", [1.0, 2.0])
@pytest.mark.parametrize("training", [False, True])
def test_completeness(b, training):
    """x * W(x) of e . t sums to the cosine times the length of the embedding."""
    made = bcosify(original(), b=b).train(training)
    encoded = made.encode(images()).requires_grad_()
    text = texts()[1]
    with explanation_mode(made):
        embedding = made.embed(encoded)
        (weights,) = torch.autograd.grad((embedding @ text).sum(), encoded)
    cosine = torch.nn.functional.cosine_similarity(embedding, text[None])
    contributions = (encoded * weights).flatten(1).sum(dim=1)
    expected = cosine * embedding.norm(dim=1)
    torch.testing.assert_close(contributions, expected, rtol=1e-10, atol=0)
    # The plain gradient of a B-cos network is no linear map.
    (plain,) = torch.autograd.grad((made.embed(encoded) @ text).sum(), encoded)
    assert (b == 1 and not training) or not torch.allclose(plain, weights, rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("reading", "power"), [("pooled", 1.0), ("attn_unpool", 1.0), ("attn_unpool", 3.0)]
)
@pytest.mark.parametrize("b", [1.0, 2.0])
def test_contributions_sum_to_the_similarity(b, reading, power):
    tower = original()
    similarity = BcosifiedSimilarity(
        bcosify(tower, b=b), texts(), reading=reading, cosine_power=power
    )
    target = torch.tensor([3, 1])
    summary = linear_summary(similarity, images(), target)
    with torch.no_grad():
        scores = similarity(images())
    torch.testing.assert_close(summary.score, scores[[0, 1], target], rtol=1e-12, atol=0)
    sums = summary.contributions().flatten(1).sum(dim=1)
    torch.testing.assert_close(sums, summary.score, rtol=1e-9, atol=0)
    # The similarities, from embeddings that loops made.
    with torch.no_grad():
        slow = SlowTower(tower, b)
        encoded = similarity.tower.encode(images())
        found = slow.run(encoded)[:, None] if reading == "pooled" else slow.places(encoded)
    for i in range(2):
        for k in range(4):
            total = 0.0
            for e in found[i].numpy():
                cosine = float(e @ texts()[k].numpy()) / math.sqrt(float(e @ e))
                total += math.copysign(abs(cosine) ** power, cosine)
            assert scores[i, k].item() == pytest.approx(total / len(found[i]), rel=1e-7)


def test_channels_of_pixels():
    made = bcosify(original(), normalization=Normalization((0.5, 0.4, 0.3), (0.3, 0.2, 0.1)))
    similarity = BcosifiedSimilarity(made, texts())
    summary = linear_summary(similarity, images(), torch.tensor([0, 1]))
    found = summary.pixel_contributions(made.normalization)
    mean, std = [0.5, 0.4, 0.3], [0.3, 0.2, 0.1]
    expected = torch.zeros_like(found)
    for c in range(3):
        pixel = images()[:, c] * std[c] + mean[c]
        # The gradient with respect to a pixel is that of its normalised value over the deviation.
        expected += pixel * summary.weights[:, c] / std[c]
        expected += (1 - pixel) * summary.weights[:, c + 3] / std[c]
    torch.testing.assert_close(found, expected)


def test_explanation_mode_leaves_nothing_behind():
    made = bcosify(original())
    before = traces(made)
    plain = made(images())
    with explanation_mode(made):
        assert torch.equal(made(images()), plain)
        with explanation_mode(made.body.layer1):
            pass
        assert all(layer.detached for layer in made.body.layer1.modules() if hasattr(layer, "b"))
    check_untouched(before, made)
    with pytest.raises(RuntimeError, match="inside"), explanation_mode(made):
        raise RuntimeError("inside")
    linear_summary(BcosifiedSimilarity(made, texts()), images(), torch.tensor([0, 0]))
    check_untouched(before, made)


# --- what a user can get wrong --------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit-token", "timm-convnext-linear", "timm-eva-token", "coca"])
def test_other_towers_are_refused(kind):
    with pytest.raises(UnsupportedBackboneError, match=r"is defined for it alone"):
        bcosify(build(kind))


def test_wrong_models_and_options():
    tower = build("resnet")
    with pytest.raises(BackboneTypeError, match="not B-cosified yet"):
        bcosify(bcosify(tower))
    with pytest.raises(BackboneTypeError, match=r"Pass model\.visual"):
        bcosify(clip_model("resnet"))
    with pytest.raises(ArgumentError, match="factor is 'sine'"):
        bcosify(tower, factor="sine")
    with pytest.raises(ArgumentError, match="b is 0"):
        bcosify(tower, b=0.0)
    with pytest.raises(ArgumentError, match="expected 3, one a channel"):
        bcosify(tower, normalization=Normalization((0.5,), (0.5,)))
    tower.layer2[0].act1 = nn.GELU()
    with pytest.raises(UnsupportedBackboneError, match=r"layer2\.0\.act1' is GELU"):
        bcosify(tower)
    tower = build("resnet")
    tower.layer1[0].conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=2)
    with pytest.raises(UnsupportedBackboneError, match="2 groups"):
        bcosify(tower)
    tower = build("resnet")
    tower.avgpool = nn.MaxPool2d(2, dilation=2)
    with pytest.raises(UnsupportedBackboneError, match="dilation 2"):
        bcosify(tower)
    tower = build("resnet")
    tower.bn2 = nn.BatchNorm2d(4, track_running_stats=False)
    with pytest.raises(UnsupportedBackboneError, match="bn2' is BatchNorm2d"):
        bcosify(tower)
    assert isinstance(bcosify(build("resnet")), BcosifiedTower)
