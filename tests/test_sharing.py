"""Saved models for others: only what changed, model cards, and the hub."""

import copy
import json

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import load_file

from shapwrap import ShapleyWrapper
from shapwrap.errors import SavedModelError
from shapwrap.saving import timm_models
from shapwrap.saving.hub import HubOptions, folder_of
from shapwrap.training.lora import add_lora, merge_lora
from tests.saved_models import assert_same, noise, shifted


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
    assert folder_of(tmp_path, HubOptions()) == tmp_path
