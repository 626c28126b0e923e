"""The FAISS example and the page on evaluation, on a few images and a small model."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

open_clip = pytest.importorskip("open_clip")

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "retrieval_faiss.py"
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 8},
    "text_cfg": {"vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture
def small_model(tmp_path):
    path = tmp_path / "small-clip.json"
    path.write_text(json.dumps(CONFIG))
    return path


def pictures(num=7):
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for _ in range(num):
        blocks = torch.randint(256, (4, 6, 3), generator=generator, dtype=torch.uint8)
        yield Image.fromarray(blocks.numpy()).resize((60, 40), Image.Resampling.NEAREST)


def run(*arguments, code=None):
    command = [str(EXAMPLE)] if code is None else ["-c", code, str(EXAMPLE)]
    return subprocess.run(
        [sys.executable, *command, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def expected(config, paths, query):
    """Names from the most similar on, without an index."""
    from PIL import Image

    from shapwrap import ShapleyCLIP

    open_clip.add_model_config(config)
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms(config.stem)
    clip = ShapleyCLIP(model.eval())
    tokens = open_clip.get_tokenizer(config.stem)([query])
    with torch.no_grad():
        text = clip.encode_text(tokens, normalize=True)[0]
        scores = {
            path.name: float(clip.encode_image(preprocess(Image.open(path))[None])[0] @ text)
            for path in paths
        }
    return sorted(scores.items(), key=lambda item: -item[1])


def test_the_example_is_short():
    lines = EXAMPLE.read_text().splitlines()
    assert len(lines) < 120
    assert sum(line.startswith("# %%") for line in lines) >= 5


def test_hits_of_a_folder_and_of_a_shard(tmp_path, small_model):
    pytest.importorskip("faiss")
    folder = tmp_path / "photographs"
    folder.mkdir()
    paths = [folder / f"{i}.png" for i in range(7)]
    for path, picture in zip(paths, pictures(), strict=True):
        picture.save(path)
    ranking = expected(small_model, paths, "a red square")
    (folder / "broken.jpg").write_bytes(b"no image")
    shard = tmp_path / "shard.tar"
    with tarfile.open(shard, "w") as tar:
        for path in [*sorted(folder.iterdir())]:
            for name in (path.name, f"{path.stem}.json"):
                content = path.read_bytes() if name == path.name else b'{"captions": []}'
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    options = ("--config", small_model, "--query", "a red square", "--hits", 3, "--batch-size", 3)
    for source in (folder, shard):
        done = run(source, *options, "--out", tmp_path / source.stem, "--device", "cpu")
        assert done.returncode == 0, done.stderr[-2000:]
        assert "left out" in done.stdout and "broken.jpg" in done.stdout
        table = json.loads((tmp_path / source.stem / "hits.json").read_text())
        assert [Path(row["image"]).name for row in table] == [name for name, _ in ranking[:3]]
        for row, (_, similarity) in zip(table, ranking, strict=False):
            assert row["similarity"] == pytest.approx(similarity, abs=1e-5)
            assert row["sum_of_patches"] == pytest.approx(similarity, abs=1e-5)
        assert (tmp_path / source.stem / "hits.png").stat().st_size > 0


def test_without_faiss():
    code = """
import runpy
import sys
sys.modules["faiss"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    done = run("folder", "--query", "a cat", code=code)
    assert done.returncode != 0
    assert "MissingDependencyError" in done.stderr
    assert "pip install 'shapwrap[retrieval]'" in done.stderr


def test_the_page_runs(small_model):
    pytest.importorskip("torchmetrics")
    open_clip.add_model_config(small_model)
    page = (ROOT / "docs" / "clip-evaluation.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    assert len(blocks) >= 4
    namespace = {}
    for block in blocks:
        small = block.replace("ViT-B-16", small_model.stem).replace("224", "32")
        exec(compile(small, "clip-evaluation.md", "exec"), namespace)
    assert "protocol of insertion and deletion" in str(namespace["curves"])
