"""Explainers where a model is compiled, parallel, or runs under autocast."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.parallel import DataParallel

from shapwrap import ShapleyWrapper
from shapwrap.explainers import (
    GAME,
    AttCAT,
    AttentionGradCAM,
    AttentionRollout,
    CheferLRP,
    GradCAM,
    InputXGradient,
    Occlusion,
    TokenTM,
)
from shapwrap.explainers.explained_model import ExplainedModel

pytestmark = pytest.mark.filterwarnings(
    "ignore::shapwrap.explainers.token_tm.UnverifiedFormulaWarning"
)


@pytest.fixture(scope="module")
def vit():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VisionTransformer((32, 48), 16, num_classes=5, embed_dim=16, depth=2, num_heads=2)
        nn.init.normal_(model.head.weight)
    return model


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))


METHODS = [
    GradCAM,
    AttentionGradCAM,
    AttentionRollout,
    GAME,
    AttCAT,
    TokenTM,
    CheferLRP,
    InputXGradient,
    Occlusion,
]


@pytest.mark.parametrize("method", METHODS)
def test_under_autocast_values_are_float32_and_near(method, vit, images):
    target = torch.tensor([0, 3])
    plain = method(vit)(images, target).values
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = method(vit)(images, target).values
    assert made.dtype == torch.float32
    assert (made - plain).abs().max() < 0.2 * plain.abs().max()


def test_rollout_multiplies_attention_in_full_precision_under_autocast(vit, images):
    """Only the model is rounded: products of attention that come after are not."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        row = AttentionRollout(vit)(images).values
    assert not torch.equal(row, row.bfloat16().float())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "outer", [DataParallel, lambda model: torch.compile(model, backend="eager")]
)
def test_the_model_inside_is_explained(method, outer, vit, images):
    made = method(outer(vit))(images)
    expected = method(vit)(images)
    assert made.method == expected.method
    torch.testing.assert_close(made.values, expected.values, rtol=0, atol=0)


def test_a_wrapped_model_inside(vit, images):
    wrapped = ShapleyWrapper(vit, class_names=list("abcde"))
    explained = ExplainedModel(DataParallel(torch.compile(wrapped, backend="eager")))
    assert explained.wrapped is wrapped
    assert list(GradCAM(wrapped)(images).class_names or []) == list("abcde")
    assert GradCAM(vit)(images).class_names is None
