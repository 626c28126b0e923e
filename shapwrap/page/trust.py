"""What an audit says about an image's values, in words for a person who reads the map."""

import math
from typing import NamedTuple

from shapwrap.audit import Audit

LOW, HIGH = 0.5, 0.9
"""Below LOW at least half of an even spread's error is left, above HIGH at most a tenth."""

ADDING_UP = (
    "That they add up says nothing about it: they do for every model, trained to explain itself "
    "or not."
)


class Trust(NamedTuple):
    """How far the values of one image can be trusted."""

    level: str
    """"unmeasured", "low", "fair" or "high"."""
    text: str


def trust_of(audit: Audit | None, row: int, method: str) -> Trust:
    """The words for one image.

    Args:
        audit: Residuals of all images, if measured.
        row: Which of them.
        method: What made the values.
    """
    if audit is None:
        return Trust(
            "unmeasured",
            "Nobody has checked on this image how well the patch values predict what the model "
            f"says when patches are hidden. {ADDING_UP}"
            + (" wrapped.audit(images) measures it." if method == "shapley" else ""),
        )
    skill = float(audit.skill[row])
    if not math.isfinite(skill):
        return Trust(
            "unmeasured",
            "Skill is not defined here: spreading the logits evenly over the patches already "
            "predicts perfectly what the model says when patches are hidden.",
        )
    taken = (
        f"Tested on {audit.num_coalitions} random sets of hidden patches, over all classes, the "
        "patch values "
    )
    if skill <= 0:
        return Trust(
            "low",
            f"{taken}predict what the model then says no better than spreading the logits evenly "
            f"over the patches. Do not read this map as what the model looks at. {ADDING_UP}",
        )
    taken += (
        f"take away {_percent(skill)} of the error that spreading the logits evenly over the "
        "patches would make. "
    )
    if skill < LOW:
        return Trust("low", f"{taken}Most of it is left: take this map as a hint, not as evidence.")
    if skill < HIGH:
        return Trust("fair", f"{taken}Large values can be relied on; do not rank similar ones.")
    return Trust("high", f"{taken}They predict well what hiding patches does to this model.")


def _percent(share: float) -> str:
    # 100 % would say that nothing is left.
    return f"{min(100 * share, 99.9):.1f} %" if share > 0.99 else f"{100 * share:.0f} %"
