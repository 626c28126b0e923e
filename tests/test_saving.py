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

import shapwrap.saving.hub
from shapwrap import ShapleyCLIP, ShapleyWrapper
from shapwrap.backbones.base import Normalization
from shapwrap.errors import SavedModelError
from shapwrap.saving import timm_models
from shapwrap.saving.wrapping import facts_of
from tests.backbones import BUILDERS, NUM_CLASSES, OwnPooling, build, make_case, random_coalitions
from tests.clip_models import images_of, known_to_open_clip, tokenizer, tokens

pytestmark = pytest.mark.filterwarnings(
    # open_clip reads a JSON file of its own and leaves it open.
    "ignore:unclosed file:ResourceWarning"
)


def noise(wrapped, seed=0, num=2):
    parameter = next(wrapped.parameters())
    channels = wrapped._wrapping.backbone.in_channels()
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, channels, *wrapped.image_size, generator=generator).to(parameter.dtype)


def shifted(model, seed=11):
    """The same model with other weights and statistics, as training would leave it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                moved = torch.rand(tensor.shape, generator=generator).to(tensor)
                tensor.mul_(1 + 0.1 * moved).add_(0.01 * moved)
    return model


@torch.no_grad()
def assert_same(loaded, wrapped, images=None):
    images = noise(wrapped) if images is None else images
    wrapped = copy.deepcopy(wrapped).eval()
    assert type(loaded) is type(wrapped)
    assert not any(module.training for module in loaded.modules())
    for name in ("class_names", "normalization"):
        assert getattr(loaded, name) == getattr(wrapped, name)
    assert facts_of(loaded) == facts_of(wrapped)
    assert torch.equal(loaded(images), wrapped(images))
    assert torch.equal(loaded.attribute(images), wrapped.attribute(images))
    generator = torch.Generator().manual_seed(1)
    coalitions = torch.rand(len(images), 3, wrapped.num_patches, generator=generator) < 0.5
    assert torch.equal(loaded.value(images, coalitions), wrapped.value(images, coalitions))
    state, other = wrapped.state_dict(), loaded.state_dict()
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, other[name]) and tensor.dtype == other[name].dtype


@pytest.mark.parametrize("kind", list(BUILDERS))
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
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


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A model whose head and one norm were trained, and its pretrained backbone."""
    base = shifted(timm.create_model("test_vit"))
    wrapped = ShapleyWrapper(copy.deepcopy(base), num_classes=3)
    wrapped.requires_grad_(False)
    learning = [*wrapped.head_parameters(), *wrapped.model.norm.parameters()]
    with torch.no_grad():
        for parameter in learning:
            parameter.requires_grad_(True)
            parameter.add_(torch.rand(parameter.shape))
    return wrapped, base


@pytest.mark.parametrize("compared", [False, True])
def test_only_what_changed(compared, tuned, tmp_path):
    wrapped, base = tuned
    wrapped.save_pretrained(tmp_path, only_changed=True, base=base if compared else None)
    stored = load_file(tmp_path / "model.safetensors")
    expected = {"model.norm.weight", "model.norm.bias", "new_head.weight", "new_head.bias"}
    assert stored.keys() == expected | {"patch_layer.weight"}
    loaded = ShapleyWrapper.from_pretrained(tmp_path, model=copy.deepcopy(base))
    assert_same(loaded, wrapped)
    other = shifted(timm.create_model("test_vit"), seed=2)
    with pytest.raises(SavedModelError, match="fine-tuning left alone are not those"):
        ShapleyWrapper.from_pretrained(tmp_path, model=other)
    # Its state will do.
    wrapped.save_pretrained(tmp_path, only_changed=True, base=base.state_dict())
    assert load_file(tmp_path / "model.safetensors").keys() == stored.keys()


def test_pretrained_weights_of_the_library(tuned, tmp_path, monkeypatch):
    wrapped, base = tuned
    wrapped.save_pretrained(tmp_path, only_changed=True)
    built = []
    create = timm.create_model

    def with_weights(name, pretrained, **arguments):
        built.append((name, pretrained))
        model = create(name, **arguments)
        if pretrained:
            model.load_state_dict(base.state_dict())
        return model

    monkeypatch.setattr(timm_models.timm, "create_model", with_weights)
    assert_same(ShapleyWrapper.from_pretrained(tmp_path), wrapped)
    assert built == [("test_vit.r160_in1k", True)]


