"""What is known about one model after its checks."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

Outcome = Literal["wraps", "refused", "error", "failed"]
PASSED = "passed"


@dataclass
class Row:
    """One line of the compatibility table."""

    library: str
    name: str
    outcome: Outcome = "error"
    """"wraps": every check passed. "refused": a typed error says why not. "failed": it wraps and a
    check failed. "error": anything else was raised."""
    reason: str = ""
    """Why it is refused, which checks failed, or the error."""
    class_name: str = ""
    module: str = ""
    masking: str = ""
    readout: str = ""
    grid: tuple[int, int] | None = None
    image_size: tuple[int, int] | None = None
    parameters: int = 0
    """Of the full model."""
    shrunken: str = ""
    """How the instance that was checked is smaller than the model; "" for the model itself."""
    classifier: str = "own"
    """"own", or "given" for an encoder."""
    exact: bool = False
    """Whether the report claims the logits of the original model."""
    note: str = ""
    """The report's sentences."""
    efficiency_gap: float | None = None
    """|sum of phi - (logits - baseline)|, relative to the largest logit."""
    logit_difference: float | None = None
    """|wrapped - original logits|, relative to the largest logit."""
    other_size: str = ""
    """Grid at another, not square size, or who refuses it."""
    checks: dict[str, str] = field(default_factory=dict)
    """"passed", or what went wrong, by name of the check."""
    seconds: float = 0.0
    """Of the processor."""
    versions: str = ""
    seed: int = 0

    def failures(self) -> list[str]:
        """Checks that did not pass, with what went wrong."""
        return [f"{name}: {text}" for name, text in self.checks.items() if text != PASSED]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Row":
        """The row that `to_json` wrote; values of other versions are ignored."""
        known = {f.name for f in fields(cls)}
        row = cls(**{name: value for name, value in stored.items() if name in known})
        for name in ("grid", "image_size"):
            value = getattr(row, name)
            setattr(row, name, None if value is None else tuple(value))
        return row
