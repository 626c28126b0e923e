"""Models of one's own: parts passed as arguments, and adapters registered from outside."""

import copy
import importlib.metadata
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import shapwrap
from shapwrap import Backbone, FeatureMap, ShapleyWrapper
from shapwrap.backbones import registry
from shapwrap.errors import ArgumentError, BackboneTypeError, UnsupportedBackboneError
from tests.backbones import TOKEN_KINDS, build

CLASSES = 4


class Tokens(nn.Module):
    """A transformer of one's own with a class token; returns a dictionary, as many do."""

    def __init__(self, as_dictionary=False):
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, stride=4)
        self.first = nn.Parameter(torch.randn(1, 1, 16))
        self.places = nn.Parameter(torch.randn(1, 13, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.fc = nn.Linear(16, CLASSES)
        self.as_dictionary = as_dictionary

    def encode(self, images):
        patches = self.embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.first.expand(len(patches), -1, -1), patches), 1)
        return self.blocks(tokens + self.places)

    def forward(self, images):
        logits = self.fc(self.encode(images)[:, 0])
        return {"logits": logits} if self.as_dictionary else logits


@pytest.fixture
def images():
    return torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(0))


def _wrap(model, **options):
    return ShapleyWrapper(model.eval(), image_size=(12, 16), **options)


@torch.no_grad()
def _check(wrapped, images):
    logits, values = wrapped(images), wrapped.attribute(images)
    torch.testing.assert_close(values.sum(1), logits, atol=1e-5, rtol=1e-5)
    coalitions = torch.rand(2, 2, wrapped.num_patches) < 0.5
    coalitions[:, 1] = True
    found = wrapped.value(images, coalitions)
    torch.testing.assert_close(found[:, 1], logits, atol=1e-5, rtol=1e-5)
    return logits


def test_tokens_are_found_by_tracing(images):
    model = Tokens()
    wrapped = _wrap(model)
    with torch.no_grad():
        torch.testing.assert_close(_check(wrapped, images), model(images))
    assert wrapped.grid == (3, 4)
    # The class token and the patches, of the last layer.
    assert wrapped.patch_layer.in_features == 16


def test_features_by_function_and_the_models_own_logits(images):
    model = Tokens()
    wrapped = _wrap(model, features=lambda images: model.encode(images)[:, 1:])
    with torch.no_grad():
        torch.testing.assert_close(_check(wrapped, images), model(images))
    assert (wrapped.report().readout, wrapped.grid) == ("efficiency-gap", (3, 4))


@pytest.mark.parametrize("head", [nn.Linear(16, 7), nn.Sequential(nn.ReLU(), nn.Linear(16, 7))])
def test_features_by_function_and_a_new_head(images, head):
    model = Tokens(as_dictionary=True).eval()
    features = lambda images: model.encode(images)[:, 1:]  # noqa: E731
    wrapped = _wrap(model, features=features, head=head)
    with torch.no_grad():
        expected = head(features(images).mean(dim=1))
        torch.testing.assert_close(_check(wrapped, images), expected)
    assert wrapped.new_head is head
    assert _wrap(model, features=features, num_classes=3).num_classes == 3


def test_parts_by_name(images):
    model = nn.Sequential()
    model.add_module("encoder", nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU()))
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flat", nn.Flatten())
    model.add_module("classify", nn.Sequential(nn.LayerNorm(8), nn.Linear(8, CLASSES)))
    wrapped = _wrap(model, features="encoder", head="classify")
    with torch.no_grad():
        torch.testing.assert_close(_check(wrapped, images), model(images))
    assert wrapped.report().readout == "shared-norm"
    assert wrapped.head_parameters()[0] is model.classify[1].weight
    restored = pickle.loads(pickle.dumps(copy.deepcopy(wrapped)))
    with torch.no_grad():
        assert torch.equal(restored(images), wrapped(images))


