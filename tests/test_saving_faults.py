"""Saved models that are damaged, tampered with, of other versions, or that cannot be rebuilt."""

import json
import shutil

import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from shapwrap import ShapleyCLIP, ShapleyWrapper, ShapwrapError, Trainer, TrainerConfig
from shapwrap.errors import ArgumentError, BackboneTypeError, SavedModelError
from shapwrap.saving.files import digest
from shapwrap.saving.values import decode, encode
from tests.backbones import OwnPooling
from tests.clip_models import clip_model, known_to_open_clip

load = ShapleyWrapper.from_pretrained


@pytest.fixture(scope="module")
def wrapped():
    return ShapleyWrapper(timm.create_model("test_resnet", num_classes=3), image_size=(64, 96))


@pytest.fixture(scope="module")
def saved(wrapped, tmp_path_factory):
    return wrapped.save_pretrained(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def change(folder, **parts):
    """Change the configuration; the path to a part is joined by two underscores."""
    path = folder / "config.json"
    said = json.loads(path.read_text())
    for name, value in parts.items():
        *keys, last = name.split("__")
        holder = said
        for key in keys:
            holder = holder[key]
        if value is ...:
            del holder[last]
        else:
            holder[last] = value
    path.write_text(json.dumps(said))


def rewrite(folder, tensors):
    """Other weights, with a configuration that agrees."""
    path = folder / "model.safetensors"
    save_file(tensors, path)
    change(folder, weights__bytes=path.stat().st_size, weights__sha256=digest(path))


def test_damaged_files(folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(SavedModelError, match="truncated"):
        load(folder)
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(SavedModelError, match="SHA-256"):
        load(folder)
    weights.write_bytes(b"\x80\x04 a pickle")
    change(folder, weights__bytes=weights.stat().st_size, weights__sha256=digest(weights))
    with pytest.raises(SavedModelError, match="no safetensors file"):
        load(folder)
    weights.unlink()
    with pytest.raises(SavedModelError, match="is missing"):
        load(folder)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '"config"', "null", "[" * 100_000, "\xff"])
def test_configurations_that_are_none(text, folder):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(SavedModelError, match=r"config\.json"):
        load(folder)


def test_tensors_that_do_not_fit(folder):
    tensors = load_file(folder / "model.safetensors")
    name = "model.fc.weight" if "model.fc.weight" in tensors else "model.head.fc.weight"
    fewer = {key: tensor for key, tensor in tensors.items() if key != name}
    for other, words in (
        (fewer, f"{name} not in the file"),
        ({**tensors, "model.more": torch.zeros(2)}, "model.more unknown to the model"),
        (
            {**tensors, name: torch.zeros(4, 96)},
            r"is \(4, 96\) in the file, \(3, 96\) in the model",
        ),
        ({**tensors, "os.system": torch.zeros(2)}, "unknown to the model"),
    ):
        rewrite(folder, other)
        with pytest.raises(SavedModelError, match=words):
            load(folder)
    rewrite(folder, tensors)
    # The model that was passed is as it was, when its shapes do not fit.
    given = timm.create_model("test_resnet", num_classes=4)
    before = {key: tensor.clone() for key, tensor in given.state_dict().items()}
    with pytest.raises(SavedModelError, match="in the model"):
        load(folder, model=given)
    assert all(torch.equal(tensor, before[key]) for key, tensor in given.state_dict().items())


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"format": ...}, "no config.json of a wrapped model"),
        ({"format_version": 2}, "format version 2"),
        ({"format_version": "1"}, "format version '1'"),
        ({"kind": "Model"}, "'kind' is 'Model'"),
        ({"facts__readout": "attention"}, "readout 'attention', which this version does not"),
        ({"facts__masking": "blur"}, "masking 'blur', which this version does not know"),
        ({"facts__grid": [5, 7]}, "not wrapped as it was saved: .*grid"),
        ({"facts__grid": [4]}, "two positive ints"),
        ({"facts__grid": ...}, "does not describe a model"),
        ({"facts": []}, "'facts' is"),
        ({"options__masking": "blur"}, "masking 'blur'"),
        ({"options__masking": 3}, "masking 3"),
        ({"facts__num_classes": 9}, "num_classes is 3, saved 9"),
        ({"facts__readout": "auto"}, "readout 'auto'"),
        ({"options": ...}, "'options' is 'absent'"),
        ({"dtype": "load"}, "dtype 'load'"),
        ({"dtype": "int64"}, "floating-point"),
        ({"tied": {"a": ["b"]}}, "does not describe a model"),
        ({"weights__file": "../../model.safetensors"}, "expected 'model.safetensors'"),
        ({"weights__file": "/etc/passwd"}, "expected 'model.safetensors'"),
        ({"weights__complete": False}, "does not describe a model"),
        ({"class_names": ["a"]}, "class_names has 1 names"),
        ({"class_names": "abc"}, "'class_names' is"),
        ({"backbone__library": "os"}, "library 'os'"),
        ({"backbone__library": None}, "model="),
        ({"backbone__library": {}}, "library {}"),
        ({"backbone__architecture": "resnet5"}, "which timm .* does not have"),
        ({"backbone__architecture": "hf-hub:me/model"}, "which timm .* does not have"),
        ({"backbone__architecture": "local-dir:/tmp/a"}, "which timm .* does not have"),
        ({"backbone__arguments__pretrained": True}, "pretrained, which reads files"),
        ({"backbone__arguments__checkpoint_path": "a.pth"}, "checkpoint_path, which reads files"),
        ({"backbone__arguments__no_such": 1}, "cannot be built as it was saved"),
        ({"backbone__arguments": [1]}, "malformed|cannot be built|does not describe"),
        ({"backbone__arguments__norm_layer": {"$class": "os:system"}}, "trust_remote_code"),
        ({"backbone__arguments__norm_layer": {"$class": "torch.nn:functional"}}, "no class of"),
        ({"backbone__arguments__norm_layer": {"$class": "torch.hub:load"}}, "no class of layers"),
        ({"backbone__arguments__norm_layer": {"$call": "os:system"}}, r"kind '\$call'"),
        ({"adapters": {"layers": ["../x"], "rank": 1}}, "adapters are of layers"),
    ],
)
def test_tampered_configurations(parts, words, folder):
    change(folder, **parts)
    with pytest.raises(ShapwrapError, match=words):
        load(folder)


