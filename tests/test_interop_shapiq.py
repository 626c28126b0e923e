"""Explanations and games in shapiq, against its own exact computer."""

import dataclasses
import importlib
import sys

import numpy as np
import pytest
import torch

shapiq = pytest.importorskip("shapiq")

from shapwrap.errors import ArgumentError, BackboneTypeError, MissingDependencyError  # noqa: E402
from shapwrap.interop.shapiq import ShapiqGame, interaction_values  # noqa: E402
from tests.additive import additive, images_for  # noqa: E402
from tests.backbones import make_case  # noqa: E402
from tests.games import shapley_by_definition  # noqa: E402


def singles(values):
    return np.array([values[(player,)] for player in range(values.n_players)])


@pytest.fixture(scope="module")
def class_token():
    return make_case("vit-class-token", grid=(2, 3), prefix_tokens="keep")


def test_exact_values_are_those_of_the_explanation():
    wrapped, images = additive(), images_for()
    told = wrapped.explain(images, torch.tensor([1, 4])).to_shapiq()
    assert len(told) == 2
    for image, target, values in zip(images, (1, 4), told, strict=True):
        game = wrapped.game(image, target)
        exact = shapiq.ExactComputer(game, game.n_players)("SV", 1)
        assert (values.index, values.max_order) == (exact.index, exact.max_order) == ("SV", 1)
        assert values.n_players == exact.n_players == 6
        np.testing.assert_allclose(singles(values), singles(exact), atol=1e-6)
        assert values.estimated and values.estimation_budget is None
        assert values.baseline_value == 0


def test_values_and_baseline_make_the_logit(class_token):
    wrapped, images = class_token.wrapped, class_token.images
    target = torch.tensor([3, 0])
    explanation = wrapped.explain(images, target)
    for row, values in enumerate(explanation.to_shapiq()):
        logit = float(explanation.logits[row, target[row]])
        assert values.baseline_value == pytest.approx(float(wrapped.baseline[target[row]]))
        assert values.baseline_value != 0
        assert values[()] == values.baseline_value
        assert values.values.sum() == pytest.approx(logit, abs=1e-5)
        np.testing.assert_allclose(singles(values), explanation.values[row], rtol=1e-6)
    contrast = wrapped.explain(images, target, contrast=True)
    for row, values in enumerate(contrast.to_shapiq()):
        logits = contrast.logits[row]
        centred = float(logits[target[row]] - logits.mean())
        assert values.values.sum() == pytest.approx(centred, abs=1e-5)


def test_a_number_as_baseline():
    explanation = additive().explain(images_for(batch=1), 2)
    (values,) = dataclasses.replace(explanation, baseline=1.5).to_shapiq()
    assert values.baseline_value == 1.5


def test_it_is_stored_and_added_by_shapiq(class_token, tmp_path):
    values = class_token.wrapped.explain(class_token.images, 1).to_shapiq()[1]
    values.to_json_file(tmp_path / "values.json")
    assert shapiq.InteractionValues.from_json_file(tmp_path / "values.json") == values
    largest = int(np.abs(singles(values)).argmax())
    assert (largest,) in values.get_top_k(3).interactions
    twice = values + values
    np.testing.assert_allclose(singles(twice), 2 * singles(values))


def test_half_precision(class_token):
    case = make_case("vit-average-norm-registers", batch=1)
    explanation = case.wrapped.to(torch.bfloat16).explain(case.images.bfloat16(), 1)
    (values,) = explanation.to_shapiq()
    assert values.values.sum() == pytest.approx(float(explanation.logits[0, 1]), abs=1e-4)


def test_game(class_token, tmp_path):
    wrapped, images = class_token.wrapped, class_token.images
    plain = wrapped.game(images[0], 3)
    baseline = float(wrapped.baseline[3])
    game = ShapiqGame(plain, baseline=baseline)
    assert isinstance(game, shapiq.Game)
    assert game.n_players == 6
    masks = (np.arange(64)[:, None] >> np.arange(6) & 1).astype(bool)
    np.testing.assert_allclose(game(masks), plain(masks), atol=1e-5)
    # shapiq takes coalitions of 0 and 1, and tuples of players, as well.
    np.testing.assert_allclose(game(masks.astype(int)), plain(masks), atol=1e-5)
    np.testing.assert_allclose(game([(0, 2), ()]), plain(masks[[5, 0]]), atol=1e-5)
    assert float(game(game.empty_coalition)[0]) == pytest.approx(0, abs=1e-6)
    stored = game.value_function(np.stack([game.empty_coalition, game.grand_coalition]))
    logit = float(wrapped.explain(images[:1], 3).logits[0, 3])
    np.testing.assert_allclose(stored, [baseline, logit], atol=1e-5)
    exact = shapiq.ExactComputer(game)("SV", 1)
    np.testing.assert_allclose(singles(exact), shapley_by_definition(plain(masks)), atol=1e-5)
    game.precompute()
    game.save_values(tmp_path / "game.json")
    again = shapiq.Game(6, normalization_value=baseline)
    again.load_values(tmp_path / "game.json", precomputed=True)
    np.testing.assert_allclose(again(masks), plain(masks), atol=1e-5)
    pairs = shapiq.approximator.KernelSHAPIQ(6, max_order=2, index="k-SII", random_state=0)
    assert pairs(64, game).max_order == 2


def test_the_model_is_left_as_it_was(class_token):
    wrapped, image = class_token.wrapped, class_token.images[0]
    wrapped.train()
    try:
        modes = [module.training for module in wrapped.modules()]
        randomness = torch.get_rng_state()
        game = ShapiqGame(wrapped.game(image, 1))
        first = game(game.grand_coalition)
        np.testing.assert_array_equal(first, game(game.grand_coalition))
        assert modes == [module.training for module in wrapped.modules()]
        assert torch.equal(randomness, torch.get_rng_state())
    finally:
        wrapped.eval()


def test_bad_input(class_token):
    explanation = class_token.wrapped.explain(class_token.images)
    other = dataclasses.replace(explanation, method="grad_cam", total=torch.full((2,), torch.nan))
    with pytest.raises(ArgumentError, match="grad_cam"):
        interaction_values(other)
    with pytest.raises(BackboneTypeError, match=r"wrapped\.game"):
        ShapiqGame(class_token.wrapped)


def test_shapiq_is_missing(monkeypatch, class_token):
    explanation = class_token.wrapped.explain(class_token.images)
    monkeypatch.setitem(sys.modules, "shapiq", None)
    monkeypatch.delitem(sys.modules, "shapwrap.interop.shapiq")
    with pytest.raises(MissingDependencyError, match=r"shapwrap\[shapiq\]"):
        explanation.to_shapiq()
    with pytest.raises(MissingDependencyError):
        importlib.import_module("shapwrap.interop.shapiq")