def test_a_head_by_function(images):
    model = Tokens(as_dictionary=True).eval()
    wrapped = _wrap(
        model,
        features=lambda images: model.encode(images)[:, 1:],
        head=lambda pooled: torch.tanh(model.fc(pooled))[:, :3],
    )
    with torch.no_grad():
        expected = torch.tanh(model.fc(model.encode(images)[:, 1:].mean(dim=1)))[:, :3]
        torch.testing.assert_close(_check(wrapped, images), expected)
    assert wrapped.report().readout == "gap"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"features": "no_such"}, ArgumentError, "features is 'no_such'; expected the name"),
        ({"features": "embed", "head": "no_such"}, ArgumentError, "head is 'no_such'"),
        ({"features": "embed", "head": "fc"}, UnsupportedBackboneError, "keep the model's own"),
        ({"features": "blocks"}, UnsupportedBackboneError, "makes 13 patches of 12 x 16"),
        ({"features": "fc"}, UnsupportedBackboneError, "expected a map"),
        ({"features": 3}, BackboneTypeError, "features is 3"),
        ({"head": "fc"}, BackboneTypeError, "together with features="),
        ({"head": nn.Linear}, BackboneTypeError, "head is <class"),
    ],
)
def test_parts_that_do_not_fit(options, error, words):
    with pytest.raises(error, match=re.escape(words)):
        _wrap(Tokens(), **options)


def test_a_model_that_returns_no_logits_asks_for_parts():
    with pytest.raises(UnsupportedBackboneError, match="returned a dict; expected logits"):
        _wrap(Tokens(as_dictionary=True))


@pytest.fixture
def clean_registry(monkeypatch):
    registry.adapters()
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    yield
    registry._find_adapters.cache_clear()


class OwnAdapter(Backbone):
    """Reads the patch tokens of `Tokens`."""

    family = "an adapter of one's own"

    @classmethod
    def recognises(cls, model):
        return isinstance(model, Tokens)

    def features(self, images):
        return FeatureMap(self.model.encode(images)[:, 1:], (3, 4))

    def classifiers(self):
        return [self.model.fc]

    def image_size(self):
        return (12, 16)

    def ignores_patches(self, images):
        return True


def test_a_registered_adapter_comes_first(images, clean_registry):
    assert shapwrap.register_backbone(OwnAdapter) is OwnAdapter
    wrapped = ShapleyWrapper(Tokens().eval())
    assert "an adapter of one's own" in wrapped.report().backbone
    assert "class token, which was dropped" in wrapped.report().note
    _check(wrapped, images)
    with pytest.raises(BackboneTypeError, match=r"subclass of shapwrap\.Backbone"):
        shapwrap.register_backbone(Tokens)


def test_adapters_of_installed_packages_are_found(images, clean_registry, monkeypatch):
    entry = importlib.metadata.EntryPoint(
        "own", "tests.test_own_models:OwnAdapter", registry.ENTRY_POINTS
    )
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry] if group else [])
    registry._find_adapters.cache_clear()
    assert "one's own" in ShapleyWrapper(Tokens().eval()).report().backbone


