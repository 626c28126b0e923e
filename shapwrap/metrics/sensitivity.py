"""Sensitivity-n: whether the sum of values of a set of patches tells what the set is worth."""

import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from shapwrap.arguments import check_at_least
from shapwrap.errors import ArgumentError
from shapwrap.metrics.correlation import pearson, spearman
from shapwrap.metrics.protocol import Protocol
from shapwrap.metrics.value_functions import ValueFunction

Size = int | Literal["all"]
"""Patches removed; "all" for a size drawn uniformly from 0 to N, set by set."""


class Sensitivity(NamedTuple):
    """Correlations, one row a size of removed sets."""

    sizes: tuple[Size, ...]
    """Patches removed, n."""
    pearson: Float[Tensor, "sizes batch"]
    """float64; NaN where undefined."""
    spearman: Float[Tensor, "sizes batch"]
    """float64; NaN where undefined."""
    undefined: int
    """Images and sizes without a correlation: the values of the sets, or their sums, are all the
    same."""
    protocol: Protocol
    """Every choice, in words."""


def sensitivity_n(
    values: Tensor,
    value: ValueFunction,
    *,
    sizes: Sequence[Size | str] | Size | str | None = None,
    num_subsets: int = 1000,
    chunk_size: int = 1000,
    generator: torch.Generator | None = None,
) -> Sensitivity:
    """Correlation, over random sets of n removed patches, of their summed values and their worth.

    The worth of removing a set is v(everybody) - v(the rest). Since the sum over the removed is the
    total minus the sum over the kept, it makes no difference whether removed or kept patches are
    summed, only that n removed are N - n kept.

    Args:
        values: Float [B, N], the explanation to judge.
        value: From coalitions, bool [B, S, N], to the output of the explained class, [B, S]:
            `native_value`, `filled_value` or any other.
        sizes: Number of removed patches n, 1 to N - 1, or "all" for sets of any size; one or
            several. By default the multiples of N / 14, as published for N = 196.
        num_subsets: Sets drawn for each size and image, at least 2.
        chunk_size: Sets an image that are valued in one call.
        generator: Source of randomness, on the CPU; a new one with seed 0 if None.

    Raises:
        ArgumentError: Values or sizes that do not fit, or a value function that gives another
            shape or values that are not finite.

    References:
        Ancona et al. 2018, "Towards better understanding of gradient-based attribution methods for
        deep neural networks", section 3.4. Covert, Kim & Lee 2023, "Learning to Estimate Shapley
        Values with Vision Transformers", who use Spearman's rho.
    """
    _check_values(values)
    num_patches = values.shape[1]
    checked = _check_sizes(sizes, num_patches)
    for name, number, least in (("num_subsets", num_subsets, 2), ("chunk_size", chunk_size, 1)):
        check_at_least(name, number, least)
    generator = generator or torch.Generator().manual_seed(0)
    rows = []
    for size in checked:
        removed = draw_subsets(len(values), num_subsets, num_patches, size, generator)
        kept = (~removed).to(values.device).split(chunk_size, dim=1)
        worth = -torch.cat([_valued(value, part) for part in kept], dim=1)
        # Summed in one order whatever the batch: ties between equal sums must stay ties.
        sums = (removed.to(values.device) * values.double()[:, None]).sum(dim=2)
        rows.append((pearson(sums, worth.to(sums)), spearman(sums, worth.to(sums))))
    of_pearson, of_spearman = (torch.stack(column) for column in zip(*rows, strict=True))
    undefined = int(of_pearson.isnan().sum())
    if undefined:
        warnings.warn(
            f"{undefined} of {of_pearson.numel()} correlations are undefined: the sets of an image "
            "are all worth the same, or their values all sum to the same.",
            stacklevel=2,
        )
    settings = {
        "worth of a set": "v(everybody) - v(the rest), v as the value function given",
        "sets": f"{num_subsets} of each size, an image",
        "sizes": f"{', '.join(map(str, checked))} of {num_patches} patches removed",
        "seed": str(generator.initial_seed()),
    }
    protocol = Protocol.of("sensitivity-n", settings)
    return Sensitivity(checked, of_pearson, of_spearman, undefined, protocol)


def draw_subsets(
    batch: int, number: int, num_patches: int, size: Size, generator: torch.Generator
) -> Bool[Tensor, "batch number patches"]:
    """Random sets of patches of one size, or of uniformly drawn sizes, each patch alike."""
    order = torch.rand(batch, number, num_patches, generator=generator).argsort(dim=2)
    if size == "all":
        sizes = torch.randint(num_patches + 1, (batch, number, 1), generator=generator)
        return order < sizes
    return order < size


def _valued(value: ValueFunction, coalitions: Tensor) -> Tensor:
    found = value(coalitions)
    expected = tuple(coalitions.shape[:2])
    if tuple(found.shape) != expected or not torch.isfinite(found).all():
        raise ArgumentError(
            f"value gives {tuple(found.shape)} for coalitions {tuple(coalitions.shape)}; expected "
            f"finite values {expected}, one for each coalition."
        )
    return found


def _check_values(values: object) -> None:
    valid = isinstance(values, Tensor) and values.is_floating_point() and values.ndim == 2
    if not isinstance(values, Tensor) or not valid or not torch.isfinite(values).all():
        came = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ArgumentError(
            f"values are {came}; expected finite floats [B, N], such as explanation.values."
        )
    if values.shape[1] < 2 or len(values) == 0:
        raise ArgumentError(
            f"values have shape {tuple(values.shape)}; expected [B, N] with at least 2 patches."
        )


def _check_sizes(
    sizes: Sequence[Size | str] | Size | str | None, num_patches: int
) -> tuple[Size, ...]:
    if sizes is None:
        spread = {round(num_patches * part / 14) for part in range(1, 14)}
        return tuple(sorted(spread & set(range(1, num_patches))))
    checked: list[Size] = []
    for size in (sizes,) if isinstance(sizes, int | str) else sizes:
        if size == "all":
            checked.append("all")
        elif isinstance(size, int) and 1 <= size < num_patches:
            checked.append(size)
        else:
            raise ArgumentError(
                f"sizes hold {size!r}; expected 1 to {num_patches - 1} removed patches, or 'all'."
            )
    if not checked:
        raise ArgumentError("sizes are empty; expected at least one number of removed patches.")
    return tuple(checked)
