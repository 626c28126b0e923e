"""The examples of a training step: short, at most ten lines added, and both versions learn."""

import ast
import difflib
import runpy
from pathlib import Path

import pytest
import torch

from shapwrap import ShapleyWrapper

EXAMPLES = Path(__file__).parents[1] / "examples"
MARK = "# shapwrap"
# The unadorned version, and the one that explains itself.
PAIRS = {
    "plain_pytorch.py": ("train_plainly", "train"),
    "lightning_module.py": ("Classifier", "SelfExplainingClassifier"),
}

needs_its_package = {
    "plain_pytorch.py": (),
    "lightning_module.py": ("lightning",),
}


def body(source, name):
    """The lines of a function or a class but the first, which names it, and docstrings."""
    (node,) = (n for n in ast.parse(source).body if getattr(n, "name", None) == name)
    lines = source.splitlines()[node.lineno : node.end_lineno]
    return [line for line in lines if not line.strip().startswith('"""')]


@pytest.mark.parametrize("name", PAIRS)
def test_at_most_ten_lines_are_added_and_all_are_marked(name):
    source = (EXAMPLES / name).read_text()
    assert len(source.splitlines()) < 120
    assert source.count("# %%") >= 4
    before, after = (body(source, part) for part in PAIRS[name])
    difference = [line for line in difflib.ndiff(before, after) if line[0] in "+-"]
    added = [line[2:] for line in difference if line[0] == "+"]
    imported = [line for line in source.splitlines() if line.startswith("from shapwrap")]
    assert all(line.endswith(MARK) for line in added + imported)
    assert source.count(MARK + "\n") == len(added) + len(imported)
    assert 4 <= len(added) + len(imported) <= 10
    assert any("shapley_loss(output)" in line for line in added)
    # What goes: the call that the new one replaces, and where a model was kept as it was.
    gone = [line[2:].strip() for line in difference if line[0] == "-"]
    assert len(gone) <= 2
    assert all("model" in line for line in gone)
    kept = [line for line in after if not line.endswith(MARK)]
    assert kept == [line for line in before if line.strip() not in gone]
    # Somebody's version knows nothing of this library.
    assert not any(word in "\n".join(before).lower() for word in ("shapley", "coalition"))


@pytest.mark.filterwarnings(
    # Lightning asks for worker processes, which a few tensors in memory do not need,
    "ignore:.*does not have many workers:UserWarning",
    # complains of a device that the example leaves alone on purpose,
    "ignore:.*GPU available but not used:UserWarning",
    # and calls functions of torch that torch has renamed.
    "ignore:.*LeafSpec.*:FutureWarning",
    "ignore:.*LeafSpec.*:DeprecationWarning",
)
@pytest.mark.parametrize("name", PAIRS)
def test_both_versions_learn_and_one_explains_itself(name, tmp_path, monkeypatch, capsys):
    for package in needs_its_package[name]:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    made = runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert list(tmp_path.iterdir()) == []
    results = made["results"]
    chance = 1 / 3
    for which in ("plain", "shapley"):
        assert results[which]["accuracy"] > 2 * chance
    assert results["plain"]["skill"] < 0.2
    assert results["shapley"]["skill"] > 0.5
    printed = capsys.readouterr().out
    assert "plain: accuracy" in printed and "shapley: accuracy" in printed
    # The values sum to the logit, and the largest is that of the square that makes the class.
    wrapped, images, labels = made["wrapped"], made["images"], made["labels"]
    assert isinstance(wrapped, ShapleyWrapper)
    explanation = wrapped.explain(images, labels)
    assert float(explanation.efficiency_gap().max()) < 1e-3
    brightness = images[torch.arange(64), labels]
    cells = brightness.unflatten(1, (4, 16)).unflatten(3, (4, 16)).mean((2, 4)).flatten(1)
    hits = (explanation.values.argmax(1) == cells.argmax(1)).float().mean()
    assert float(hits) > 0.5
