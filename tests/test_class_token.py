"""The readout `class-token`: the pretrained head kept, its gain over nobody shared out."""

import copy
import pickle

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from shapwrap import ShapleyWrapper, TrainerConfig, sample_coalitions, shapley_loss
from shapwrap.errors import ReadoutError
from shapwrap.metrics import shapley_error, shapley_truth
from shapwrap.training.objective import Objective
from tests.backbones import build

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def make(kind: str = "registers", *, trained: bool = True, **options: object) -> ShapleyWrapper:
    builders = {
        "registers": lambda: VisionTransformer(
            img_size=(48, 32), patch_size=8, num_classes=5, reg_tokens=2, **SMALL
        ),
        "normed": lambda: VisionTransformer(
            img_size=(48, 32), patch_size=8, num_classes=5, fc_norm=True, drop_rate=0.3, **SMALL
        ),
        "rotary": lambda: timm.create_model(
            "eva02_tiny_patch14_224",
            img_size=(42, 28),
            num_classes=5,
            global_pool="token",
            **SMALL,
        ),
        "relative": lambda: timm.create_model(
            "beit_base_patch16_224",
            img_size=(48, 32),
            num_classes=5,
            global_pool="token",
            **SMALL,
        ),
    }
    model = builders[kind]() if kind in builders else build(kind, (3, 3))[0]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.2 if parameter.ndim < 2 else 0.05))
        wrapped = ShapleyWrapper(model.eval(), **options)
        assert wrapped.report().readout == "class-token"
        if trained:
            noise = torch.randn(wrapped.patch_layer.weight.shape, generator=generator)
            wrapped.patch_layer.weight.add_(noise)
    return wrapped


def images_for(wrapped: ShapleyWrapper, batch: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *wrapped.image_size, generator=generator)


def logits_of_gathered(model: VisionTransformer, image: torch.Tensor, kept: torch.Tensor):
    """Logits of one image whose other patch tokens are really taken away."""
    tokens = model._pos_embed(model.patch_embed(image[None]))
    prefix = model.num_prefix_tokens
    tokens = torch.cat((tokens[:, :prefix], tokens[:, prefix:][:, kept]), dim=1)
    for block in model.blocks:
        tokens = block(tokens)
    return model.forward_head(model.norm(tokens))[0]


