"""The invariants of the game, over random backbones, grids, dtypes, batches and coalitions."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from shapwrap import ShapleyOutput
from tests.backbones import BUILDERS, TOKEN_KINDS, cases, make_case, random_coalitions


@given(cases())
@torch.no_grad()
def test_efficiency(recipe):
    case = recipe()
    logits = case.wrapped(case.images)
    values = case.wrapped.attribute(case.images)
    assert values.shape == (len(case.images), case.wrapped.num_patches, case.wrapped.num_classes)
    torch.testing.assert_close(values.sum(1), logits, atol=case.tolerance, rtol=case.tolerance)


@given(cases(), st.integers(0, 99))
@torch.no_grad()
def test_nobody_is_worth_nothing_and_everybody_the_logits(recipe, seed):
    case = recipe()
    coalitions = random_coalitions(case, 3, seed, paired=False)
    coalitions[:, 0], coalitions[:, 2] = False, True
    output = case.wrapped(case.images, coalitions)
    assert isinstance(output, ShapleyOutput)
    for found in (case.wrapped.value(case.images, coalitions), output.values, output.estimates):
        assert torch.equal(found[:, 0], torch.zeros_like(found[:, 0]))
        torch.testing.assert_close(
            found[:, 2], output.logits, atol=case.tolerance, rtol=case.tolerance
        )
    torch.testing.assert_close(
        case.wrapped(case.images), output.logits, atol=case.tolerance, rtol=case.tolerance
    )


@given(cases(), st.integers(0, 99))
@torch.no_grad()
def test_estimates_are_sums_of_patch_values(recipe, seed):
    case = recipe()
    coalitions = random_coalitions(case, 4, seed, paired=seed % 2 == 0)
    output = case.wrapped(case.images, coalitions)
    values = case.wrapped.attribute(case.images)
    expected = coalitions.to(values.dtype) @ values
    torch.testing.assert_close(output.estimates, expected, atol=case.tolerance, rtol=case.tolerance)


def _change_absent_pixels(case, coalition):
    rows, columns = case.wrapped.grid
    height, width = case.images.shape[-2:]
    cells = coalition.view(-1, 1, rows, columns)
    present = cells.repeat_interleave(height // rows, 2).repeat_interleave(width // columns, 3)
    return torch.where(present, case.images, case.images.roll(1, dims=-1) * -3 + 1)


@given(cases(), st.integers(0, 99), st.booleans())
@torch.no_grad()
def test_no_leak(recipe, seed, paired):
    """v(s) does not change by one bit when the pixels of absent patches change."""
    case = recipe()
    coalitions = random_coalitions(case, 2, seed, paired=paired)
    before = case.wrapped.value(case.images, coalitions)
    for index in range(2):
        changed = _change_absent_pixels(case, coalitions[:, index])
        after = case.wrapped.value(changed, coalitions)
        assert torch.equal(before[:, index], after[:, index])
        output = case.wrapped(changed, coalitions)
        assert torch.equal(before[:, index], output.values[:, index])


@given(st.sampled_from(sorted(BUILDERS)), st.integers(0, 99))
def test_no_leak_in_train_mode(kind, seed):
    """Neither batch statistics nor another coalition of the batch carry absent pixels."""
    case = make_case(kind)
    case.wrapped.train()
    coalitions = random_coalitions(case, 2, seed, paired=True)
    torch.manual_seed(seed)
    before = case.wrapped.value(case.images, coalitions).detach()
    # Some models have dropout by default; it must draw the same for both.
    torch.manual_seed(seed)
    after = case.wrapped.value(_change_absent_pixels(case, coalitions[:, 0]), coalitions)
    assert torch.equal(before[:, 0], after.detach()[:, 0])


@given(cases(), st.integers(0, 99))
@torch.no_grad()
def test_a_batch_is_its_images_one_by_one(recipe, seed):
    case = recipe()
    coalitions = random_coalitions(case, 2, seed, paired=True)
    together = case.wrapped(case.images, coalitions)
    for index in range(len(case.images)):
        rows = slice(index, index + 1)
        alone = case.wrapped(case.images[rows], coalitions[rows])
        for one, many in zip(alone, together, strict=True):
            torch.testing.assert_close(one, many[rows], atol=case.tolerance, rtol=case.tolerance)


@given(cases(TOKEN_KINDS), st.integers(0, 99))
@torch.no_grad()
def test_pairs_in_one_pass_equal_coalitions_apart(recipe, seed):
    case = recipe()
    coalitions = random_coalitions(case, 4, seed, paired=True)
    paired = case.wrapped(case.images, coalitions, paired=True).values
    apart = case.wrapped(case.images, coalitions, paired=False).values
    torch.testing.assert_close(paired, apart, atol=case.tolerance, rtol=case.tolerance)
    chunked = case.wrapped.value(case.images, coalitions, chunk_size=1)
    torch.testing.assert_close(paired, chunked, atol=case.tolerance, rtol=case.tolerance)


@given(cases(), st.integers(0, 99))
@torch.no_grad()
def test_explanation_of_a_class_is_its_column(recipe, seed):
    case = recipe()
    target = torch.randint(case.wrapped.num_classes, (len(case.images),))
    values = case.wrapped.attribute(case.images)
    explanation = case.wrapped.explain(case.images, target)
    column = values[torch.arange(len(target)), :, target]
    torch.testing.assert_close(explanation.values, column, atol=case.tolerance, rtol=case.tolerance)
    assert explanation.efficiency_gap().max() <= case.tolerance * 10
    contrasted = case.wrapped.explain(case.images, target, contrast=True)
    torch.testing.assert_close(
        contrasted.values, column - values.mean(2), atol=case.tolerance, rtol=case.tolerance
    )
    assert contrasted.efficiency_gap().max() <= case.tolerance * 10
