"""Saved models: what is loaded has the very logits and values of what was saved."""

import copy
import json

import open_clip
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

from shapwrap import ShapleyCLIP, ShapleyWrapper
from shapwrap.backbones.base import Normalization
from shapwrap.errors import SavedModelError
from shapwrap.saving.wrapping import facts_of
from tests.backbones import NUM_CLASSES, OwnPooling, build, make_case, random_coalitions
from tests.clip_models import images_of, known_to_open_clip, tokenizer, tokens
from tests.saved_models import assert_same, noise, shifted

pytestmark = pytest.mark.filterwarnings(
    # open_clip reads a JSON file of its own and leaves it open.
    "ignore:unclosed file:ResourceWarning"
)


KINDS = ["vit-class-token", "vit-average-norm-registers", "vit-average-map", "eva-mixed-registers"]
KINDS += ["beit-average", "naflex-average-registers", "gemma-average-soft", "hiera-average"]
KINDS += ["cait-class-token", "torchvision-vit", "resnet", "convnext", "own-nonlinear-head"]
KINDS += ["clip-resnet", "whole-class-token", "whole-two-heads", "traced-mean", "traced-whole"]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_masking_and_readout(kind, tmp_path):
    case = make_case(kind)
    shifted(case.wrapped)
    before = copy.deepcopy(case.wrapped.state_dict())
    case.wrapped.save_pretrained(tmp_path, rebuild=False)
    assert all(torch.equal(t, before[n]) for n, t in case.wrapped.state_dict().items())
    grid = case.wrapped.grid
    loaded = ShapleyWrapper.from_pretrained(tmp_path, model=build(kind, grid)[0].train())
    assert_same(loaded, case.wrapped, case.images)
    coalitions = random_coalitions(case, 4, seed=2, paired=True)
    ours, theirs = loaded(case.images, coalitions), case.wrapped(case.images, coalitions)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("name", "arguments", "options"),
    [
        ("test_vit", {"num_classes": 5}, {}),
        ("test_vit", {"num_classes": 5}, {"prefix_tokens": "drop", "readout": "gap"}),
        ("test_vit2", {"img_size": (96, 64), "drop_path_rate": 0.1}, {"masking": "zero-mask"}),
        ("test_vit3", {"num_classes": 5, "global_pool": "avg", "in_chans": 1}, {}),
        ("test_resnet", {"num_classes": 3, "drop_rate": 0.2}, {"grid": (6, 4)}),
        ("test_convnext", {}, {"num_classes": 4}),
    ],
)
def test_timm_by_architecture(name, arguments, options, tmp_path):
    model = timm.create_model(name, **arguments)
    size = None if "vit" in name else (96, 64)
    wrapped = shifted(ShapleyWrapper(model, image_size=size, **options))
    modes = [module.training for module in wrapped.modules()]
    learning = [parameter.requires_grad for parameter in wrapped.parameters()]
    state = torch.random.get_rng_state()
    assert wrapped.save_pretrained(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    loaded = ShapleyWrapper.from_pretrained(str(tmp_path / "a" / "b"))
    assert torch.equal(state, torch.random.get_rng_state())
    assert [module.training for module in wrapped.modules()] == modes
    assert [parameter.requires_grad for parameter in wrapped.parameters()] == learning
    assert [parameter.requires_grad for parameter in loaded.parameters()] == learning
    assert not any(m._forward_hooks for m in loaded.modules())
    assert_same(loaded, wrapped)
    assert loaded.pretrained_cfg["architecture"] == name
    assert timm.data.resolve_model_data_config(loaded) == timm.data.resolve_model_data_config(model)
    # Training goes on as it would have.
    torch.manual_seed(0)
    ours = loaded.train()(noise(wrapped))
    torch.manual_seed(0)
    torch.testing.assert_close(ours, wrapped.train()(noise(wrapped)))
    said = json.loads((tmp_path / "a" / "b" / "config.json").read_text())
    assert said["backbone"]["architecture"] == name
    assert said["data"]["input_size"] == [noise(wrapped).shape[1], *wrapped.image_size]
    loaded.unwrap()
    wrapped.unwrap()


def test_torchvision_by_architecture(tmp_path):
    model = torchvision.models.resnet18()
    model.fc = nn.Linear(512, 3)
    wrapped = shifted(ShapleyWrapper(model.eval(), image_size=(64, 96), class_names=list("abc")))
    wrapped.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())["backbone"]
    assert (said["architecture"], said["arguments"]) == ("resnet18", {"num_classes": 3})
    assert_same(ShapleyWrapper.from_pretrained(tmp_path), wrapped)


