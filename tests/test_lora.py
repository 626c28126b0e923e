"""Adapters of peft: on a wrapped model, and on a model before it is wrapped."""

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("peft")

import peft

from shapwrap import ShapleyCLIP, ShapleyWrapper, Trainer, TrainerConfig, sample_coalitions
from shapwrap.errors import (
    ArgumentError,
    BackboneTypeError,
    TrainingError,
    UnsupportedBackboneError,
)
from shapwrap.training.lora import add_lora, merge_lora
from shapwrap.training.token_layers import token_layers
from tests.backbones import CLASS_TOKEN_KINDS, NUM_CLASSES, build, make_case

KINDS = ["vit-class-token", "vit-average", "torchvision-vit", "convnext", "hiera-average"]
KINDS += ["eva-average-map", "whole-class-token"]

ATTENTION = {
    "vit-class-token": ["blocks.{}.attn.qkv", "blocks.{}.attn.proj"],
    "vit-average": ["blocks.{}.attn.qkv", "blocks.{}.attn.proj"],
    "beit-average": ["blocks.{}.attn.proj"],
    "torchvision-vit": ["encoder.layers.encoder_layer_{}.self_attention"],
    "tnt-average": [
        f"blocks.{{}}.attn_{side}.{part}" for side in ("in", "out") for part in ("qk", "v", "proj")
    ],
    "convnext": [],
}
MLP = {
    "vit-class-token": ["blocks.{}.mlp.fc1", "blocks.{}.mlp.fc2"],
    "vit-average": ["blocks.{}.mlp.fc1", "blocks.{}.mlp.fc2"],
    "beit-average": ["blocks.{}.mlp.fc1", "blocks.{}.mlp.fc2"],
    "torchvision-vit": [f"encoder.layers.encoder_layer_{{}}.mlp.{i}" for i in (0, 3)],
    "tnt-average": [f"blocks.{{}}.mlp{side}.fc{i}" for side in ("_in", "") for i in (1, 2)],
    "convnext": [f"stages.{stage}.blocks.0.mlp.fc{i}" for stage in range(4) for i in (1, 2)],
}


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def _randomise(wrapped):
    """As after training: the second factors are no longer zero."""
    generator = torch.Generator().manual_seed(4)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=generator)


def _config(**settings):
    return TrainerConfig(
        **{"epochs": 1, "progress": False, "log_every": 1, "learning_rate": 1e-2, **settings}
    )


def _outline(model):
    return {
        "kinds": {name: type(module) for name, module in model.named_modules()},
        "weights": sorted((name, tuple(t.shape)) for name, t in model.state_dict().items()),
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": sum(
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
            for m in model.modules()
        ),
        "attributes": sorted(vars(model)),
    }