def test_the_worked_example_of_the_docs_runs(clean_registry):
    page = (Path(__file__).parent.parent / "docs" / "own-models.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    adapter = next(block for block in blocks if "register_backbone" in block)
    assert len(adapter.strip().splitlines()) < 30
    namespace = {}
    for block in blocks:
        exec(compile(block, "own-models.md", "exec"), namespace)


class Head(nn.Module):
    """A convolution, its mean, layers of choice, and a linear classifier."""

    def __init__(self, before=None, after=None):
        super().__init__()
        self.encoder = nn.Conv2d(3, 16, 4, stride=4)
        self.before = before or nn.Identity()
        self.classify = nn.Linear(16, CLASSES)
        self.after = after or (lambda logits: logits)

    def forward(self, images):
        return self.after(self.classify(self.before(self.encoder(images).mean((2, 3)))))


@torch.no_grad()
def _disturbed_equal(model, wrapped, images):
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter))
    torch.testing.assert_close(wrapped(images), model(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("part", ["norm", "adapter", "scaled", "clamped"])
def test_layers_that_do_nothing_yet_are_not_forgotten(images, part):
    adapter = nn.Linear(16, 16)
    nn.init.eye_(adapter.weight)
    nn.init.zeros_(adapter.bias)
    model = {
        "norm": lambda: Head(before=nn.BatchNorm1d(16)),
        "adapter": lambda: Head(before=adapter),
        "scaled": lambda: Head(after=lambda logits: 10 * logits),
        "clamped": lambda: Head(after=lambda logits: logits.clamp(-1, 1)),
    }[part]().eval()
    if part == "scaled":
        nn.init.zeros_(model.classify.weight)
        nn.init.zeros_(model.classify.bias)
    wrapped = _wrap(model)
    _disturbed_equal(model, wrapped, images)


def test_a_new_head_that_starts_as_nothing_is_trained(images):
    adapter = nn.Linear(16, 16)
    nn.init.eye_(adapter.weight)
    nn.init.zeros_(adapter.bias)
    wrapped = _wrap(Head(), head=nn.Sequential(adapter, nn.Linear(16, 3)))
    wrapped(images).sum().backward()
    assert adapter.weight.grad is not None and adapter.weight.grad.abs().sum() > 0
    assert "The head is new" in wrapped.report().note
    assert "those of the original" not in wrapped.report().note


def test_parameters_that_are_read_without_a_call_are_trained(images):
    class Positions(Tokens):
        def __init__(self):
            super().__init__()
            self.extra = nn.Embedding(13, 16)

        def encode(self, images):
            return super().encode(images) + self.extra.weight

    model = Positions()
    wrapped = _wrap(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    wrapped(images, torch.rand(2, 2, 12) < 0.5).values.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_class_token_at_the_end_is_no_patch(images):
    class Last(Tokens):
        def encode(self, images):
            patches = self.embed(images).flatten(2).transpose(1, 2)
            tokens = torch.cat((patches, self.first.expand(len(patches), -1, -1)), 1)
            return self.blocks(tokens + self.places)

        def forward(self, images):
            return self.fc(self.encode(images)[:, -1])

    model = Last()
    wrapped = _wrap(model)
    own = wrapped._wrapping.backbone.features(images).features[..., :16]
    with torch.no_grad():
        torch.testing.assert_close(own, model.encode(images)[:, :12])


def test_a_model_that_returns_more_than_logits(images):
    class More(Head):
        def forward(self, images):
            logits = super().forward(images)
            return logits, logits + 100

    model = More().eval()
    with torch.no_grad():
        wrapped = _wrap(model, features="encoder")
        torch.testing.assert_close(wrapped(images), model(images)[0])


def test_a_linear_layer_with_a_forward_of_its_own(images):
    class Cosine(nn.Linear):
        def forward(self, hidden):
            return super().forward(nn.functional.normalize(hidden, dim=1)) * 5

    model = Head()
    model.classify = Cosine(16, CLASSES)
    wrapped = _wrap(model, features="encoder", head="classify")
    with torch.no_grad():
        torch.testing.assert_close(_check(wrapped, images), model(images))
    assert wrapped.report().readout == "gap"
    torch.testing.assert_close(_wrap(model)(images), model(images))


def test_dropout_before_a_traced_classifier_is_kept(images):
    wrapped = _wrap(Head(before=nn.Dropout(0.5))).train()
    assert not torch.equal(wrapped(images), wrapped(images))


def test_wrapping_leaves_the_random_state_alone(images):
    class Noisy(Head):
        def forward(self, images):
            return super().forward(nn.functional.dropout(images, 0.1))

    model = Noisy()
    before = torch.get_rng_state()
    with pytest.raises(UnsupportedBackboneError):
        _wrap(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_one_channel_and_one_size_only():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 4, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(49 * 4, CLASSES)
    )
    wrapped = ShapleyWrapper(model.eval(), image_size=(28, 28))
    assert wrapped.grid == (7, 7)
    _check(wrapped, torch.randn(2, 1, 28, 28))


@pytest.mark.parametrize("options", [{"prefix_tokens": "nonsense"}, {"readout": "nonsense"}])
def test_unknown_options_are_refused_for_every_model(options):
    with pytest.raises(shapwrap.ShapwrapError, match="nonsense"):
        _wrap(Head(), **options)


@pytest.mark.parametrize("kind", TOKEN_KINDS)
def test_one_family_of_token_models_recognises_a_model(kind):
    """The order of adapters with the same preference must not matter."""
    model, _ = build(kind, (4, 4))
    found = [type(adapter) for adapter in registry.candidates(model)]
    of_tokens = [a for a in found if registry._registered[a] is registry.Preference.TOKENS]
    assert len(of_tokens) == 1, of_tokens
