"""Attention pooling as a mean over patches, against the model's own layer and explicit loops."""

import pytest
import torch

from tests.backbones import make_case, random_coalitions

MAP_KINDS = ["clip-resnet", "clip-resnet-rotary"]


def _explicit(case, image, coalition):
    """v(s) [K] of one image: CLIP's pooling over the present patches of the masked image."""
    model, keep = case.wrapped.model, coalition.nonzero()[:, 0]
    if len(keep) == 0:
        return torch.zeros(case.wrapped.num_classes)
    rows, columns = case.wrapped.grid
    cells = coalition.view(1, 1, rows, columns)
    height, width = image.shape[-2:]
    pixels = cells.repeat_interleave(height // rows, 2).repeat_interleave(width // columns, 3)
    patches = model.forward_features(image[None] * pixels)[0].flatten(1).T
    head = model.head
    tokens = torch.cat((patches[keep].mean(0, keepdim=True), patches))
    rotary = not isinstance(head.pos_embed, torch.nn.Parameter)
    if not rotary:
        tokens = tokens + head.pos_embed
    query, key, value = head.q(tokens), head.k(tokens), head.v(tokens)
    pooled = []
    for start in range(0, head.embed_dim, head.head_dim):
        part = slice(start, start + head.head_dim)
        keys = key[:, part]
        if rotary:
            sine, cosine = head.pos_embed.get_embed((rows, columns)).chunk(2, dim=-1)
            odd_even = torch.stack((-keys[1:, 1::2], keys[1:, ::2]), -1).flatten(1)
            keys = torch.cat((keys[:1], keys[1:] * cosine + odd_even * sine))
        read = torch.cat((torch.zeros(1, dtype=torch.long), keep + 1))
        scores = keys[read] @ query[0, part] / head.head_dim**0.5
        pooled.append(scores.softmax(0) @ value[read, part])
    return head.proj(torch.cat(pooled)) * len(keep) / case.wrapped.num_patches


@pytest.mark.parametrize("kind", MAP_KINDS)
@torch.no_grad()
def test_pooling_of_maps_runs_over_present_patches(kind):
    case = make_case(kind)
    coalitions = random_coalitions(case, 4, 3, paired=False)
    coalitions[:, 0] = False
    values = case.wrapped.value(case.images, coalitions)
    for image, of_image, found in zip(case.images, coalitions, values, strict=True):
        for coalition, value in zip(of_image, found, strict=True):
            expected = _explicit(case, image, coalition)
            torch.testing.assert_close(value, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", ["vit-average-map", "eva-average-map", *MAP_KINDS])
@torch.no_grad()
def test_logits_are_those_of_the_models_own_pooling(kind):
    case = make_case(kind)
    original = case.wrapped.model(case.images)
    torch.testing.assert_close(case.wrapped(case.images), original, atol=1e-5, rtol=1e-5)
    values = case.wrapped.attribute(case.images)
    # The weights of the pooling show in the values: they are no equal shares.
    assert values.std(dim=1).mean() > 1e-3 * values.abs().mean()


@torch.no_grad()
def test_zeroed_pixels_with_a_token_model_that_pools_by_attention():
    case = make_case("vit-average-map-registers", masking="zero-mask")
    assert case.wrapped.report().masking == "zero-mask"
    coalitions = random_coalitions(case, 4, 5, paired=True)
    coalitions[:, 0], coalitions[:, 1] = True, False
    values = case.wrapped.value(case.images, coalitions)
    torch.testing.assert_close(values[:, 0], case.wrapped(case.images), atol=1e-5, rtol=1e-5)
    assert torch.equal(values[:, 1], torch.zeros_like(values[:, 1]))
