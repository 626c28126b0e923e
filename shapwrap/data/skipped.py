"""What a stream of samples left out, and why: counted, and said once."""

import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple


class SkippedSampleWarning(UserWarning):
    """Samples that could not be used were left out."""


class Skip(NamedTuple):
    """One sample that cannot be used."""

    reason: str
    key: str
    """Which one, and what was wrong with it."""


class Skipped:
    """Counts of samples left out, by reason, with the first key of each."""

    def __init__(self, instead: str = ", and others taken in their place") -> None:
        self._instead = instead
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self._said = False

    @property
    def total(self) -> int:
        """All of them."""
        return self.counts.total()

    def add(self, skips: Iterable[Skip]) -> None:
        """Count these in."""
        for skip in skips:
            self.counts[skip.reason] += 1
            self.first.setdefault(skip.reason, skip.key)

    def __str__(self) -> str:
        """One line: counts and first keys."""
        parts = (f"{n} {reason}, the first {self.first[reason]}" for reason, n in self.items())
        return "; ".join(parts) or "none"

    def items(self) -> list[tuple[str, int]]:
        """Reasons and counts, most frequent first."""
        return self.counts.most_common()

    def warn_once(self) -> None:
        """One warning for all epochs, if there is anything to say."""
        if self.total and not self._said:
            self._said = True
            warnings.warn(
                f"{self.total} samples were skipped{self._instead}: {self}",
                SkippedSampleWarning,
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return {"counts": dict(self.counts), "first": dict(self.first), "said": self._said}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go there."""
        self.counts, self.first = Counter(state["counts"]), dict(state["first"])
        self._said = state["said"]

    def sum_up(self, states: Iterable[dict[str, Any]]) -> None:
        """Add up what several have counted."""
        self.counts, self.first, self._said = Counter(), {}, False
        for state in states:
            self.counts.update(state["counts"])
            self.first = {**state["first"], **self.first}
            self._said = self._said or state["said"]
