"""Models as open_clip loads them in half precision, of which some keep norms in float32."""

import copy

import pytest
import torch

from shapwrap import ShapleyCLIP
from shapwrap.clip import ZeroShotClassifier
from shapwrap.errors import ImageTypeError
from shapwrap.explainers import (
    ECLIP,
    GAME,
    M2IB,
    AttentionRollout,
    CLIPGradCAM,
    CLIPSurgery,
    MaskCLIP,
    Occlusion,
)

open_clip = pytest.importorskip("open_clip")

from tests.clip_models import coalitions_of, images_of, known_to_open_clip, tokens  # noqa: E402

every_precision = pytest.mark.parametrize("precision", ["fp16", "bf16", "pure_bf16"])


def build(folder, precision):
    """A model, the same in float32, and in what precision it takes images."""
    torch.manual_seed(0)
    model = open_clip.create_model(known_to_open_clip(folder), precision=precision).eval()
    assert (precision == "pure_bf16") == (model.visual.class_embedding.dtype != torch.float32)
    return model, copy.deepcopy(model).float(), open_clip.get_input_dtype(precision)


@every_precision
@torch.no_grad()
def test_sums_over_patches(tmp_path, precision):
    model, in_full, dtype = build(tmp_path, precision)
    before = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    wrapped, full = ShapleyCLIP(model), ShapleyCLIP(in_full)
    images, texts, coalitions = images_of(wrapped).to(dtype), tokens(), coalitions_of(wrapped)
    values = wrapped(images, texts, coalitions).for_texts().values
    for found, expected in (
        (wrapped.attribute(images, texts), full.attribute(images.float(), texts)),
        (values, full.value(images.float(), texts, coalitions)),
    ):
        assert found.dtype == torch.float32
        bound = 0.03 * float(expected.abs().max())
        torch.testing.assert_close(found, expected, atol=bound, rtol=0.0)
    assert wrapped.explain(images, texts[:2]).efficiency_gap().max() < 1e-6
    logits = wrapped.get_logits(images, texts)[0]
    torch.testing.assert_close(wrapped.classifier(texts)(images), logits, atol=0.1, rtol=0.0)
    assert wrapped.report().length <= 1
    with pytest.raises(ImageTypeError, match=f"the model is {dtype}"):
        wrapped.encode_image(images.float())
    assert before == {name: tensor.dtype for name, tensor in model.state_dict().items()}


@every_precision
@pytest.mark.parametrize(
    "method",
    [AttentionRollout, GAME, CLIPGradCAM, ECLIP, MaskCLIP, CLIPSurgery, M2IB, Occlusion],
)
def test_methods(tmp_path, precision, method):
    model, in_full, dtype = build(tmp_path, precision)
    explainer = method(ZeroShotClassifier(model, tokens()))
    images = torch.randn(2, 3, 16, 16)
    values = explainer(images.to(dtype), 1).values.float()
    expected = method(ZeroShotClassifier(in_full, tokens()))(images, 1).values
    both = torch.stack((values.flatten(), expected.flatten()))
    assert torch.corrcoef(both)[0, 1] > 0.95
    with pytest.raises(ImageTypeError, match=f"the model is {dtype}"):
        explainer(images, 1)