def test_classes_and_their_arguments(tmp_path):
    wrapped = shifted(ShapleyWrapper(OwnPooling("amax").eval(), image_size=(12, 16)))
    wrapped.save_pretrained(tmp_path)
    with pytest.raises(SavedModelError, match="trust_remote_code"):
        ShapleyWrapper.from_pretrained(tmp_path)
    assert_same(ShapleyWrapper.from_pretrained(tmp_path, trust_remote_code=True), wrapped)
    given = ShapleyWrapper.from_pretrained(tmp_path, model=OwnPooling("amax"))
    assert_same(given, wrapped)

    # A class of a library, called directly: what it does not tell is passed.
    model, size = build("vit-average-norm-registers", (3, 4))
    wrapped = ShapleyWrapper(model, image_size=size)
    with pytest.raises(SavedModelError, match=r"constructor=.*rebuild=False.*model="):
        wrapped.save_pretrained(tmp_path)
    told = {"patch_size": 4, "depth": 2, "num_heads": 3, "class_token": False, "reg_tokens": 2}
    wrapped.save_pretrained(tmp_path, constructor=told)
    assert_same(ShapleyWrapper.from_pretrained(tmp_path), wrapped)
    model, size = build("resnet", (2, 3))
    wrapped = ShapleyWrapper(model, image_size=size, grid=(4, 6))
    told = {"block": timm.models.resnet.BasicBlock, "layers": (1, 1, 1, 1), "stem_width": 8}
    told |= {"channels": (4, 8, 8, 16), "stem_type": "deep"}
    wrapped.save_pretrained(tmp_path, constructor=told)
    assert_same(ShapleyWrapper.from_pretrained(tmp_path), wrapped)
    model, size = build("own-nonlinear-head", (3, 4))
    wrapped = ShapleyWrapper(model, image_size=size)
    wrapped.save_pretrained(tmp_path)
    assert_same(ShapleyWrapper.from_pretrained(tmp_path), wrapped)


