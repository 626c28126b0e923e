"""Coalitions of two images in one pass: each image is as if it were alone."""

import pytest
import torch

from shapwrap import sample_coalitions, shapley_loss
from shapwrap.errors import ArgumentError, CoalitionError
from tests.backbones import BUILDERS, TOKEN_KINDS, make_case
from tests.removal_reference import reference_value
from tests.test_class_token import images_for, make


def _across(case, num, seed=0):
    return sample_coalitions(
        len(case.images),
        case.wrapped.num_patches,
        num,
        paired="across",
        generator=torch.Generator().manual_seed(seed),
    )


@pytest.mark.parametrize("kind", TOKEN_KINDS)
@pytest.mark.parametrize(("batch", "num"), [(4, 1), (3, 2)])
@torch.no_grad()
def test_equals_gathering_one_image_at_a_time(kind, batch, num):
    case = make_case(kind, batch=batch)
    coalitions = _across(case, num)
    output = case.wrapped(case.images, coalitions, paired="across")
    for image, rows, found in zip(case.images, coalitions, output.values, strict=True):
        expected = torch.stack([reference_value(case, image, row) for row in rows])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    apart = case.wrapped(case.images, coalitions, paired=False)
    torch.testing.assert_close(output, apart, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["registers", "normed", "rotary", "relative"])
def test_each_image_reads_its_own_class_token(kind):
    wrapped = make(kind).eval()
    images = images_for(wrapped, batch=5)
    generator = torch.Generator().manual_seed(2)
    coalitions = sample_coalitions(5, wrapped.num_patches, 3, paired="across", generator=generator)
    found = wrapped(images, coalitions, paired="across")
    apart = wrapped(images, coalitions, paired=False)
    torch.testing.assert_close(found, apart, atol=1e-5, rtol=1e-5)
    names, weights = zip(
        *((n, w) for n, w in wrapped.named_parameters() if w.requires_grad), strict=True
    )
    gradients = torch.autograd.grad(shapley_loss(found), weights, materialize_grads=True)
    expected = torch.autograd.grad(shapley_loss(apart), weights, materialize_grads=True)
    for name, one, other in zip(names, gradients, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", list(BUILDERS))
@torch.no_grad()
def test_every_backbone_takes_them(kind):
    case = make_case(kind, batch=3)
    coalitions = _across(case, 1)
    found = case.wrapped(case.images, coalitions, paired="across")
    apart = case.wrapped(case.images, coalitions, paired=False)
    torch.testing.assert_close(found, apart, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_a_pass_over_half_as_many_images():
    case = make_case("vit-class-token", batch=6)
    rows = []
    case.wrapped.model.blocks[0].register_forward_hook(lambda _, given, out: rows.append(len(out)))
    coalitions = _across(case, 1)
    case.wrapped(case.images, coalitions, paired="across")
    assert rows == [6, 3]
    rows.clear()
    # Nobody said that they are pairs, but they are.
    case.wrapped(case.images, coalitions)
    assert rows == [6, 3]
    rows.clear()
    case.wrapped(case.images[:1], coalitions[:1], paired="across")
    assert rows == [1, 1]


def test_refusals():
    case = make_case("vit-class-token", batch=3)
    generator = torch.Generator().manual_seed(0)
    coalitions = sample_coalitions(3, 12, 1, paired=False, generator=generator)
    with pytest.raises(CoalitionError, match="not the complements"):
        case.wrapped(case.images, coalitions, paired="across")
    with pytest.raises(ArgumentError, match="paired is 'images'"):
        case.wrapped(case.images, coalitions, paired="images")