def test_code_is_named_and_not_run(folder, tmp_path, monkeypatch):
    """A folder cannot name a function, nor code of others without consent."""
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    described = {"library": "class", "class": "Evil", "arguments": {}, "path": "evil_module:Evil"}
    change(folder, backbone=described)
    with pytest.raises(SavedModelError, match="code of none of torch, timm"):
        load(folder)
    for path in ("torch:load", "torch.hub:load", "torch.nn", "torch.nn:", ":", 3, "torch.nn:No"):
        change(folder, backbone={**described, "path": path})
        with pytest.raises(SavedModelError):
            load(folder, trust_remote_code=True)


def test_places_without_a_model(tmp_path, wrapped):
    for source in ("./nothing", "/no/such/folder", "~/models", "a/b/c", tmp_path / "x"):
        with pytest.raises(SavedModelError, match="is no folder"):
            load(source)
    with pytest.raises(SavedModelError, match="cannot be fetched"):
        load("no--such/..name", local_files_only=True, cache_dir=tmp_path / "cache")
    with pytest.raises(SavedModelError, match=r"has no config\.json"):
        load(tmp_path)
    with pytest.raises(SavedModelError, match="revision="):
        load(tmp_path, revision="main")
    (tmp_path / "config.json").write_text('{"architecture": "resnet18", "num_classes": 2}')
    with pytest.raises(SavedModelError, match="of a plain model"):
        load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(SavedModelError, match="cannot be saved in"):
        wrapped.save_pretrained(tmp_path / "file" / "folder")


def test_checkpoints_of_a_run(tmp_path):
    wrapped = ShapleyWrapper(timm.create_model("test_resnet", num_classes=2), image_size=(64, 64))
    data = [(torch.randn(2, 3, 64, 64), torch.tensor([0, 1]))]
    config = TrainerConfig(output_dir=tmp_path, epochs=1, progress=False)
    trainer = Trainer(wrapped, data, config=config)
    trainer.fit()
    for folder in (tmp_path, next(tmp_path.glob("step-*"))):
        with pytest.raises(
            SavedModelError, match=r"resume=True.*trainer\.wrapped\.save_pretrained"
        ):
            load(folder)
    # What the error says to do: beside the checkpoints, it is found.
    trainer.wrapped.save_pretrained(tmp_path)
    assert load(tmp_path).grid == wrapped.grid


