"""What users pass to image-text models: texts in all forms, options, pixels; and what it costs."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from shapwrap import ShapleyCLIP, ShapleyWrapper
from shapwrap.clip import ZeroShotClassifier
from shapwrap.errors import ArgumentError, BackboneTypeError, ImageError

pytest.importorskip("open_clip")

from tests.clip_models import clip_model, images_of, tokenizer, tokens


def make(**options):
    wrapped = ShapleyCLIP(clip_model(), tokenizer=tokenizer, **options)
    return wrapped, images_of(wrapped)


@torch.no_grad()
def test_strings_are_taken_wherever_token_ids_are():
    wrapped, images = make()
    names = ["a dog", "a cat"]
    ids = tokenizer(names)
    torch.testing.assert_close(wrapped.encode_text(names), wrapped.model.encode_text(ids))
    torch.testing.assert_close(wrapped.encode_text("a dog"), wrapped.encode_text(ids[:1]))
    torch.testing.assert_close(wrapped(images, names), wrapped(images, ids.int()))
    torch.testing.assert_close(wrapped.get_logits(images, names), wrapped.get_logits(images, ids))


@pytest.mark.parametrize(
    "texts",
    [torch.randn(2, 20), torch.ones(2, 8, dtype=torch.uint8), torch.ones(8, dtype=torch.int64), 3],
)
def test_what_is_no_text(texts):
    wrapped, images = make()
    with pytest.raises(ArgumentError, match="expected"):
        wrapped.encode_text(texts)
    with pytest.raises(ArgumentError, match="expected"):
        wrapped(images, texts)


@pytest.mark.parametrize(
    "bad",
    ["ViT-B-32", lambda _: [[1, 2, 3]], lambda _: {"input_ids": tokens(1)}, lambda _: tokens(3)],
)
def test_what_is_no_tokenizer(bad):
    wrapped = ShapleyCLIP(clip_model(), tokenizer=bad)
    with pytest.raises(ArgumentError, match=r"open_clip\.get_tokenizer"):
        wrapped.explain(images_of(wrapped), "a dog")


def test_embeddings_without_a_direction():
    wrapped, images = make()
    embeddings = torch.randn(2, 20)
    embeddings[1] = 0
    with pytest.raises(ArgumentError, match="no direction"):
        wrapped.explain(images, embeddings)


def test_options_of_the_wrapper():
    model = clip_model()
    assert ShapleyWrapper(model, tokenizer=tokenizer).tokenizer is tokenizer
    ShapleyWrapper(clip_model(), num_classes=None, head=None, readout="auto")
    for options in ({"num_classes": 0}, {"head": nn.Sequential()}, {"class_names": []}):
        with pytest.raises(ArgumentError, match=next(iter(options))):
            ShapleyWrapper(clip_model(), **options)
    with pytest.raises(TypeError, match="no_such_option"):
        ShapleyWrapper(clip_model(), no_such_option=1)


def test_a_model_without_a_scale():
    class WithoutScale(nn.Module):
        def __init__(self):
            super().__init__()
            self.visual, self.text = clip_model().visual, clip_model().text

        def encode_text(self, text, normalize=False):
            return self.text(text)

        def encode_image(self, image):
            return self.visual(image)

    with pytest.raises(BackboneTypeError, match="logit_scale"):
        ShapleyCLIP(WithoutScale())
    with pytest.raises(BackboneTypeError, match="logit_scale"):
        ZeroShotClassifier(WithoutScale(), tokens(2))


def test_pixels_that_are_not_finite():
    wrapped, images = make()
    images[1, 0, 0, 0] = float("nan")
    with pytest.raises(ImageError, match=r"\[1\] contain NaN"):
        wrapped.audit(images, ["a dog"], num_coalitions=4)
    with pytest.raises(ImageError, match="contain NaN"):
        wrapped.classifier(["a dog"]).audit(images, num_coalitions=4)
    with pytest.raises(ImageError, match="contain NaN"):
        wrapped.game(images[1], "a dog")


def test_names_of_classes():
    wrapped, _ = make()
    assert wrapped.classifier(["a dog", "a cat"]).class_names == ["a dog", "a cat"]
    for names in ([], ["dog"]):
        with pytest.raises(ArgumentError, match="class_names"):
            wrapped.classifier(["a dog", "a cat"], names)
    note = wrapped.classifier(["a dog", "a cat"]).report().note
    assert "embeddings of texts" in note and "The head is new" not in note


class Sizes(TorchDispatchMode):
    """Notes how large the tensors are that operators make."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.largest = max(self.largest, made.untyped_storage().nbytes() // 4)
        return made


def test_texts_cost_no_copies_of_embeddings():
    wrapped, images = make()
    texts = torch.randn(60, 20, generator=torch.Generator().manual_seed(0))
    with Sizes() as sizes:
        explanation = wrapped.explain(images, texts, pairs="all")
    assert explanation.values.shape == (120, 12)
    # Logits of all rows and texts, which an explanation has.
    assert sizes.largest <= 120 * 60