@pytest.mark.parametrize("kind", ATTENTION)
def test_the_layers_of_attention_and_mlps(kind):
    wrapped = make_case(kind).wrapped
    before = _outline(wrapped)
    layers = token_layers(wrapped)
    assert _outline(wrapped) == before
    depth = 3 if kind == "beit" else 2
    for found, expected in ((layers.attention, ATTENTION[kind]), (layers.mlp, MLP[kind])):
        names = {name.format(i) for name in expected for i in range(depth)}
        assert set(found) == {n for n in names if n in dict(wrapped.model.named_modules())}
        assert len(found) == len(set(found))
        assert (len(found) > 0) == (len(expected) > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_from_zero_through_training_to_a_plain_model(kind):
    case = make_case(kind, batch=4)
    wrapped, images = case.wrapped.train(), case.images
    outline = _outline(wrapped.model)
    state = torch.get_rng_state()
    wrapped.eval()
    with torch.no_grad():
        logits = wrapped(images)
    wrapped.train()
    names = add_lora(wrapped, rank=2)
    assert torch.equal(state, torch.get_rng_state())
    wrapped.eval()
    with torch.no_grad():
        # torch runs a fused kernel for a multi-head attention without adapters.
        torch.testing.assert_close(wrapped(images), logits, atol=2e-7, rtol=1e-6)
    learning = {n for n, p in wrapped.named_parameters() if p.requires_grad}
    own = {id(p) for p in wrapped.head_parameters()}
    head = {n for n, p in wrapped.named_parameters() if id(p) in own}
    assert head < learning
    assert all("lora_" in name for name in learning - head)

    before = {n: t.clone() for n, t in wrapped.state_dict().items()}
    wrapped.train()
    Trainer(wrapped, [(images, torch.arange(4))] * 4, config=_config()).fit()
    wrapped.eval()
    for name, tensor in wrapped.state_dict().items():
        if name in learning:
            assert not torch.equal(tensor, before[name]), name
        elif kind == "torchvision-vit" and ("in_proj_w" in name or "out_proj" in name):
            # peft adds to these weights and subtracts again in each pass.
            torch.testing.assert_close(tensor, before[name], atol=1e-6, rtol=1e-6)
        else:
            assert torch.equal(tensor, before[name]), name

    _randomise(wrapped)
    coalitions = sample_coalitions(4, wrapped.num_patches, 4)
    with torch.no_grad():
        trained = wrapped(images)
        assert float((trained - logits).abs().max()) > 1e-3
        values = wrapped.attribute(images)
        torch.testing.assert_close(values.sum(1), trained, atol=1e-6, rtol=1e-5)
        pairs = wrapped(images, coalitions, paired=True)
        singles = wrapped(images, coalitions, paired=False)
        torch.testing.assert_close(pairs.values, singles.values, atol=1e-6, rtol=1e-5)
        sums = torch.einsum("bsn,bnk->bsk", coalitions.float(), values)
        torch.testing.assert_close(pairs.estimates, sums, atol=1e-6, rtol=1e-5)
        shown = coalitions[:, :1]
        changed = _repainted(images, shown[:, 0], wrapped)
        # Whatever an absent patch holds, a coalition is worth the same.
        same = (wrapped.value(images, shown) - wrapped.value(changed, shown)).abs().max()
        assert float(same) == 0
    assert sorted(merge_lora(wrapped)) == sorted(names)
    with torch.no_grad():
        torch.testing.assert_close(wrapped(images), trained, atol=2e-6, rtol=1e-5)
    wrapped.train()
    model = wrapped.unwrap()
    assert _outline(model) == outline
    assert all(p.requires_grad for p in model.parameters())


def _repainted(images, present, wrapped):
    """The same images with other pixels in absent patches."""
    rows, columns = wrapped.grid
    height, width = images.shape[-2] // rows, images.shape[-1] // columns
    mask = present.view(-1, 1, rows, columns)
    mask = mask.repeat_interleave(height, 2).repeat_interleave(width, 3)
    return torch.where(mask, images, torch.randn_like(images) * 5)


class Killed(Exception):
    """Stands for a process that dies."""


class Dying(Trainer):
    """Dies after the third step."""

    def _after_step(self, position, window, bar):
        super()._after_step(position, window, bar)
        if position.step == 3:
            raise Killed


def test_resuming_is_exact(tmp_path):
    def trainer(folder, kind=Trainer):
        torch.manual_seed(0)
        case = make_case("vit-class-token", batch=8)
        add_lora(case.wrapped, rank=2, dropout=0.2, targets="attention")
        dataset = TensorDataset(case.images, torch.arange(8) % NUM_CLASSES)
        data = DataLoader(dataset, batch_size=2, shuffle=True)
        config = _config(output_dir=folder, checkpoint_every=2, ema_decay=0.9, layer_decay=0.5)
        return kind(case.wrapped, data, data, config=config)

    whole = trainer(tmp_path / "whole")
    expected = whole.fit()
    with pytest.raises(Killed):
        trainer(tmp_path / "parts", Dying).fit()
    parts = trainer(tmp_path / "parts")
    assert parts.fit(resume=True) == expected
    for name, tensor in whole.wrapped.state_dict().items():
        assert torch.equal(tensor, parts.wrapped.state_dict()[name]), name


@pytest.mark.parametrize("how", [peft.inject_adapter_in_model, None])
@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("vit-average", ["qkv", "fc1", "fc2"]),
        ("torchvision-vit", ["self_attention"]),
        ("resnet", ["conv2"]),
    ],
)
def test_a_model_with_adapters_can_be_wrapped(kind, targets, how):
    plain = make_case(kind)
    model, size = build(kind, plain.wrapped.grid)
    model.load_state_dict(plain.wrapped.model.state_dict())
    model.eval()
    config = peft.LoraConfig(r=2, target_modules=targets)
    model = how(config, model) if how else peft.get_peft_model(model, config)
    as_the_case = {"prefix_tokens": "drop"} if kind in CLASS_TOKEN_KINDS else {}
    wrapped, images = ShapleyWrapper(model, image_size=size, **as_the_case).eval(), plain.images
    plain.wrapped.eval()
    assert wrapped.grid == plain.wrapped.grid
    assert wrapped._wrapping.masking == plain.wrapped._wrapping.masking
    coalitions = sample_coalitions(2, wrapped.num_patches, 4)
    with torch.no_grad():
        expected, found = plain.wrapped(images, coalitions), wrapped(images, coalitions)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
        _randomise(wrapped)
        moved, values = wrapped(images), wrapped.attribute(images)
        assert not torch.equal(moved, found.logits)
        torch.testing.assert_close(values.sum(1), moved, atol=1e-5, rtol=1e-5)
    learning = {n for n, p in wrapped.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in learning)
    wrapped.train()
    wrapped(images, coalitions).values.square().mean().backward()
    assert all(p.grad is not None for p in wrapped.parameters() if p.requires_grad)
    wrapped.eval()
    with torch.no_grad():
        # Batch statistics have moved.
        moved = wrapped(images)
    if how:
        merge_lora(wrapped)
        with torch.no_grad():
            torch.testing.assert_close(wrapped(images), moved, atol=1e-5, rtol=1e-4)
    else:
        with pytest.raises(ArgumentError, match="merge_and_unload"):
            merge_lora(wrapped)
        model = wrapped.unwrap().merge_and_unload()
        merged = ShapleyWrapper(model, image_size=size, **as_the_case).eval()
        with torch.no_grad():
            torch.testing.assert_close(merged(images), moved, atol=1e-5, rtol=1e-4)


