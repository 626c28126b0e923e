"""The blocks of docs/plug-ins.md run, in order, and say what the page says."""

import re
from pathlib import Path

import numpy as np
import pytest

PAGE = Path(__file__).parents[1] / "docs" / "plug-ins.md"


def test_blocks_run(capsys):
    for package in ("captum", "shapiq", "quantus"):
        pytest.importorskip(package, exc_type=ImportError)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 4
    names = {}
    np.random.seed(0)  # noqa: NPY002 (Quantus draws from the global state)
    for number, block in enumerate(blocks):
        exec(compile(block, f"{PAGE.name}, block {number}", "exec"), names)
    assert names["wrapped"].grid == (2, 3)
    assert names["attributions"].shape == names["images"].shape
    assert float(names["delta"].abs().max()) < 1e-4
    assert names["smooth"].shape == names["images"].shape
    assert np.isfinite(names["scores"]).all()
    np.testing.assert_allclose(names["maps"][:, 0], names["attributions"].sum(1), atol=1e-6)
    assert len(names["values"]) == 4
    assert names["exact"].n_players == names["stored"].n_players == 6
    assert names["values"][0].baseline_value == names["wrapped"].baseline
    assert names["stored"].precomputed
    assert "torch.Size([4, 3, 32, 48])" in capsys.readouterr().out


def test_the_difference_is_that_of_the_example():
    (shown,) = re.findall(r"```diff\n(.*?)```", PAGE.read_text(), re.DOTALL)
    example = (PAGE.parents[1] / "examples" / "lightning_module.py").read_text()
    lines = [line.removesuffix("  # shapwrap").strip() for line in example.splitlines()]
    for line in shown.splitlines():
        if line.strip():
            assert line[1:].strip() in lines
    assert shown.count("\n+") + shown.startswith("+") == example.count("# shapwrap\n")