@pytest.mark.parametrize("only_changed", [False, True])
def test_adapters(only_changed, tmp_path):
    from shapwrap.training.lora import add_lora, merge_lora

    base = shifted(timm.create_model("test_vit", num_classes=4))
    wrapped = ShapleyWrapper(copy.deepcopy(base))
    add_lora(wrapped, rank=2, alpha=3.0, dropout=0.1, targets="attention")
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.rand(parameter.shape))
    modules = [type(module) for module in wrapped.modules()]
    wrapped.save_pretrained(tmp_path, only_changed=only_changed)
    assert [type(module) for module in wrapped.modules()] == modules
    given = copy.deepcopy(base) if only_changed else None
    loaded = ShapleyWrapper.from_pretrained(tmp_path, model=given)
    assert_same(loaded, wrapped)
    if only_changed:
        stored = load_file(tmp_path / "model.safetensors")
        assert all("lora_" in n or n.startswith(("model.head", "patch_layer")) for n in stored)
    learning = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == learning
    assert merge_lora(loaded) == merge_lora(wrapped)
    assert torch.equal(loaded(noise(wrapped)), wrapped.eval()(noise(wrapped)))


def test_the_model_card(tmp_path):
    wrapped = ShapleyWrapper(timm.create_model("test_resnet", num_classes=3), image_size=(64, 96))
    audit = wrapped.audit(noise(wrapped), num_coalitions=2)
    measured = {"accuracy": 0.75, "kind": "validation", "residual": float("nan"), "audit": audit}
    wrapped.save_pretrained(
        tmp_path, measured=measured, dataset="pets", card_data={"license": "mit"}, repo_id="me/dogs"
    )
    import huggingface_hub

    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "shapwrap" and card.data.license == "mit"
    assert card.data.pipeline_tag == "image-classification"
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["accuracy"] == 0.75
    assert results["skill"] == pytest.approx(audit.overall_skill)
    assert 'ShapleyWrapper.from_pretrained("me/dogs")' in card.text
    assert "| accuracy | 0.75 |" in card.text and "zero-mask" in card.text
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["measured"]["accuracy"] == 0.75 and "kind" not in said["measured"]
    # A card that a person has taken over stays.
    (tmp_path / "README.md").write_text("mine")
    wrapped.save_pretrained(tmp_path, measured={"accuracy": 0.5})
    assert (tmp_path / "README.md").read_text() == "mine"


def test_from_the_cache_of_the_hub(tmp_path, monkeypatch):
    wrapped = shifted(ShapleyWrapper(timm.create_model("test_resnet", num_classes=3)))
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--me--dogs"
    wrapped.save_pretrained(repository / "snapshots" / commit)
    for branch in ("main", "v2"):
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for options in ({}, {"revision": "v2"}, {"revision": commit, "local_files_only": True}):
        loaded = ShapleyWrapper.from_pretrained("me/dogs", cache_dir=tmp_path / "cache", **options)
        assert_same(loaded, wrapped)
    for source, options in (("me/cats", {}), ("me/dogs", {"revision": "v3"})):
        with pytest.raises(SavedModelError, match=r"config.json of a repository .* be fetched"):
            ShapleyWrapper.from_pretrained(source, cache_dir=tmp_path / "cache", **options)


def test_to_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    calls = []

    class Hub:
        def __init__(self, **options):
            calls.append(("api", options["token"]))

        def create_repo(self, repo_id, **options):
            calls.append(("repo", repo_id, options["private"]))
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def create_branch(self, repo_id, *, branch, exist_ok):
            calls.append(("branch", branch))

        def upload_folder(self, *, repo_id, folder_path, **options):
            files = {path.name for path in folder_path.iterdir()}
            calls.append((repo_id, files, options["commit_message"], options["create_pr"]))
            loaded.append(ShapleyWrapper.from_pretrained(folder_path))
            address = f"https://huggingface.co/{repo_id}/commit/1"
            return huggingface_hub.CommitInfo(
                commit_url=address, commit_message="", commit_description="", oid="1"
            )

    loaded = []
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    wrapped = ShapleyWrapper(timm.create_model("test_resnet", num_classes=3))
    address = wrapped.push_to_hub(
        "me/dogs", private=True, token="t", revision="v2", measured={"accuracy": 0.5}
    )
    assert address == "https://huggingface.co/me/dogs/commit/1"
    assert calls[:3] == [("api", "t"), ("repo", "me/dogs", True), ("branch", "v2")]
    files = {"README.md", "config.json", "model.safetensors"}
    assert calls[3] == ("me/dogs", files, "Push model using shapwrap", False)
    assert_same(loaded[0], wrapped)

    def refuse(self, *_, **__):
        raise OSError("no network")

    monkeypatch.setattr(Hub, "create_repo", refuse)
    with pytest.raises(SavedModelError, match="no network"):
        wrapped.push_to_hub("me/dogs")


def test_nothing_is_fetched_for_a_folder(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    wrapped = ShapleyWrapper(timm.create_model("test_resnet", num_classes=3))
    wrapped.save_pretrained(tmp_path)
    assert_same(ShapleyWrapper.from_pretrained(tmp_path), wrapped)
    assert shapwrap.saving.hub.folder_of(tmp_path, shapwrap.saving.hub.HubOptions()) == tmp_path