def test_heads_and_features(tmp_path):
    def wrap(model, **options):
        return shifted(ShapleyWrapper(model.eval(), image_size=(64, 96), **options))

    layers = nn.Sequential(
        nn.LayerNorm(64, eps=1e-3), nn.Dropout(0.3), nn.Linear(64, 3, bias=False)
    )
    wrapped = wrap(timm.create_model("test_resnet"), head=nn.Linear(96, 4))
    wrapped.save_pretrained(tmp_path)
    assert_same(ShapleyWrapper.from_pretrained(tmp_path), wrapped)
    deep = nn.Sequential(nn.Linear(96, 64), *layers)
    wrapped = wrap(timm.create_model("test_resnet"), head=deep)
    wrapped.save_pretrained(tmp_path)
    loaded = ShapleyWrapper.from_pretrained(tmp_path)
    assert_same(loaded, wrapped)
    assert [str(a) for a in loaded.new_head] == [str(a) for a in deep]
    model = OwnPooling("mean").eval()
    wrapped = shifted(ShapleyWrapper(model, image_size=(12, 16), features="mix", head="fc"))
    wrapped.save_pretrained(tmp_path)
    assert_same(ShapleyWrapper.from_pretrained(tmp_path, trust_remote_code=True), wrapped)
    # The same layer by itself is the model's, too.
    wrapped = ShapleyWrapper(model, image_size=(12, 16), features="mix", head=model.fc)
    wrapped.save_pretrained(tmp_path)
    assert_same(ShapleyWrapper.from_pretrained(tmp_path, trust_remote_code=True), wrapped)
    model, size = build("own-nonlinear-head", (3, 4))
    function = model[:4].forward
    wrapped = ShapleyWrapper(model, image_size=size, features=function, head=model[6:].forward)
    wrapped.save_pretrained(tmp_path)
    with pytest.raises(SavedModelError, match=r"features= the function .*Sequential.forward"):
        ShapleyWrapper.from_pretrained(tmp_path)
    loaded = ShapleyWrapper.from_pretrained(
        tmp_path, model=model, features=function, head=model[6:].forward
    )
    assert torch.equal(loaded(noise(wrapped)), wrapped(noise(wrapped)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precisions(dtype, tmp_path):
    wrapped = shifted(ShapleyWrapper(timm.create_model("test_vit", num_classes=4))).to(dtype)
    wrapped.save_pretrained(tmp_path)
    assert_same(ShapleyWrapper.from_pretrained(tmp_path), wrapped)
    wrapped.patch_layer.float()
    wrapped.save_pretrained(tmp_path)
    loaded = ShapleyWrapper.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32, dtype}
    if dtype == torch.float64:
        assert_same(loaded, wrapped)


class Tied(nn.Module):
    """Two layers with one weight, and a map in channels-last order."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.first = nn.Conv2d(8, 8, 1)
        self.second = nn.Conv2d(8, 8, 1)
        self.second.weight = self.first.weight
        self.fc = nn.Linear(8, NUM_CLASSES)

    def forward(self, images):
        return self.fc(self.second(self.first(self.stem(images)).relu()).mean(dim=(2, 3)))


def test_tied_weights_are_stored_once(tmp_path):
    model = Tied().eval().to(memory_format=torch.channels_last)
    wrapped = ShapleyWrapper(model, image_size=(12, 8))
    wrapped.save_pretrained(tmp_path)
    assert "model.second.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = ShapleyWrapper.from_pretrained(tmp_path, trust_remote_code=True)
    # The order in memory is not a part of what is saved, and other kernels round otherwise.
    assert_same(loaded.to(memory_format=torch.channels_last), wrapped)
    assert loaded.model.first.weight is loaded.model.second.weight


def test_image_text_models(tmp_path):
    name = known_to_open_clip(tmp_path)
    model = shifted(open_clip.create_model(name))
    model.visual.image_mean, model.visual.image_std = (0.1,) * 3, (0.2,) * 3
    wrapped = ShapleyWrapper(model, tokenizer=open_clip.SimpleTokenizer(context_length=8))
    folder = wrapped.save_pretrained(tmp_path / "saved", architecture=name)
    found = wrapped.save_pretrained(tmp_path / "found")
    said = [json.loads((f / "config.json").read_text())["backbone"] for f in (folder, found)]
    assert said[0] == said[1] and said[0]["part"] == "CLIP"
    images, texts = images_of(wrapped), tokens(3)
    for cls in (ShapleyCLIP, ShapleyWrapper):
        loaded = cls.from_pretrained(folder)
        assert isinstance(loaded, ShapleyCLIP) and not loaded.training
        assert loaded.normalization == Normalization((0.1,) * 3, (0.2,) * 3)
        copied = copy.deepcopy(wrapped).eval()
        assert torch.equal(loaded.attribute(images, texts), copied.attribute(images, texts))
        assert torch.equal(loaded.encode_text(texts), copied.encode_text(texts))
        assert torch.equal(loaded.get_logits(images, texts)[0], copied.get_logits(images, texts)[0])
    assert torch.equal(loaded._tokens(["a cat", "A dog!"]), wrapped._tokens(["a cat", "A dog!"]))

    own = ShapleyCLIP(model, tokenizer=tokenizer)
    own.save_pretrained(folder)
    loaded = ShapleyCLIP.from_pretrained(folder)
    assert loaded.attribute(images, texts).shape == (2, 16, 3)
    with pytest.raises(SavedModelError, match=r"clip_models.tokenizer.*tokenizer="):
        loaded.attribute(images, ["cat"])
    loaded = ShapleyCLIP.from_pretrained(folder, tokenizer=tokenizer)
    assert torch.equal(loaded.attribute(images, ["cat"]), own.eval().attribute(images, ["cat"]))

    classifier = own.classifier(["cat", "dog"])
    classifier.save_pretrained(folder)
    loaded = ShapleyWrapper.from_pretrained(folder)
    assert_same(loaded, classifier)
    assert loaded.class_names == ["cat", "dog"] and facts_of(loaded)["readout"] == "cosine"
