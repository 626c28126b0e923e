"""Image-text models: similarities are sums over patches, and open_clip's code runs unchanged."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.nn import functional

import shapwrap
from shapwrap import ShapleyCLIP, ShapleyWrapper, shapley_loss
from shapwrap.clip import ContrastiveOutput
from shapwrap.errors import (
    ArgumentError,
    BackboneTypeError,
    CoalitionError,
    ImageError,
    UnsupportedBackboneError,
)

open_clip = pytest.importorskip("open_clip")

from tests.clip_models import (  # noqa: E402
    clip_model,
    coalitions_of,
    images_of,
    known_to_open_clip,
    tokenizer,
    tokens,
)
from tests.test_open_clip import EXPECTED  # noqa: E402
from tests.towers import TOWERS  # noqa: E402

WHOLE = [kind for kind in EXPECTED if "kept whole" in EXPECTED[kind][0]]
KINDS = [kind for kind in TOWERS if kind not in WHOLE]
every_kind = pytest.mark.parametrize("kind", KINDS)


def patch_embeddings(wrapped, images):
    """Unit embeddings from the adapter's features, patch by patch: slow and obvious."""
    backbone = wrapped.tower._wrapping.backbone
    rows = []
    for features in backbone.features(images).features:
        rows.append(torch.cat([backbone.pre_logits(patch[None]) for patch in features]))
    embeddings = torch.stack(rows)
    return embeddings / embeddings.norm(dim=-1, keepdim=True)


@every_kind
@torch.no_grad()
def test_efficiency(kind):
    wrapped = ShapleyWrapper(clip_model(kind))
    assert isinstance(wrapped, ShapleyCLIP)
    images, texts = images_of(wrapped), tokens()
    values = wrapped.attribute(images, texts)
    features = wrapped.encode_image(images)
    expected = features @ wrapped.encode_text(texts, normalize=True).T
    assert values.shape == (2, wrapped.num_patches, 3)
    torch.testing.assert_close(values.sum(dim=1), expected, atol=1e-6, rtol=1e-5)
    slow = patch_embeddings(wrapped, images)
    torch.testing.assert_close(features, slow.mean(dim=1), atol=1e-6, rtol=1e-5)
    assert (features.norm(dim=-1) <= 1 + 1e-6).all()


