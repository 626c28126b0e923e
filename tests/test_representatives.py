"""The smallest model of every timm module, torchvision class and open_clip tower, checked as a row.

`shapwrap zoo` does the same for all models; docs/compatibility.md holds what it found.
"""

from pathlib import Path

import pytest
import timm
import torchvision

from shapwrap.zoo.catalogue import ModelName
from shapwrap.zoo.survey import survey_model

LISTED = (Path(__file__).parent / "representatives.txt").read_text().split()
NAMES = [ModelName(*line.split(":")) for line in LISTED]
MADE_FOR = {"timm": "1.0.31", "torchvision": "0.29.1"}


@pytest.mark.parametrize("name", NAMES, ids=LISTED)
def test_every_check_of_a_row_holds(name):
    pytest.importorskip(name.library)
    row = survey_model(name)
    assert row.outcome == "wraps", row.reason
    assert len(row.checks) >= 10 and set(row.checks.values()) == {"passed"}, row.checks


@pytest.mark.skipif(timm.__version__ != MADE_FOR["timm"], reason="the list is of another version")
def test_every_module_of_timm_is_listed():
    modules = {timm.models.model_entrypoint(name).__module__ for name in timm.list_models()}
    listed = [name.name for name in NAMES if name.library == "timm"]
    assert {timm.models.model_entrypoint(name).__module__ for name in listed} == modules


@pytest.mark.skipif(
    not torchvision.__version__.startswith(MADE_FOR["torchvision"]),
    reason="the list is of another version",
)
def test_every_class_of_torchvision_is_listed():
    builders = [
        torchvision.models.get_model_builder(name)
        for name in torchvision.models.list_models(module=torchvision.models)
    ]
    listed = [name.name for name in NAMES if name.library == "torchvision"]
    found = {torchvision.models.get_model_builder(name).__module__ for name in listed}
    assert found == {builder.__module__ for builder in builders}
