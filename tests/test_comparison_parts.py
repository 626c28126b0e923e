"""Parts of a comparison: configuration, store, tables, data, settings of methods that learn."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shapwrap import metrics
from shapwrap.comparison import compare, parse_config, read_config
from shapwrap.comparison import config as configuration
from shapwrap.comparison.datasets import (
    UNTOUCHED,
    digits,
    folder,
    imagenet_s,
    imagenet_segmentation,
    imagenette,
    pet,
)
from shapwrap.comparison.methods import applies, class_of, trained_config
from shapwrap.comparison.registry import METHODS, find_method, load
from shapwrap.comparison.results import Comparison, MethodRow, ModelRow, Outcome
from shapwrap.comparison.store import Piece, Store, differences, digest
from shapwrap.comparison.summary import Measured, jackknife_error
from shapwrap.comparison.tables import markdown
from shapwrap.errors import ArgumentError, ConfigurationError
from shapwrap.training.config import TrainerConfig
from tests import fake_metrics

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples" / "compare").glob("*.yaml"))
SMALL = {
    "data": {"kind": "digits"},
    "models": ["resnet18"],
    "methods": ["random"],
    "metrics": ["faithfulness"],
}

# --- configuration --------------------------------------------------------------------------------


def test_defaults_and_short_forms():
    made = parse_config(
        {
            "data": {"kind": "digits", "image_size": 96},
            "models": ["resnet18", {"name": "b", "kind": "wrapped", "training": {"epochs": 1}}],
            "methods": ["random", {"name": "r2", "method": "random", "models": ["b"]}],
            "metrics": {"faithfulness": None, "mean": {"metric": "faithfulness", "fill": "mean"}},
        }
    )
    assert made.data.image_size == (96, 96)
    assert made.models[0].model == "resnet18" and made.models[0].kind == "plain"
    assert made.models[1].training == ({"epochs": 1},)
    assert [method.method for method in made.methods] == ["random", "random"]
    assert made.metrics[1].options == {"fill": "mean"}
    assert made.metrics[1].metric == made.metrics[0].metric == "faithfulness"
    assert parse_config(SMALL).device == "auto"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dat": 1}, ("unknown key 'dat'", "did you mean 'data'", "Known: data, models")),
        ({"data": {"kind": "a", "rot": "x"}}, ("data: unknown key 'rot'", "mean 'root'")),
        ({"data": {}}, ("data has no 'kind'",)),
        ({"data": "digits"}, ("data is 'digits'; expected keys",)),
        ({"data": {"kind": "a", "image_size": [1, 2, 3]}}, ("data.image_size", "[rows, columns]")),
        ({"data": {"kind": "a", "eval_images": 0}}, ("data.eval_images is 0",)),
        ({"data": {"kind": "a", "accuracy_images": 0}}, ("data.accuracy_images is 0",)),
        ({"models": []}, ("models is empty",)),
        ({"models": "resnet18"}, ("models is 'resnet18'; expected a list",)),
        ({"models": ["a", "A"]}, ("2 of them are called 'a'",)),
        ({"models": [{"name": "a", "kind": "wraped"}]}, ("models[0].kind", "mean 'wrapped'")),
        ({"models": [{"name": "a", "trainig": {}}]}, ("models[0]", "mean 'training'")),
        ({"models": [{"name": "a", "mean": [1, 2, 3]}]}, ("one of mean and std",)),
        ({"models": [{"name": "a", "wrapper": {"masking": "auto"}}]}, ("kind: wrapped",)),
        (
            {"models": [{"name": "a", "weights": "x", "pretrained": True}]},
            ("models.a", "expected one source"),
        ),
        ({"models": [{"name": "a", "checkpoint": "x", "training": {}}]}, ("is finished",)),
        ({"models": ["a", {"name": "b", "start": "c"}]}, ("b.start: unknown key 'c'", "Known: a")),
        ({"models": [{"name": "b", "start": "a"}, "a"]}, ("Known: none",)),
        ({"methods": [{"name": "m", "models": ["b"]}]}, ("unknown key 'b'", "resnet18")),
        ({"methods": [{"method": "random"}]}, ("methods[0] has no 'name'",)),
        ({"metrics": 3}, ("metrics is 3",)),
        ({"metrics": {"cost": {"images": 0}}}, ("metrics.cost.images is 0",)),
        ({"seed": "x"}, ("seed is 'x'; expected a whole number",)),
        ({"seed": True}, ("seed is True",)),
        ({"chunk_size": 0}, ("chunk_size is 0",)),
        ({"figures": {"images": -1}}, ("figures.images is -1",)),
    ],
)
def test_what_cannot_be_meant(change, words):
    with pytest.raises(ConfigurationError) as error:
        parse_config({**SMALL, **change})
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("section", ["data", "models", "methods", "metrics"])
def test_missing_sections(section):
    with pytest.raises(ConfigurationError, match=f"has no '{section}'"):
        parse_config({name: part for name, part in SMALL.items() if name != section})


def test_reading_a_file(tmp_path):
    with pytest.raises(ConfigurationError, match="is no file"):
        read_config(tmp_path / "nothing.yaml")
    path = tmp_path / "c.yaml"
    path.write_text("data: [")
    with pytest.raises(ConfigurationError, match="is no YAML"):
        read_config(path)
    path.write_text("- a")
    with pytest.raises(ConfigurationError, match=r"c\.yaml: the configuration is \['a'\]"):
        read_config(path)
    path.write_text("!!python/object/apply:os.getcwd []")
    with pytest.raises(ConfigurationError, match="is no YAML"):
        read_config(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"methods": ["randm"]}, "did you mean 'random'"),
        ({"metrics": ["faithful"]}, "did you mean 'faithfulness'"),
        ({"data": {"kind": "digit"}}, "did you mean 'digits'"),
        ({"methods": ["no.such:thing"]}, "cannot be imported"),
        ({"methods": [{"name": "random", "options": {"gird": 3}}]}, "did you mean 'grid'"),
        ({"models": [{"name": "a", "weights": "nothing.pth"}]}, "which is no file"),
        ({"models": [{"name": "a", "training": {"epoch": 1}}]}, "did you mean 'epochs'"),
        ({"models": [{"name": "a", "training": {"shapley_weight": 1}}]}, "unknown key"),
        ({"models": [{"name": "a", "training": {"batch_size": 0}}]}, "batch_size is 0"),
        ({"device": "abacus"}, "cannot be used here"),
        ({"data": {"kind": "folder"}}, "needs root"),
    ],
)
def test_errors_before_anything_runs(tmp_path, change, words):
    with pytest.raises(ConfigurationError, match=words):
        compare({**SMALL, **change}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_trainers_refuse_before_anything_runs(tmp_path):
    models = [{"name": "resnet18", "training": {"epochs": 0}}]
    with pytest.raises(ArgumentError, match="epochs is 0"):
        compare({**SMALL, "models": models}, out=tmp_path / "out")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_read(path):
    made = read_config(path)
    for method in made.methods:
        find_method(method.method)
        assert any(applies(method, model) for model in made.models)
    for model in made.models:
        for stage in model.training:
            values = {name: stage[name] for name in stage if name != "batch_size"}
            assert {field.name for field in dataclasses.fields(TrainerConfig)} >= values.keys()


@pytest.mark.parametrize("name", METHODS)
def test_known_methods_exist(name):
    module, _, attribute = METHODS[name].path.partition(":")
    found = __import__(module, fromlist=["x"])
    if not hasattr(found, attribute):
        pytest.skip(f"{module} has no {attribute} yet")
    assert callable(load(METHODS[name].path))


def test_which_models_a_method_explains():
    made = parse_config(
        {
            **SMALL,
            "models": ["a", {"name": "b", "kind": "wrapped"}],
            "methods": [
                "shapley",
                "random",
                {"name": "plain", "method": "random", "models": "plain"},
                {"name": "named", "method": "random", "models": ["b"]},
                {"name": "one", "method": "shapley", "models": "b"},
            ],
        }
    )
    found = {m.name: [x.name for x in made.models if applies(m, x)] for m in made.methods}
    expected = {"shapley": ["b"], "random": ["a", "b"], "plain": ["a"], "named": ["b"]}
    assert found == {**expected, "one": ["b"]}


# --- methods that learn ---------------------------------------------------------------------------


SEVEN, THREE = TrainerConfig(epochs=7), TrainerConfig(epochs=3)


@dataclasses.dataclass(frozen=True)
class TwoStages:
    first: TrainerConfig | None = SEVEN
    second: TrainerConfig = THREE
    masks: int = 4


class TwoStageMethod:
    config: TwoStages

    def __init__(self, model, *, config=None):
        pass

    def fit(self, data, *, resume=False): ...
    def state_dict(self): ...
    def load_state_dict(self, state): ...


def test_settings_of_a_method_that_learns(tmp_path):
    def method(**training):
        return configuration.MethodConfig("two", "two", training=training)

    given = method(masks=8, first={"epochs": 2, "learning_rate": "1e-3"}, batch_size=4)
    made = trained_config(TwoStageMethod, given, seed=5, folder=tmp_path, progress=False)
    assert made.masks == 8
    assert (made.first.epochs, made.second.epochs) == (2, 3)
    assert made.first.learning_rate == 1e-3
    assert made.first.seed == made.second.seed == 5
    assert made.second.output_dir == tmp_path / "second"
    made = trained_config(TwoStageMethod, method(first=None), seed=0, folder=None, progress=None)
    assert made.first is None
    for bad, words in (
        ({"mask": 2}, "did you mean 'masks'"),
        ({"masks": "x"}, "expected a whole number"),
        ({"second": {"epoch": 2}}, "did you mean 'epochs'"),
        ({"second": 3}, "expected keys and values"),
        ({"batch_size": 0}, "batch_size is 0"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            class_of(method(**bad), {"two": TwoStageMethod})


# --- store ----------------------------------------------------------------------------------------


def test_store_round_trip(tmp_path):
    notes = []
    store = Store(tmp_path, notes.append)
    made_from = {"a": (1, 2), "b": {"c": 0.5}}
    assert store.read("x", "My Model", made_from=made_from) is None
    tied = torch.arange(6.0).view(2, 3)
    piece = Piece("finished", made_from, {"n": math.nan, "x": 1e-300})
    store.write("x", "My Model", piece=piece, tensors={"t": tied.T, "same": tied})
    found = store.read("x", "My Model", made_from=made_from)
    assert found is not None and found.result == {"n": None, "x": 1e-300}
    assert torch.equal(store.tensors("x", "My Model")["t"], tied.T)
    assert notes == []
    assert store.read("x", "My Model", made_from={"a": (1, 2), "b": {"c": 0.6}}) is None
    assert "other settings (b.c)" in notes[0]
    assert not list(tmp_path.rglob("*.partial"))


def test_tensors_of_a_killed_write_are_not_read(tmp_path, monkeypatch):
    store = Store(tmp_path, lambda note: None)
    store.write("m", piece=Piece("finished", {"v": 1}), tensors={"t": torch.zeros(1)})

    def killed(path, content):
        raise KeyboardInterrupt

    monkeypatch.setattr("shapwrap.comparison.store.write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        store.write("m", piece=Piece("finished", {"v": 2}), tensors={"t": torch.ones(1)})
    assert store.read("m", made_from={"v": 1}) is None


def test_working_folder(tmp_path):
    store = Store(tmp_path, lambda note: None)
    folder_, begun = store.working_folder("m", made_from={"v": 1})
    assert not begun
    (folder_ / "checkpoint").write_text("x")
    assert store.working_folder("m", made_from={"v": 1}) == (folder_, True)
    assert (folder_ / "checkpoint").exists()
    assert store.working_folder("m", made_from={"v": 2}) == (folder_, False)
    assert not (folder_ / "checkpoint").exists()


def test_differences_and_digest():
    assert differences({"a": 1, "b": {"c": [1]}}, {"a": 1, "b": {"c": [1]}}) == []
    assert differences({"a": 1}, {"a": 2, "b": 1}) == ["a", "b"]
    assert differences({"a": {"b": 1}}, {"a": {"b": None}}) == ["a.b"]
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})


# --- numbers --------------------------------------------------------------------------------------


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=12))
def test_jackknife_of_a_mean_is_its_standard_error(values):
    rows = torch.tensor([[value, 1.0] for value in values], dtype=torch.float64)
    error = jackknife_error(rows, lambda sums: float(sums[0] / sums[1]))
    expected = np.std(values, ddof=1) / math.sqrt(len(values))
    assert error == pytest.approx(expected, abs=1e-9)


def test_numbers_that_are_not_defined():
    measured = Measured()
    measured.add_images({"a": torch.tensor([1.0, math.nan, 3.0]), "b": torch.tensor([math.nan])})
    assert measured.summary["a"] == 2.0 and measured.undefined == {"a": 1, "b": 1}
    assert measured.errors["a"] == pytest.approx(1.0)
    assert math.isnan(measured.summary["b"]) and math.isnan(measured.errors["b"])
    assert math.isnan(jackknife_error(torch.ones(1, 2), lambda sums: 1.0))


def test_tables_by_hand():
    def outcome(**numbers):
        return Outcome("finished", summary=numbers, errors=dict.fromkeys(numbers, 0.01))

    rows = [
        MethodRow(
            "A", "plain", name, "finished", metrics={"faithfulness": outcome(aopc=a, log_odds=b)}
        )
        for name, a, b in (("x", 0.5, -2.0), ("y|z", 0.5001, -1.0), ("w", math.nan, 3.0))
    ]
    rows.append(MethodRow("A", "plain", "v", "not applicable", "a\nreason"))
    models = [
        ModelRow("A", "plain", "finished", "", 0.75, 0.02, 22_000_000, 1_500_000_000, None, 400),
        ModelRow("B", "wrapped", "finished", "", None, None, 3_400_000, 10**8, 2 * 10**8),
    ]
    run = {"versions": {"torch": "2"}, "device": "cpu", "command": "c", "date": "d", "images": 9}
    text = markdown(Comparison(parse_config(SMALL), models, rows, run, Path("out")))
    lines = text.splitlines()
    assert "| A | plain | 75.0 ± 2.0 | 22.0 M | 1.50 G |" in lines
    assert "Accuracy on 400 images. Multiply-adds" in text
    assert "| B | wrapped | – | 3.4 M | 0.20 G |" in lines
    assert "| A | x | **0.500** ± 0.010 | **-2.000** ± 0.010 | – |" in lines
    assert "| A | y\\|z | **0.500** ± 0.010 | -1.000 ± 0.010 | – |" in lines
    assert "| A | w | – | 3.000 ± 0.010 | – |" in lines
    assert "- A, v: not applicable: a reason" in lines


# --- data -----------------------------------------------------------------------------------------


def test_digits_are_in_range_and_their_masks_are_the_evidence():
    data = digits(configuration.DataConfig("digits", image_size=(48, 64), eval_images=5), seed=2)
    batches = list(data.batches(2))
    assert [len(batch.image) for batch in batches] == [2, 2, 1]
    images = torch.cat([batch.image for batch in batches])
    assert images.shape == (5, 3, 48, 64) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1 and images.std() > 0.1
    masks = torch.cat([batch.mask for batch in batches])
    assert set(masks.unique().tolist()) == {0, 1}
    assert [len(batch.image) for batch in data.batches(2, limit=3)] == [2, 1]
    assert [len(batch.image) for batch in data.test_batches(4)] == [4, 1]
    loader = data.training_batches(configuration_statistics(), 4)
    batch, labels = next(iter(loader))
    assert batch.shape == (4, 3, 48, 64) and batch.min() < -0.9 and labels.dtype == torch.int64


def test_accuracy_may_be_measured_on_more_images():
    config = configuration.DataConfig(
        "digits", image_size=(48, 64), eval_images=2, accuracy_images=7
    )
    data = digits(config, seed=2)
    assert len(data) == 2
    assert sum(len(batch.image) for batch in data.test_batches(4)) == 7
    explained, tested = next(iter(data.batches(2))), next(iter(data.test_batches(4)))
    assert torch.equal(explained.image, tested.image[:2])


def configuration_statistics():
    return type(UNTOUCHED)((0.5,) * 3, (0.5,) * 3)


def test_folder(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(5):
            Image.new("RGB", (40, 30), (50 * number, 0, 0)).save(tmp_path / name / f"{number}.png")
    config = configuration.DataConfig("folder", str(tmp_path), (16, 16), 4, 1)
    data = folder(config, 0)
    assert (len(data), data.class_names, data.masks) == (1, ["cat", "dog"], False)
    assert len(data.train) == 4
    batch = next(data.batches(8))
    assert batch.mask is None and batch.image[0, 0].unique().tolist() == [0.0]


def test_pets_with_some_of_the_breeds(tmp_path):
    """Trimap 1 is the animal, 2 the background, 3 the border; breeds are numbered anew."""
    root = tmp_path / "oxford-iiit-pet"
    (root / "images").mkdir(parents=True)
    (root / "annotations" / "trimaps").mkdir(parents=True)
    lines = []
    for index, (name, breed) in enumerate((("Abyssinian_1", 1), ("beagle_7", 5))):
        pixels = np.full((20, 30, 3), 100 + 100 * index, dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{name}.jpg")
        trimap = np.full((20, 30), 2, dtype=np.uint8)
        trimap[:10], trimap[:, 20:] = 1, 3
        Image.fromarray(trimap).save(root / "annotations" / "trimaps" / f"{name}.png")
        lines.append(f"{name} {breed} 1 1")
    for split in ("trainval", "test"):
        (root / "annotations" / f"{split}.txt").write_text("\n".join(lines))
    data = pet(configuration.DataConfig("pet", str(tmp_path), (10, 15)), 0)
    assert data.class_names == ["Abyssinian", "Beagle"] and data.masks
    batch = next(data.batches(4))
    assert batch.label.tolist() == [0, 1]
    assert batch.image[1].mean().item() == pytest.approx(200 / 255, abs=0.01)
    expected = torch.zeros(10, 15, dtype=torch.long)
    expected[:5], expected[:, 10:] = 1, -1
    assert torch.equal(batch.mask[0], expected)
    image, label = data.train[1][:2]
    assert image.shape == (3, 10, 15) and label == 1


@pytest.mark.parametrize("kind", [imagenet_s, imagenet_segmentation])
def test_segmentation_sets_have_no_labels_and_nothing_to_train_on(kind, monkeypatch, tmp_path):
    class Pairs(torch.utils.data.Dataset):
        def __init__(self, root, *, image_size, normalization, split="validation"):
            assert (root, normalization, split) == ("somewhere", UNTOUCHED, "test")
            self.size = image_size

        def __len__(self):
            return 4

        def __getitem__(self, index):
            return torch.full((3, *self.size), index / 4), torch.ones(self.size).long()

    monkeypatch.setattr("shapwrap.comparison.datasets.load", lambda path: Pairs)
    config = configuration.DataConfig(
        "s", "somewhere", (48, 64), eval_images=2, options={"split": "test"}
    )
    data = kind(config, 0)
    batch = next(data.batches(4))
    assert (len(data), len(data.train), data.masks) == (2, 0, True)
    assert batch.label.tolist() == [-1, -1] and batch.mask.shape == (2, 48, 64)
    assert batch.image[:, 0, 0, 0].tolist() == [0.0, 0.5]
    own = {"data": {"s": lambda config, seed: data}, "progress": False}
    changes = {"data": {"kind": "s", "image_size": [48, 64]}, "metrics": ["cost"]}
    model = {"name": "a", "model": "tests.test_comparison:TinyCNN", "grid": 2}
    model |= {"mean": [0, 0, 0], "std": [1, 1, 1]}
    monkeypatch.setattr(metrics, "cost", fake_metrics.cost)
    settings = {**SMALL, **changes, "models": [model], "out": str(tmp_path)}
    settings["figures"] = {"images": 1}
    done = compare(settings, **own)
    assert done.failures() == [] and done.models[0].accuracy is None
    with pytest.raises(ConfigurationError, match="no images to train on"):
        compare({**settings, "models": [{**model, "training": {"epochs": 1}}]}, **own)


def test_data_that_is_not_there(tmp_path):
    for kind in (imagenette, pet):
        with pytest.raises(ConfigurationError, match="cannot be read"):
            kind(configuration.DataConfig("x", str(tmp_path)), 0)
    with pytest.raises(ArgumentError, match="is no folder"):
        folder(configuration.DataConfig("folder", str(tmp_path / "x")), 0)


def test_imagenette_layout(tmp_path):
    from torchvision.datasets import Imagenette

    for split in ("train", "val"):
        for index, name in enumerate(Imagenette._WNID_TO_CLASS):
            place = tmp_path / "imagenette2-160" / split / name
            place.mkdir(parents=True)
            Image.new("L", (40, 30), 20 * index).save(place / "0.JPEG")
    data = imagenette(configuration.DataConfig("imagenette", str(tmp_path), (16, 16), 4, 5), 0)
    assert len(data) == 5 and len(data.train) == 4 and data.class_names[0] == "tench"
    assert next(data.batches(8)).label.tolist() == [0, 2, 4, 6, 8]


# --- the real methods and metrics -----------------------------------------------------------------


def _available(path):
    module, _, name = path.partition(":")
    return hasattr(__import__(module, fromlist=["x"]), name)


REAL = ("faithfulness", "insertion_deletion", "predictor", "segmentation_statistics")
REAL += ("pointing_game", "cost", "shapley_truth")


@pytest.mark.slow
@pytest.mark.skipif(
    not all(_available(f"shapwrap.metrics:{name}") for name in REAL), reason="metrics are missing"
)
def test_with_the_real_metrics(tmp_path):
    vit = {"model": "tests.test_comparison:tiny_vit"}
    names = [name for name in METHODS if _available(METHODS[name].path)]
    short = {"epochs": 1, "max_steps": 1}
    training = {
        "vit-shapley": {"num_masks": 2, "surrogate": short, "explainer": short, "batch_size": 4},
        "fastshap": {"surrogate": short, "explainer": short, "width": 4, "batch_size": 4},
    }
    options = {
        "integrated-gradients": {"n_steps": 4},
        "idgi": {"n_steps": 4},
    }
    methods = [
        {
            "name": name,
            "models": {"shapley": "wrapped", "random": "all"}.get(name, "plain"),
            "options": options.get(name, {}),
            "training": training.get(name, {}),
        }
        for name in names
    ]
    done = compare(
        {
            "data": {
                "kind": "digits",
                "image_size": [48, 64],
                "train_images": 8,
                "eval_images": 3,
            },
            "models": [
                {"name": "ViT", **vit, "training": {"epochs": 1, "batch_size": 4}},
                {"name": "Ours", "kind": "wrapped", **vit, "training": {"epochs": 1}},
            ],
            "methods": methods,
            "metrics": {
                "faithfulness": {},
                "patches": {"metric": "faithfulness", "ranking": "patch", "fill": "mean"},
                "insertion_deletion": {"steps": 4},
                "localisation": {},
                "cost": {},
                "shapley_truth": {"images": 2},
            },
            "figures": {"images": 0, "curves": False},
            "out": str(tmp_path),
        },
        notify=lambda line: None,
        progress=False,
    )
    assert done.failures() == []
    rows = {(row.model, row.method): row for row in done.rows}
    ours = rows["Ours", "shapley"]
    assert ours.status == "finished"
    for metric, key in (
        ("faithfulness", "aopc"),
        ("patches", "saco"),
        ("insertion_deletion", "insertion"),
        ("localisation", "mean_iou"),
        ("cost", "forward_equivalents"),
        ("shapley_truth", "skill"),
    ):
        assert math.isfinite(ours.metrics[metric].summary[key])
    assert ours.facts["largest_efficiency_gap"] < 1e-4
    assert rows["ViT", "random"].metrics["shapley_truth"].status == "not applicable"
    assert all(row.status == "finished" for row in done.rows)
    assert json.loads((tmp_path / "results.json").read_text())["rows"]


@pytest.mark.parametrize(("trained", "controls"), [(4, 8), (11, 2), (None, 2)])
def test_accuracy_is_held_on_images_that_are_neither_trained_on_nor_augmented(
    tmp_path, trained, controls
):
    """Eight are left of twelve; one of twelve is too few, and every tenth is taken instead."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 6), ("val", 1)):
        for name in ("cat", "dog"):
            place = tmp_path / split / name
            place.mkdir(parents=True)
            for number in range(count):
                pixels = torch.rand(3, 32, 32, generator=generator)
                Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy()).save(
                    place / f"{number}.png"
                )
    config = configuration.DataConfig(
        "folder", str(tmp_path), image_size=(32, 32), train_images=trained
    )
    data = folder(config, 0)
    still = UNTOUCHED
    train, control = data.training_and_control_batches(still, 4)
    held = torch.cat([images for images, _ in control])
    assert len(held) == controls
    if trained == 4:
        assert len(train.dataset) == 4
        again = torch.cat([images for images, _ in control])
        assert torch.equal(held, again), "nothing is drawn"
        used = set(data.train.indices)
        assert used.isdisjoint(data.control.indices)
        assert len({*used, *data.control.indices}) == 12
    else:
        assert len(train.dataset) == (trained or 12) - controls