@every_kind
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6))
@torch.no_grad()
def test_absent_patches_are_not_seen(kind, seed):
    wrapped = CACHE.setdefault(kind, None) or ShapleyWrapper(clip_model(kind))
    CACHE[kind] = wrapped
    images, texts = images_of(wrapped, seed=seed), tokens(seed=seed)
    coalitions = coalitions_of(wrapped, num=4, seed=seed)
    coalitions[:, 0], coalitions[:, 1] = False, True
    values = wrapped.value(images, texts, coalitions)
    assert torch.equal(values[:, 0], torch.zeros_like(values[:, 0]))
    whole = wrapped.attribute(images, texts).sum(dim=1)
    torch.testing.assert_close(values[:, 1], whole, atol=1e-5, rtol=1e-5)
    single = coalitions[:, 2:3]
    hidden = ~single[:, 0].unflatten(1, wrapped.grid)
    sides = [size // cells for size, cells in zip(wrapped.image_size, wrapped.grid, strict=True)]
    hidden = hidden.repeat_interleave(sides[0], 1).repeat_interleave(sides[1], 2)[:, None]
    changed = torch.where(hidden, images * -3 + 1, images)
    alone = wrapped.value(images, texts, single)
    assert torch.equal(wrapped.value(changed, texts, single), alone)
    torch.testing.assert_close(alone, values[:, 2:3], atol=1e-5, rtol=1e-5)


CACHE = {}


@every_kind
def test_a_training_step(kind):
    wrapped = ShapleyWrapper(clip_model(kind)).train()
    images, texts = images_of(wrapped, num=3), tokens()
    output = wrapped(images, texts, coalitions_of(wrapped, num_images=3))
    assert isinstance(output, ContrastiveOutput)
    game = output.for_texts()
    expected = output.image_features @ output.text_features.T
    torch.testing.assert_close(game.logits, expected, atol=1e-6, rtol=1e-5)
    loss = open_clip.ClipLoss()(output.image_features, output.text_features, output.logit_scale)
    (loss + shapley_loss(game)).backward()
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            # The gain of a norm whose output is brought to unit length has a gradient, too.
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    first = next(m for m in wrapped.model.visual.modules() if isinstance(m, nn.Conv2d))
    assert first.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_estimates_are_sums_of_patch_values():
    wrapped = ShapleyWrapper(clip_model())
    images, texts, coalitions = images_of(wrapped), tokens(), coalitions_of(wrapped)
    game = wrapped(images, texts, coalitions).for_texts()
    values = wrapped.attribute(images, texts)
    expected = torch.einsum("bsn,bnt->bst", coalitions.float(), values)
    torch.testing.assert_close(game.estimates, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(game.values, wrapped.value(images, texts, coalitions))


@torch.no_grad()
def test_explanations_of_pairs():
    wrapped = ShapleyCLIP(clip_model(), tokenizer=tokenizer)
    images, names = images_of(wrapped, num=3), ["a dog", "a cat", "grass"]
    values = wrapped.attribute(images, names)
    matching = wrapped.explain(images, names)
    for row in range(3):
        torch.testing.assert_close(matching.values[row], values[row, :, row])
    assert matching.target.tolist() == [0, 1, 2]
    assert matching.class_names == names
    assert matching.efficiency_gap().max() < 1e-6
    pairs = wrapped.explain(images, names, pairs="all")
    torch.testing.assert_close(pairs.values.unflatten(0, (3, 3)), values.mT)
    assert pairs.efficiency_gap().max() < 1e-6
    assert pairs.heatmap().shape == (9, *wrapped.image_size)
    one = wrapped.explain(images, "grass")
    torch.testing.assert_close(one.values, values[:, :, 2])
    contrast = wrapped.explain(images, names, contrast=True)
    torch.testing.assert_close(contrast.values[0], (values[0] - values[0].mean(1, True))[:, 0])
    assert contrast.efficiency_gap().max() < 1e-6
    ids = tokenizer(names)
    torch.testing.assert_close(wrapped.explain(images, ids).values, matching.values)
    features = wrapped.encode_text(ids) * 7
    torch.testing.assert_close(wrapped.explain(images, features).values, matching.values)


def test_texts_are_encoded_once_and_patches_too(monkeypatch):
    wrapped = ShapleyCLIP(clip_model(), tokenizer=tokenizer)
    calls = []
    wrapped.model.visual.conv1.register_forward_hook(lambda *_: calls.append("image"))
    wrapped.model.text.register_forward_hook(lambda *_: calls.append("text"))
    wrapped.explain(images_of(wrapped), ["a", "b", "c", "d"], pairs="all")
    assert calls == ["image", "text"]


@torch.no_grad()
def test_as_open_clip_models():
    for options in (
        {},
        {"bias": -10.0},
        {"output_dict": True},
        {"bias": -1.0, "output_dict": True},
    ):
        model = clip_model(**options)
        plain = model(images_of(ShapleyWrapper(clip_model())), tokens())
        wrapped = ShapleyWrapper(model)
        output = wrapped(images_of(wrapped), tokens())
        assert type(output) is type(plain) and len(output) == len(plain)
        if isinstance(output, dict):
            assert output.keys() == plain.keys()
            output, plain = tuple(output.values()), tuple(plain.values())
        for position in range(1, len(plain)):
            torch.testing.assert_close(output[position], plain[position])
        images, texts = wrapped(images_of(wrapped)), wrapped(text=tokens())
        assert (images[1] if isinstance(images, tuple) else images["text_features"]) is None
        assert (texts[0] if isinstance(texts, tuple) else texts["image_features"]) is None
    logits, transposed = wrapped.get_logits(images_of(wrapped), tokens())
    assert torch.equal(logits.T, transposed)
    torch.testing.assert_close(logits, output[2] * output[0] @ output[1].T + output[3])
    assert wrapped.logit_scale is model.logit_scale
    assert wrapped.visual is model.visual


def test_losses_of_open_clip():
    model = clip_model(bias=-10.0, output_dict=True)
    wrapped = ShapleyWrapper(model).train()
    output = wrapped(images_of(wrapped), tokens(2))
    found = open_clip.loss.SigLipLoss()(**output, output_dict=True)
    assert found["contrastive_loss"].isfinite()
    output.pop("logit_bias")
    assert open_clip.ClipLoss()(**output, output_dict=True)["contrastive_loss"].isfinite()


@torch.no_grad()
def test_zero_shot_code_of_open_clip():
    wrapped = ShapleyCLIP(clip_model(), tokenizer=tokenizer)
    weights = open_clip.build_zero_shot_classifier(
        wrapped, tokenizer, ["dog", "cat"], ["a {}".format, "the {}".format], device="cpu"
    )
    images = images_of(wrapped)
    similarity = wrapped(images)[0] @ weights
    classifier = wrapped.classifier(weights.T, ["dog", "cat"])
    assert isinstance(classifier, ShapleyWrapper)
    scale = wrapped.logit_scale.exp()
    torch.testing.assert_close(classifier(images), similarity * scale, atol=1e-4, rtol=1e-4)
    explanation = classifier.explain(images, 1)
    expected = wrapped.explain(images, weights.T[1:]).values * scale
    torch.testing.assert_close(explanation.values, expected, atol=1e-4, rtol=1e-4)
    assert explanation.class_names == ["dog", "cat"]
    with_bias = ShapleyCLIP(clip_model(bias=-3.0), tokenizer=tokenizer)
    logits = with_bias.get_logits(images, tokenizer(["dog"]))[0]
    torch.testing.assert_close(with_bias.classifier("dog")(images), logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_audit_and_game():
    wrapped = ShapleyCLIP(clip_model(), tokenizer=tokenizer)
    images = images_of(wrapped)
    audit = wrapped.audit(images, ["dog", "cat"], num_coalitions=8)
    assert audit.residual.shape == (2,) and audit.skill.isfinite().all()
    game = wrapped.game(images[0], "dog")
    masks = coalitions_of(wrapped)[0]
    expected = wrapped.value(images[:1], ["dog"], masks[None])[0, :, 0]
    torch.testing.assert_close(game(masks), expected)
    assert game(masks.numpy()).shape == (4,)
    blocks = wrapped.game(images[0], "dog", players=(1, 2))
    assert blocks.n_players == 2
    with pytest.raises(ArgumentError, match="one"):
        wrapped.game(images[0], ["dog", "cat"])


def test_nothing_is_left_behind():
    model = clip_model().train()
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()
    names = [name for name, _ in model.named_modules()]
    wrapped = ShapleyWrapper(model)
    assert wrapped.training and model.training and model.visual.training
    wrapped.explain(images_of(wrapped), tokens(2))
    wrapped.audit(images_of(wrapped), tokens(2), num_coalitions=2)
    wrapped.report()
    assert all(module.training for module in wrapped.modules())
    assert torch.equal(state, torch.random.get_rng_state())
    assert [name for name, _ in model.named_modules()] == names
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not any(module._forward_hooks for module in model.modules())
    assert list(wrapped.state_dict()) == [f"model.{name}" for name in model.state_dict()]
    wrapped.eval()
    assert not wrapped.tower.training and not model.visual.training
    assert wrapped.unwrap() is model
    for use in (wrapped.encode_image, lambda _: wrapped.classifier(tokens(2))):
        with pytest.raises(BackboneTypeError, match="unwrapped"):
            use(torch.zeros(1, 3, 12, 16))


def test_copies_and_pickles():
    wrapped = ShapleyCLIP(clip_model(), tokenizer=tokenizer)
    images = images_of(wrapped)
    expected = wrapped.attribute(images, ["dog"])
    for other in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert other.tower.model is other.model.visual
        torch.testing.assert_close(other.attribute(images, ["dog"]), expected)
        with torch.no_grad():
            next(other.model.visual.parameters()).add_(1.0)
        assert not torch.equal(other.attribute(images, ["dog"]), expected)
        torch.testing.assert_close(wrapped.attribute(images, ["dog"]), expected)


@torch.no_grad()
def test_half_precision_keeps_efficiency():
    wrapped = ShapleyWrapper(clip_model().to(torch.bfloat16))
    images, texts = images_of(wrapped).to(torch.bfloat16), tokens()
    values = wrapped.attribute(images, texts)
    assert values.dtype == torch.float32
    features = wrapped.text_features(texts)
    torch.testing.assert_close(values.sum(1), wrapped.encode_image(images) @ features.T)
    found = wrapped(images, texts[:2])
    assert open_clip.ClipLoss()(*found).isfinite()
    weights = open_clip.build_zero_shot_classifier(
        wrapped, tokenizer, ["dog"], ["a {}".format], device="cpu"
    )
    assert (found[0] @ weights).shape == (2, 1)
    single = ShapleyWrapper(clip_model())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = single(images.float(), texts, coalitions_of(single)).for_texts()
        assert output.values.dtype == output.estimates.dtype == torch.float32
        values = single.attribute(images.float(), texts)
    assert values.dtype == torch.float32


@torch.no_grad()
def test_the_report_measures_the_difference():
    wrapped = ShapleyWrapper(clip_model("vit-average"))
    report = wrapped.report()
    images = torch.randn(2, 3, *wrapped.image_size, generator=torch.Generator().manual_seed(0))
    original = functional.normalize(wrapped.model.visual(images), dim=-1)
    difference = wrapped.encode_image(images) - original
    assert report.similarity_difference == pytest.approx(float(difference.norm(dim=-1).max()))
    assert report.tower.readout == "cosine" and report.tower.masking == "token-removal"
    assert "unit length" in report.tower.note and "head" not in report.tower.note
    assert 0 < report.length <= 1
    assert "similarity" in str(report) and "12 x 16" in str(report)
    assert report.text_params == sum(p.numel() for p in wrapped.model.text.parameters()) + 1


def test_errors_say_what_to_do():
    model = clip_model()
    with pytest.raises(ArgumentError, match=r"model\.visual, head="):
        ShapleyWrapper(model, num_classes=3)
    with pytest.raises(ArgumentError, match="readout"):
        ShapleyWrapper(model, readout="affine")
    with pytest.raises(BackboneTypeError, match="encode_text"):
        ShapleyCLIP(nn.Linear(2, 2))
    wrapped = ShapleyWrapper(model)
    for again in (ShapleyWrapper, ShapleyCLIP):
        with pytest.raises(BackboneTypeError, match="already"):
            again(wrapped)
    images = images_of(wrapped)
    with pytest.raises(ArgumentError, match="tokenizer"):
        wrapped.explain(images, ["a dog", "a cat"])
    with pytest.raises(ArgumentError, match="2 images and 3 texts"):
        wrapped.explain(images, tokens(3))
    with pytest.raises(ArgumentError, match="'matching', 'best' or 'all'"):
        wrapped.explain(images, tokens(2), pairs="both")
    with pytest.raises(ArgumentError, match="one text"):
        wrapped.explain(images, tokens(1), contrast=True)
    with pytest.raises(ArgumentError, match="no text"):
        wrapped.explain(images, [])
    with pytest.raises(ArgumentError, match="expected strings"):
        wrapped.explain(images, 3)
    with pytest.raises(ArgumentError, match=r"\[T >= 1, 20\]"):
        wrapped.explain(images, torch.randn(2, 7))
    with pytest.raises(ArgumentError, match="finite"):
        wrapped.explain(images, torch.full((2, 20), float("nan")))
    with pytest.raises(ImageError, match="finite"):
        wrapped.explain(images * float("nan"), tokens(2))
    with pytest.raises(ArgumentError, match="coalitions came"):
        wrapped(images, None, coalitions_of(wrapped))
    with pytest.raises(CoalitionError):
        wrapped(images, tokens(2), coalitions_of(wrapped)[:, :, 1:])


@pytest.mark.parametrize("kind", WHOLE)
def test_towers_without_patch_embeddings_are_refused(kind):
    with pytest.raises(UnsupportedBackboneError, match="queries"):
        ShapleyWrapper(clip_model(kind))


def test_one_image_of_a_classifier_by_cosines():
    wrapped = ShapleyWrapper(clip_model().visual, head=nn.Linear(20, 4), readout="cosine")
    images = images_of(wrapped, num=1)
    with torch.no_grad():
        torch.testing.assert_close(wrapped.attribute(images).sum(1), wrapped(images))
    assert wrapped.report().readout == "cosine"


def test_the_class_is_public():
    assert shapwrap.ShapleyCLIP is ShapleyCLIP


def test_pretrained_weights_from_a_file(tmp_path):
    name = known_to_open_clip(tmp_path)
    trained = open_clip.create_model(name)
    with torch.no_grad():
        trained.visual.proj.normal_(generator=torch.Generator().manual_seed(0))
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    model, _, preprocess = open_clip.create_model_and_transforms(
        name, pretrained=str(tmp_path / "weights.pt")
    )
    wrapped = ShapleyCLIP(model)
    assert torch.equal(wrapped.visual.proj, trained.visual.proj)
    assert wrapped.normalization.mean == pytest.approx(open_clip.OPENAI_DATASET_MEAN)
    picture = Image.fromarray(torch.arange(20 * 30 * 3).view(20, 30, 3).byte().numpy())
    image = preprocess(picture)[None]
    explanation = wrapped.eval().explain(image, tokens(1))
    assert explanation.grid == (4, 4) and explanation.efficiency_gap() < 1e-6
    figure = explanation.plot(image)
    assert len(figure.axes) >= 3