KINDS = ["registers", "normed", "rotary", "relative", "relpos-class-token", "naflex-class-token"]
KINDS += ["convit-class-token", "torchvision-vit"]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_are_those_of_the_model_and_values_add_up(kind):
    wrapped = make(kind)
    images = images_for(wrapped)
    logits = wrapped(images)
    torch.testing.assert_close(logits, wrapped.model(images), atol=1e-5, rtol=1e-5)
    assert wrapped.report().exact and wrapped.report().readout == "class-token"
    assert "dropped" not in wrapped.report().note
    assert "sum to them minus the baseline" in wrapped.report().note
    values = wrapped.attribute(images)
    torch.testing.assert_close(values.sum(1), logits - wrapped.baseline, atol=1e-5, rtol=1e-5)
    for contrast in (False, True):
        explanation = wrapped.explain(images, target=2, contrast=contrast)
        assert explanation.efficiency_gap().max() < 1e-5
        expected = values[..., 2] - (values.mean(dim=2) if contrast else 0)
        torch.testing.assert_close(explanation.values, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(explanation.baseline, wrapped.baseline)


@pytest.mark.parametrize("kind", ["registers", "normed"])
@torch.no_grad()
def test_values_of_coalitions_are_those_of_gathered_tokens(kind):
    """v(s) = f(x_s) - f(x_0), with the tokens of absent patches taken away by hand."""
    wrapped = make(kind)
    images = images_for(wrapped)
    coalitions = sample_coalitions(
        3, wrapped.num_patches, 4, generator=torch.Generator().manual_seed(0)
    )
    nobody = torch.zeros(wrapped.num_patches, dtype=torch.bool)
    empty = logits_of_gathered(wrapped.model, images[0], nobody)
    torch.testing.assert_close(wrapped.baseline, empty, atol=1e-5, rtol=1e-5)
    expected = torch.stack(
        [
            torch.stack([logits_of_gathered(wrapped.model, image, kept) for kept in rows])
            for image, rows in zip(images, coalitions, strict=True)
        ]
    )
    values = wrapped.value(images, coalitions)
    torch.testing.assert_close(values, expected - empty, atol=1e-5, rtol=1e-5)
    output = wrapped(images, coalitions)
    torch.testing.assert_close(output.values, values, atol=1e-5, rtol=1e-5)
    summed = torch.einsum("bsn,bnk->bsk", coalitions.float(), wrapped.attribute(images))
    torch.testing.assert_close(output.estimates, summed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_pairs_equal_single_passes_and_the_ends_are_exact(kind):
    wrapped = make(kind)
    images = images_for(wrapped)
    coalitions = torch.rand(3, 1, wrapped.num_patches) < 0.5
    pair = torch.cat((coalitions, ~coalitions), dim=1)
    alone = torch.cat([wrapped.value(images, s) for s in pair.split(1, dim=1)], dim=1)
    torch.testing.assert_close(wrapped.value(images, pair), alone, atol=1e-5, rtol=1e-5)
    ends = torch.stack((torch.zeros_like(pair[:, 0]), torch.ones_like(pair[:, 0])), dim=1)
    for values in (wrapped.value(images, ends), wrapped(images, ends).values):
        assert values[:, 0].abs().max() == 0
        gain = wrapped(images) - wrapped.baseline
        torch.testing.assert_close(values[:, 1], gain, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_absent_pixels_do_not_reach_the_value(kind):
    wrapped = make(kind)
    images = images_for(wrapped, batch=1)
    rows, columns = wrapped.grid
    cell = (images.shape[2] // rows, images.shape[3] // columns)
    present = torch.rand(1, 2, wrapped.num_patches) < 0.5
    present[:, 1] = ~present[:, 0]
    pixels = present[:, 0].view(1, 1, rows, columns)
    pixels = pixels.repeat_interleave(cell[0], 2).repeat_interleave(cell[1], 3)
    changed = torch.where(pixels, images, torch.randn_like(images) * 9)
    before, after = (wrapped(x, present).values for x in (images, changed))
    torch.testing.assert_close(before[:, 0], after[:, 0], atol=0, rtol=0)
    assert (before[:, 1] - after[:, 1]).abs().max() > 1e-3


def test_shares_start_equal_and_everything_is_learnt():
    wrapped = make(trained=False).train()
    images = images_for(wrapped)
    values = wrapped.attribute(images)
    torch.testing.assert_close(values, values.mean(1, keepdim=True).expand_as(values))
    coalitions = sample_coalitions(3, wrapped.num_patches, 2)
    shapley_loss(wrapped(images, coalitions)).backward()
    unmoved = [n for n, p in wrapped.named_parameters() if p.requires_grad and p.grad is None]
    assert unmoved == []
    assert any(p is wrapped.patch_layer.weight for p in wrapped.head_parameters())


def test_dropout_is_shared_by_logits_values_and_baseline():
    """With one draw, v(everybody) - s . phi stays 0 in train mode."""
    wrapped = make("normed").train()
    images = images_for(wrapped)
    ends = torch.zeros(3, 2, wrapped.num_patches, dtype=torch.bool)
    ends[:, 1] = True
    torch.manual_seed(0)
    output = wrapped(images, ends)
    torch.testing.assert_close(output.values, output.estimates, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert (output.logits - wrapped.eval()(images)).abs().max() > 1e-2


@torch.no_grad()
def test_an_even_spread_has_no_skill():
    wrapped = make(trained=False)
    assert wrapped.audit(images_for(wrapped)).skill.abs().max() < 1e-4


def test_masked_cross_entropy_reads_logits():
    """The task loss of a masked image is that of f(x_s), not of f(x_s) - f(nobody)."""
    wrapped = make()
    images, labels = images_for(wrapped), torch.tensor([0, 1, 2])
    coalitions = sample_coalitions(3, wrapped.num_patches, 4)
    output = wrapped(images, coalitions)
    objective = Objective(TrainerConfig(), has_baseline=wrapped.has_baseline)
    logits = (output.values + wrapped.baseline).flatten(0, 1)
    expected = nn.functional.cross_entropy(logits, labels.repeat_interleave(4))
    torch.testing.assert_close(objective(output, labels, 1.0).masked_task, expected)


@torch.no_grad()
def test_the_baseline_follows_the_weights():
    """It is kept between explanations; whatever way the weights change, it must be made anew."""
    wrapped = make()
    changes = {
        "in place": lambda p: p.mul_(1.5),
        "through .data": lambda p: p.data.mul_(1.5),
        "replaced": lambda p: setattr(p, "data", p.data * 1.5),
    }
    for name, change in changes.items():
        before = wrapped.baseline
        torch.testing.assert_close(before, wrapped.baseline, atol=0, rtol=0)
        for parameter in wrapped.model.parameters():
            change(parameter)
        nobody = torch.zeros(wrapped.num_patches, dtype=torch.bool)
        images = images_for(wrapped)
        expected = logits_of_gathered(wrapped.model, images[0], nobody)
        torch.testing.assert_close(wrapped.baseline, expected, atol=1e-4, rtol=1e-4, msg=name)
        assert (before - expected).abs().max() > 1e-2


@torch.no_grad()
def test_the_baseline_follows_a_new_head_and_its_statistics():
    hidden = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    wrapped = make(trained=False, head=hidden)
    alone = wrapped.model._pos_embed(wrapped.model.patch_embed(images_for(wrapped, 1)))
    alone = alone[:, : wrapped.model.num_prefix_tokens]
    for block in wrapped.model.blocks:
        alone = block(alone)
    token = wrapped.model.norm(alone)[:, 0]
    changes = {
        "a hidden layer": lambda: hidden[0].weight.mul_(2),
        "a hidden layer through .data": lambda: hidden[0].weight.data.mul_(2),
        "statistics": lambda: hidden[1].running_mean.add_(1),
    }
    for name, change in changes.items():
        before = wrapped.baseline
        change()
        torch.testing.assert_close(
            wrapped.baseline, hidden.eval()(token)[0], atol=1e-4, rtol=1e-4, msg=name
        )
        assert (before - wrapped.baseline).abs().max() > 1e-3


@torch.no_grad()
def test_the_predicted_class_is_that_of_the_logits():
    """Of a coalition game, too, whose values leave the baseline out."""
    wrapped = make()
    images = images_for(wrapped)
    # The logits of nobody alone decide.
    wrapped.model.head.bias.copy_(torch.tensor([0.0, 0.0, 50.0, 0.0, 0.0]))
    assert (wrapped(images) - wrapped.baseline).argmax(1).ne(2).all()
    game = wrapped.game(images[0], players=(2, 2))
    assert game.target == 2
    assert game.grand_value == pytest.approx(
        float(wrapped(images)[0, 2] - wrapped.baseline[2]), abs=1e-4
    )
    truth = shapley_truth(wrapped, images, players=(2, 2))
    torch.testing.assert_close(truth.estimate.grand.float(), wrapped(images), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        truth.total.float(), wrapped(images) - wrapped.baseline, atol=1e-4, rtol=1e-4
    )
    values = truth.values.float()
    assert shapley_error(values, truth).target_class.tolist() == [2, 2, 2]


@torch.no_grad()
def test_copies_and_other_precisions():
    wrapped = make()
    images = images_for(wrapped)
    expected = wrapped.attribute(images)
    for again in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        torch.testing.assert_close(again.attribute(images), expected)
        again.model.cls_token.mul_(-1.0)
        assert (again.baseline - wrapped.baseline).abs().max() > 1e-3
    exact = copy.deepcopy(wrapped).double()
    torch.testing.assert_close(
        exact.attribute(images.double()).float(), expected, atol=1e-4, rtol=1e-4
    )
    half = copy.deepcopy(wrapped).bfloat16()
    explanation = half.explain(images.bfloat16())
    assert explanation.values.dtype == torch.float32
    assert explanation.efficiency_gap().max() < 1e-5


def test_a_new_head_reads_the_class_token():
    wrapped = make(num_classes=3)
    nn.init.normal_(wrapped.new_head.weight)
    images = images_for(wrapped)
    with torch.no_grad():
        hidden = wrapped.model.forward_head(wrapped.model.forward_features(images), pre_logits=True)
        torch.testing.assert_close(wrapped(images), wrapped.new_head(hidden), atol=1e-5, rtol=1e-5)
        gain = wrapped(images) - wrapped.baseline
        torch.testing.assert_close(wrapped.attribute(images).sum(1), gain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_tiny_patch16_224", {"masking": "zero-mask"}, "expected token removal"),
        ("vit_tiny_patch16_224", {"prefix_tokens": "drop"}, "expected token removal"),
        ("vit_base_patch16_rope_reg1_gap_256", {}, "reads its patches"),
        ("resnet18", {}, "class-token"),
    ],
)
def test_it_is_refused_where_it_does_not_fit(name, options, message):
    small = {} if name == "resnet18" else SMALL
    model = timm.create_model(name, num_classes=2, **small)
    with pytest.raises(ReadoutError, match=message):
        ShapleyWrapper(model, readout="class-token", **options)