def test_backbones_that_are_not_rebuilt(tmp_path):
    class Local(OwnPooling):
        pass

    wrapped = ShapleyWrapper(Local("mean").eval(), image_size=(12, 16))
    with pytest.raises(ArgumentError, match="cannot be imported by this name"):
        wrapped.save_pretrained(tmp_path)
    for change_model, words in (
        (lambda m: m.global_pool.register_forward_hook(lambda *_: None), "forward_hooks"),
        (lambda m: setattr(m.layer1, "forward", lambda x: x), "forward_replaced"),
        (lambda m: setattr(m.layer1[0], "act1", nn.Tanh()), "act1 is torch.nn"),
        (lambda m: setattr(m.layer2[0].conv1, "stride", (1, 1)), "stride"),
    ):
        model = timm.create_model("test_resnet")
        wrapped = ShapleyWrapper(model, image_size=(32, 32))
        change_model(model)
        with pytest.raises(SavedModelError, match=words):
            wrapped.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_options_that_do_not_go_together(wrapped, tmp_path, saved):
    for options, words in (
        ({"rebuild": False, "architecture": "test_resnet"}, "rebuild=False"),
        ({"base": wrapped.model}, "without only_changed"),
        ({"only_changed": True}, "every parameter requires gradients"),
        ({"only_changed": True, "base": {}}, "none is that of base"),
        ({"architecture": "no_such_model"}, "list_models"),
        ({"constructor": {"pretrained": True}}, "constructor has pretrained"),
        ({"constructor": {"stem_width": open}}, "JSON cannot hold"),
        ({"measured": 0.5}, "measured is float"),
        ({"card_data": {"eval_results": 3}}, "card_data"),
    ):
        with pytest.raises(ArgumentError, match=words):
            wrapped.save_pretrained(tmp_path / "new", **options)
    assert not (tmp_path / "new" / "config.json").exists()
    with pytest.raises(SavedModelError, match="meta device"):
        ShapleyWrapper(timm.create_model("test_resnet")).to("meta").save_pretrained(tmp_path)
    done = ShapleyWrapper(timm.create_model("test_resnet"))
    done.unwrap()
    with pytest.raises(BackboneTypeError, match="unwrapped"):
        done.save_pretrained(tmp_path)
    with pytest.raises(BackboneTypeError, match="wrapped already"):
        load(saved, model=wrapped)
    with pytest.raises(BackboneTypeError, match="expected an instance"):
        load(saved, model="test_resnet")
    with pytest.raises(SavedModelError, match="reads no texts"):
        load(saved, tokenizer=len)
    with pytest.raises(BackboneTypeError, match=r"holds a ShapleyWrapper; expected a ShapleyCLIP"):
        ShapleyCLIP.from_pretrained(saved)
    with pytest.raises(SavedModelError, match=r"do not fit|not wrapped as it was saved"):
        load(saved, model=timm.create_model("test_vit", num_classes=3))


def test_changes_without_their_base(tmp_path):
    model = OwnPooling("mean").eval()
    wrapped = ShapleyWrapper(model, image_size=(12, 16))
    model.stem.requires_grad_(False)
    wrapped.save_pretrained(tmp_path, only_changed=True)
    with pytest.raises(SavedModelError, match="expected model=, the pretrained backbone"):
        load(tmp_path, trust_remote_code=True)
    wrapped.save_pretrained(tmp_path, only_changed=True, base_weights="best")
    with pytest.raises(SavedModelError, match="no pretrained weights by a name"):
        load(tmp_path, trust_remote_code=True)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_image_text_models(tmp_path):
    wrapped = ShapleyCLIP(clip_model())
    with pytest.raises(SavedModelError, match="rebuild=False"):
        wrapped.save_pretrained(tmp_path, architecture=known_to_open_clip(tmp_path))
    with pytest.raises(ArgumentError, match=r"open_clip\.list_models"):
        wrapped.save_pretrained(tmp_path, architecture="no such model")
    wrapped = ShapleyCLIP(open_clip.create_model(known_to_open_clip(tmp_path)))
    folder = wrapped.save_pretrained(tmp_path / "saved")
    with pytest.raises(SavedModelError, match="takes neither"):
        load(folder, head=nn.Linear(2, 2))
    text = {"backbone__arguments__text_cfg__hf_model_name": "me/bert"}
    trunk = {"backbone__arguments__vision_cfg__timm_model_name": "hf-hub:me/vit"}
    for parts, words in (
        (text, "looked up on the hub"),
        (trunk, "which timm .* does not have"),
        ({"backbone__part": "eval"}, "open_clip 'eval'"),
        ({"tokenizer": {"open_clip": "HFTokenizer", "name": "me/it"}}, "tokenizer is"),
        ({"backbone__preprocess": [1]}, "cannot be built|describe a model"),
    ):
        shutil.copytree(folder, tmp_path / "copy", dirs_exist_ok=True)
        change(tmp_path / "copy", **parts)
        with pytest.raises(SavedModelError, match=words):
            load(tmp_path / "copy")


def test_arguments_as_json():
    from functools import partial

    given = {
        "tuple": (1, (2.5, "a"), []),
        "none": None,
        "class": nn.GELU,
        "partial": partial(nn.LayerNorm, eps=1e-6),
        "blocks": timm.models.byobnet.ByoModelCfg(blocks=(), stem_chs=8),
    }
    found = decode(json.loads(json.dumps(encode(given))), trust=False)
    assert found["partial"].func is nn.LayerNorm and found["partial"].keywords == {"eps": 1e-6}
    assert {**found, "partial": None} == {**given, "partial": None}
    for value in (float("nan"), {1: 2}, {"$class": 3}, open, object(), torch.zeros(1), {1}):
        with pytest.raises(ArgumentError, match="JSON cannot hold"):
            encode(value)
