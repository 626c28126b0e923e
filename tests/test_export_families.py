"""Programs of every family of backbones, at any batch size."""

import pytest
import torch

from shapwrap import ShapleyCLIP, ShapleyWrapper
from shapwrap.errors import ArgumentError
from shapwrap.export import exportable, to_torch
from tests.backbones import BUILDERS, build, make_case

CLASS_TOKENS = ["vit-class-token", "relpos-class-token", "torchvision-vit"]
ELSEWHERE = ["vit-average-norm-registers", "eva-average", "relpos-average", "naflex-class-token"]
ELSEWHERE += ["vit-registers", "vit-average-map-registers", "hiera-average-windows", "resnet"]
ELSEWHERE += ["eva-average-map", "whole-class-token", "clip-resnet", "beit-average", "vit-average"]
ELSEWHERE += ["eva-class-token", "vit-average-class-token", "torchvision-resnet", *CLASS_TOKENS]
"""Kinds that other tests export, or that run the same lines as one of these."""


def assert_program_is_right(wrapped, images, values):
    """On batches that the export did not see."""
    program = to_torch(wrapped, images, values=values).module()
    generator = torch.Generator().manual_seed(5)
    for batch in (1, 4):
        drawn = torch.randn(batch, *images.shape[1:], generator=generator)
        logits, found = program(drawn)
        explanation = wrapped.explain(drawn)
        bound = 1e-5 * float(explanation.logits.abs().max())
        torch.testing.assert_close(logits, explanation.logits, atol=bound, rtol=1e-5)
        expected = explanation.values if values == "predicted" else wrapped.attribute(drawn)
        torch.testing.assert_close(found, expected, atol=bound, rtol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in BUILDERS if kind not in ELSEWHERE])
@torch.no_grad()
def test_every_family(kind):
    case = make_case(kind)
    assert_program_is_right(case.wrapped, case.images, "predicted")


@pytest.mark.parametrize("kind", CLASS_TOKENS)
@torch.no_grad()
def test_class_token_readouts(kind):
    case = make_case(kind, readout="class-token")
    assert_program_is_right(case.wrapped, case.images, "all")


@torch.no_grad()
def test_a_finer_grid():
    model, size = build("resnet", (3, 4))
    wrapped = ShapleyWrapper(model, grid=(6, 8), image_size=size)
    assert_program_is_right(wrapped, torch.randn(1, 3, *size), "predicted")


@pytest.mark.parametrize("kind", ["coca", "resnet"])
@torch.no_grad()
def test_towers(kind):
    pytest.importorskip("open_clip")
    from tests.clip_models import clip_model, images_of, tokens

    clip = ShapleyCLIP(clip_model(kind))
    with pytest.raises(ArgumentError, match="there are no texts"):
        exportable(clip)
    images, texts = images_of(clip, 3), tokens()
    program = to_torch(clip, images[:1], texts=texts, values="all")
    # A switch of autocast would be a node that few runtimes know.
    assert not any("autocast" in str(node.target).lower() for node in program.graph.nodes)
    similarities, values = program.module()(images)
    torch.testing.assert_close(values, clip.attribute(images, texts), atol=1e-6, rtol=1e-5)
    expected = clip.encode_image(images) @ clip.encode_text(texts, normalize=True).mT
    torch.testing.assert_close(similarities, expected, atol=1e-6, rtol=1e-5)
    # CLIP's own scale is that of its zero-shot classifier.
    classifier = clip.classifier(texts)
    logits, _ = exportable(classifier)(images)
    torch.testing.assert_close(logits, clip.get_logits(images, texts)[0], atol=1e-4, rtol=1e-5)
