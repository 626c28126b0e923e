"""The sampler against Eq. 4, and exact Shapley values against the axioms."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from shapwrap import all_coalitions, exact_shapley_values, kernel_regression, sample_coalitions
from shapwrap.coalitions import size_probabilities
from shapwrap.errors import ArgumentError, CoalitionError


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("num_patches", [2, 3, 7, 49, 196])
def test_size_probabilities_are_the_kernel_summed_over_sizes(num_patches):
    weights = []
    for size in range(1, num_patches):
        # Eq. 4 for one coalition, times the number of coalitions of that size.
        log_weight = (
            math.log(num_patches - 1)
            + math.lgamma(size)
            + math.lgamma(num_patches - size)
            - math.lgamma(num_patches + 1)
        )
        weights.append(math.exp(log_weight) * math.comb(num_patches, size))
    expected = torch.tensor(weights, dtype=torch.float64)
    found = size_probabilities(num_patches)
    assert found[0] == found[-1] == 0
    torch.testing.assert_close(found[1:-1], expected / expected.sum())


@pytest.mark.parametrize("distribution", ["shapley", "uniform"])
@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("num_patches", [3, 12, 196])
def test_size_marginals(distribution, paired, num_patches):
    draws = 20_000
    coalitions = sample_coalitions(
        draws, num_patches, 2, distribution=distribution, paired=paired, generator=_generator()
    )
    # The first of a pair is an independent draw, its complement is not.
    sizes = coalitions[:, 0].sum(1)
    counts = torch.bincount(sizes, minlength=num_patches + 1)[1:-1].double()
    assert counts.sum() == draws, "no coalition may be empty or full"
    expected = size_probabilities(num_patches, distribution)[1:-1] * draws
    enough = expected > 5
    assert (
        chisquare(
            counts[enough], expected[enough] * counts[enough].sum() / expected[enough].sum()
        ).pvalue
        > 1e-3
    )


def test_every_subset_of_a_size_is_equally_likely():
    coalitions = sample_coalitions(30_000, 5, 1, paired=False, generator=_generator())[:, 0]
    pairs = coalitions[coalitions.sum(1) == 2]
    codes = (pairs.long() * 2 ** torch.arange(5)).sum(1)
    counts = torch.bincount(codes)
    counts = counts[counts > 0]
    assert len(counts) == math.comb(5, 2)
    assert chisquare(counts).pvalue > 1e-3


@given(st.integers(1, 5), st.integers(2, 40), st.integers(1, 4), st.integers(0, 999))
def test_pairs_are_complements_and_draws_repeat(batch, num_patches, pairs, seed):
    coalitions = sample_coalitions(batch, num_patches, 2 * pairs, generator=_generator(seed))
    assert coalitions.shape == (batch, 2 * pairs, num_patches)
    assert coalitions.dtype == torch.bool
    assert torch.equal(coalitions[:, 0::2], ~coalitions[:, 1::2])
    again = sample_coalitions(batch, num_patches, 2 * pairs, generator=_generator(seed))
    assert torch.equal(coalitions, again)


@given(st.integers(1, 6), st.integers(2, 40), st.integers(1, 3), st.integers(0, 999))
def test_complements_across_images(batch, num_patches, num, seed):
    coalitions = sample_coalitions(
        batch, num_patches, num, paired="across", generator=_generator(seed)
    )
    assert coalitions.shape == (batch, num, num_patches)
    for image in range(1, batch, 2):
        assert torch.equal(coalitions[image], ~coalitions[image - 1])
    sizes = coalitions.sum(2)
    assert sizes.min() > 0 and sizes.max() < num_patches


@pytest.mark.parametrize("image", [0, 1, 2])
def test_each_image_has_draws_of_its_own_across(image):
    """The complement of a draw from the kernel is a draw from the kernel."""
    coalitions = sample_coalitions(3, 9, 20_000, paired="across", generator=_generator())
    counts = torch.bincount(coalitions[image].sum(1), minlength=10)[1:-1].double()
    assert chisquare(counts, size_probabilities(9)[1:-1] * 20_000).pvalue > 1e-3


def test_a_generator_leaves_the_global_state_alone():
    before = torch.get_rng_state()
    sample_coalitions(4, 9, generator=_generator())
    assert torch.equal(before, torch.get_rng_state())
    sample_coalitions(4, 9)
    assert not torch.equal(before, torch.get_rng_state())


def test_refusals():
    with pytest.raises(CoalitionError, match="num is 3; paired"):
        sample_coalitions(2, 9, 3)
    with pytest.raises(ArgumentError, match="paired is 'images'; expected True, False or 'across'"):
        sample_coalitions(2, 9, paired="images")
    with pytest.raises(ArgumentError, match="at least 2 patches"):
        sample_coalitions(2, 1)
    with pytest.raises(ArgumentError, match="at least 1"):
        sample_coalitions(0, 9)
    with pytest.raises(ArgumentError, match="distribution is 'kernel'"):
        sample_coalitions(2, 9, distribution="kernel")
    with pytest.raises(ArgumentError, match=r"1\.\.16"):
        all_coalitions(17)
    with pytest.raises(ArgumentError, match="2\\^N"):
        exact_shapley_values(torch.zeros(7))


def _game(num_patches, seed, classes=3):
    return torch.randn(2**num_patches, classes, dtype=torch.float64, generator=_generator(seed))


def _permutation_reference(values, num_patches):
    """Shapley values as the mean marginal gain over all orders: Eq. 2 read another way."""
    from itertools import permutations

    total = torch.zeros(num_patches, *values.shape[1:], dtype=values.dtype)
    for order in permutations(range(num_patches)):
        code = 0
        for patch in order:
            total[patch] += values[code + 2**patch] - values[code]
            code += 2**patch
    return total / math.factorial(num_patches)


@given(st.integers(1, 5), st.integers(0, 99))
def test_exact_values_are_mean_gains_over_orders(num_patches, seed):
    values = _game(num_patches, seed)
    torch.testing.assert_close(
        exact_shapley_values(values), _permutation_reference(values, num_patches)
    )


@given(st.integers(2, 8), st.integers(0, 99))
def test_kernel_regression_gives_the_shapley_value(num_patches, seed):
    values = _game(num_patches, seed)
    torch.testing.assert_close(
        kernel_regression(values), exact_shapley_values(values), atol=1e-8, rtol=1e-8
    )


@given(st.integers(2, 7), st.integers(0, 99))
def test_axioms(num_patches, seed):
    first, second = _game(num_patches, seed), _game(num_patches, seed + 100)
    close = torch.testing.assert_close
    shapley = exact_shapley_values
    close(shapley(first).sum(0), first[-1] - first[0])
    close(shapley(2 * first - 3 * second), 2 * shapley(first) - 3 * shapley(second))

    coalitions = all_coalitions(num_patches)
    codes = (coalitions.long() * 2 ** torch.arange(num_patches)).sum(1)
    without_first = codes - coalitions[:, 0].long()
    dummy = first[without_first]
    close(shapley(dummy)[0], torch.zeros(3, dtype=torch.float64))

    swapped = codes + coalitions[:, 1].long() - coalitions[:, 0].long()
    swapped = swapped - 2 * coalitions[:, 1].long() + 2 * coalitions[:, 0].long()
    symmetric = first + first[swapped]
    close(shapley(symmetric)[0], shapley(symmetric)[1])
