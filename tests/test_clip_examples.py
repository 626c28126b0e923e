"""The Flickr8k example trains and compares, on shards of the same layout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

for needed in ("open_clip", "webdataset", "accelerate"):
    pytest.importorskip(needed)

from tests.shards import sample, write_shard  # noqa: E402

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "clip"
SMALL = ("--size", "28", "--text-width", "64", "--batch-size", "4")


def run(script, *options):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}", "PYTHONWARNINGS": "default"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, options)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", ["train_flickr8k.py", "compare_flickr8k.py"])
def test_examples_are_short(script):
    assert len((EXAMPLES / script).read_text().splitlines()) <= 120


@pytest.mark.slow
def test_training_and_comparing(tmp_path):
    for split, numbers in (("train", range(8)), ("val", range(4)), ("test", range(5))):
        write_shard(tmp_path / f"{split}-00000.tar", [sample(number) for number in numbers])
    data, out = ("--data", tmp_path), tmp_path / "out"
    run("train_flickr8k.py", *data, "--out", out, "--epochs", "1", *SMALL)
    trained = json.loads((out / "training.json").read_text())
    assert trained["plain"].keys() < trained["shapley"].keys()
    run("compare_flickr8k.py", *data, "--runs", out, *SMALL)
    found = json.loads((out / "results.json").read_text())
    assert found["retrieval"]["chance"]["t2i_r@1"] == pytest.approx(1 / 5)
    assert found["retrieval"].keys() == {"chance", "plain", "wrapped", "shapley"}
    assert "**Ours**" in found["curves"] and "ECLIP" in found["curves"]
    assert all(0 <= value <= 1 for row in found["curves"].values() for value in row.values())
    tables = (out / "tables.md").read_text()
    assert tables.count("| ECLIP |") == 2
    for figure in ("maps.png", "maps-alone.png"):
        assert (out / figure).stat().st_size > 1000
