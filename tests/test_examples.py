"""The example, on a few images in the layout of the real data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"


def test_example_is_short():
    assert len((ROOT / "examples" / "finetune_imagenette.py").read_text().splitlines()) < 100


def _run(data, out, *options):
    subprocess.run(
        [
            *(sys.executable, str(ROOT / "examples" / "finetune_imagenette.py")),
            *("--data", str(data), "--weights", str(SHARED / "weights"), "--out", str(out)),
            *("--train-images", "20", "--val-images", "10", "--epochs", "1", *options),
        ],
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    return json.loads((out / "results.json").read_text())


def test_efficientnet_on_pictures_in_imagenettes_layout(tmp_path):
    from PIL import Image
    from torchvision.datasets import Imagenette

    for split in ("train", "val"):
        for index, name in enumerate(Imagenette._WNID_TO_CLASS):
            folder = tmp_path / "imagenette2-160" / split / name
            folder.mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (200, 160), (20 * index, 100, 99 * number)).save(
                    folder / f"{number}.JPEG"
                )
    options = ("--models", "efficientnet_lite0", "--shapley-weights", "1")
    table = _run(tmp_path, tmp_path / "out", *options, "--learning-rates", "1e-4")
    assert {"efficientnet_lite0, plain", "efficientnet_lite0, shapley"} <= table.keys()
    assert table["efficientnet_lite0, shapley"]["images"] == 10
    assert (tmp_path / "out" / "efficientnet_lite0.png").exists()


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared, with Imagenette and ViT weights")
def test_vit_on_imagenette(tmp_path):
    options = ("--models", "vit_small_patch14", "--shapley-weights", "1", "--size", "56")
    table = _run(SHARED / "data", tmp_path, *options, "--learning-rates", "5e-5")
    assert table["vit_small_patch14, shapley"]["skill"] <= 1


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared, with ViT weights")
def test_pretrained_vit_is_wrapped_by_token_removal():
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        from finetune_imagenette import make_model
    finally:
        sys.path.pop(0)
    report = make_model("vit_small_patch14", 112, SHARED / "weights").report()
    assert report.masking == "token-removal"
    assert report.grid == (8, 8)