def test_the_image_tower_of_an_image_text_model():
    pytest.importorskip("open_clip")
    from tests.clip_models import clip_model, images_of, tokens

    clip = ShapleyCLIP(clip_model()).eval()
    images, texts = images_of(clip), tokens()
    outside = {n for n, p in clip.named_parameters() if "visual" not in n and p.requires_grad}
    with torch.no_grad():
        before = clip(images, texts)[0]
        names = add_lora(clip, rank=2)
        torch.testing.assert_close(clip(images, texts)[0], before, atol=1e-6, rtol=1e-5)
        _randomise(clip)
        moved = clip(images, texts)[0]
        assert not torch.allclose(moved, before, atol=1e-4)
    learning = {n for n, p in clip.named_parameters() if p.requires_grad}
    assert outside < learning
    assert all("lora_" in name for name in learning - outside)
    assert sorted(merge_lora(clip)) == sorted(names)
    with torch.no_grad():
        torch.testing.assert_close(clip(images, texts)[0], moved, atol=1e-5, rtol=1e-4)


def test_draws_depend_on_the_generator_alone():
    def factors(seed):
        torch.manual_seed(0)
        case = make_case("vit-average")
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        torch.manual_seed(torch.seed() % 1000)
        add_lora(case.wrapped, rank=2, targets="mlp", generator=generator)
        named = case.wrapped.named_parameters()
        return torch.cat([p.detach().flatten() for n, p in named if "lora_A" in n])

    assert torch.equal(factors(None), factors(0))
    assert not torch.equal(factors(1), factors(0))


def test_adapters_that_would_be_without_effect_are_taken_back():
    """A model that holds a layer twice, once where adapters do not replace it."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build("vit-average", (3, 4))[0]
            self.held = [self.inner.blocks[0].mlp.fc1]
            self.inner.blocks[0].mlp.forward = self.run_mlp
            self.forward_features = self.inner.forward_features
            self.forward_head = self.inner.forward_head

        def run_mlp(self, tokens):
            mlp = self.inner.blocks[0].mlp
            return mlp.fc2(mlp.act(self.held[0](tokens)))

        def forward(self, images):
            return self.inner(images)

    model = Twice()
    wrapped = ShapleyWrapper(model.inner, image_size=(12, 16))
    outline = _outline(model.inner)
    flags = {n: p.requires_grad for n, p in wrapped.named_parameters()}
    with pytest.raises(UnsupportedBackboneError, match=r"blocks\.0\.mlp\.fc1 would be without"):
        add_lora(wrapped)
    assert _outline(model.inner) == outline
    assert {n: p.requires_grad for n, p in wrapped.named_parameters()} == flags


def test_refusals():
    wrapped = make_case("vit-average").wrapped
    for options, words in (
        ({"rank": 0}, "rank is 0"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"targets": "convolutions"}, "targets is 'convolutions'"),
    ):
        with pytest.raises(ArgumentError, match=words):
            add_lora(wrapped, **options)
    with pytest.raises(ArgumentError, match="no adapters"):
        merge_lora(wrapped)
    with pytest.raises(BackboneTypeError, match="expected ShapleyWrapper"):
        add_lora(nn.Linear(2, 2))
    with pytest.raises(UnsupportedBackboneError, match="0 of attention, 0 of MLPs"):
        add_lora(make_case("resnet").wrapped)
    add_lora(wrapped)
    with pytest.raises(ArgumentError, match="has adapters already"):
        add_lora(wrapped)
    with torch.no_grad():
        next(p for n, p in wrapped.named_parameters() if "lora_B" in n).fill_(torch.nan)
    with pytest.raises(TrainingError, match="cannot be merged"):
        merge_lora(wrapped)
