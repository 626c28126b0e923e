"""What a number means: everything that was chosen to compute it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shapwrap._version import __version__


def versions() -> str:
    """What computed a number."""
    return f"shapwrap {__version__}, torch {torch.__version__}"


@dataclass(frozen=True)
class Protocol:
    """All choices behind a result, in words; `print` it beside every number."""

    metric: str
    """What was computed."""
    settings: Mapping[str, str]
    """Each choice, by name."""

    @classmethod
    def of(cls, metric: str, settings: Mapping[str, str]) -> "Protocol":
        """These settings, followed by the versions of torch and shapwrap."""
        return cls(metric, dict(settings) | {"versions": versions()})

    def __str__(self) -> str:
        width = max(map(len, self.settings))
        lines = [f"  {name:<{width}}  {value}" for name, value in self.settings.items()]
        return "\n".join([f"protocol of {self.metric}", *lines])


class ItemScores(dict[str, Tensor]):
    """One number an item, by metric, with the protocol; `print` shows the means."""

    def __init__(self, values: Mapping[str, Tensor], *, protocol: Protocol):
        super().__init__(values)
        self.protocol = protocol
        """Everything that was chosen."""

    def undefined(self) -> dict[str, int]:
        """Items without a number (NaN), by metric."""
        return {name: int(torch.isnan(values).sum()) for name, values in self.items()}

    def mean(self) -> dict[str, float]:
        """Mean over items by metric, items without a number left out; NaN if none has one."""
        # In double precision, where clamped log-odds do not overflow; not every device has it.
        return {name: values.cpu().double().nanmean().item() for name, values in self.items()}

    def _item(self, metric: str) -> str:
        """What there is one number of, in the plural."""
        return "images"

    def __str__(self) -> str:
        lines = []
        undefined = self.undefined()
        for name, mean in self.mean().items():
            left_out = f", {undefined[name]} undefined" if undefined[name] else ""
            lines.append(
                f"{name} {mean:.4f} (mean of {len(self[name])} {self._item(name)}{left_out})"
            )
        return "\n".join([*lines, str(self.protocol)])


class Scores(ItemScores):
    """One number an image, by metric, with the curves behind them and the protocol."""

    def __init__(
        self,
        values: Mapping[str, Tensor],
        *,
        curves: Mapping[str, Tensor],
        fractions: Tensor,
        protocol: Protocol,
    ):
        super().__init__(values, protocol=protocol)
        self.curves = dict(curves)
        """One row of points an image, [B, S], by name."""
        self.fractions = fractions
        """Share of the cells at each point, float [S]."""
