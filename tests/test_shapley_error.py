"""Shapley truth of wrapped models and the error of explanations against it."""

import dataclasses

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from shapwrap.errors import ArgumentError, BackboneTypeError, ImageError, TargetError
from shapwrap.estimators import ConvergenceWarning, ShapleyEstimate
from shapwrap.metrics import (
    ShapleyTruth,
    estimation_error,
    shapley_error,
    shapley_truth,
    truth_of,
)
from shapwrap.metrics.correlation import ROUNDING, pearson, ranks, spearman
from tests.backbones import make_case
from tests.games import TableGame, shapley_by_definition

KIND = "vit-average-norm-registers"
ALL_6 = torch.arange(64)[:, None] >> torch.arange(6) & 1 == 1


def _by_definition(case, classes=slice(None)):
    masks = ALL_6.expand(len(case.images), 64, 6)
    with torch.no_grad():
        values = case.wrapped.value(case.images, masks)[..., classes].double().numpy()
    return np.stack([shapley_by_definition(table) for table in values])


def _truth(values, total=None, errors=None):
    """A truth made by hand."""
    values = values.double()
    total = values.sum(1) if total is None else total
    batch = len(values)
    estimate = ShapleyEstimate(
        values=values,
        standard_errors=torch.zeros_like(values) if errors is None else errors,
        empty=torch.zeros_like(total),
        grand=total,
        ratio=torch.zeros(batch),
        num_coalitions=torch.zeros(batch, dtype=torch.long),
        converged=torch.ones(batch, dtype=torch.bool),
        threshold=None,
        method="by hand",
    )
    return ShapleyTruth(estimate, (1, values.shape[1]), "nothing")


@pytest.mark.parametrize("kind", [KIND, "resnet"])
def test_truth_is_the_definition_on_the_models_own_values(kind):
    case = make_case(kind, grid=(2, 3))
    truth = shapley_truth(case.wrapped, case.images, chunk_size=16)
    np.testing.assert_allclose(truth.values.numpy(), _by_definition(case), atol=1e-6)
    assert truth.players == (2, 3)
    assert truth.removal == case.wrapped.report().masking
    with torch.no_grad():
        torch.testing.assert_close(truth.total.float(), case.wrapped(case.images))


def test_sampled_truths_agree_with_the_exact_one():
    case = make_case(KIND, grid=(2, 3))
    truth = shapley_truth(case.wrapped, case.images)
    for method, options in (("kernel", {"cross_check": True}), ("permutation", {})):
        sampled = shapley_truth(case.wrapped, case.images, method=method, threshold=0.02, **options)
        difference = (sampled.values - truth.values).abs()
        assert (difference <= 6 * sampled.estimate.standard_errors + 1e-6).all()
        assert sampled.estimate.converged.all()
        if method == "kernel":
            assert ((sampled.cross_check > 0.3) & (sampled.cross_check < 2.5)).all()


def test_more_than_16_players_are_sampled_and_coarse_ones_enumerated():
    case = make_case(KIND, grid=(4, 6))
    coarse = shapley_truth(case.wrapped, case.images, players=(2, 3))
    masks = ALL_6.view(64, 2, 3).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
    with torch.no_grad():
        values = case.wrapped.value(case.images[:1], masks[None])[0]
    expected = shapley_by_definition(values.double().numpy())
    np.testing.assert_allclose(coarse.values[0].numpy(), expected, atol=1e-6)
    assert coarse.estimate.method == "enumeration"
    with pytest.warns(ConvergenceWarning, match="raise the threshold"):
        fine = shapley_truth(case.wrapped, case.images, threshold=1e-9, max_coalitions=2048)
    assert fine.estimate.method == "KernelSHAP, paired"
    assert fine.values.shape == (2, 24, case.wrapped.num_classes)


def test_a_batch_is_its_images_one_by_one():
    case = make_case(KIND, grid=(2, 3), batch=3, dtype=torch.float64)
    options = {"method": "kernel", "threshold": 0.01}
    seeds = [torch.Generator().manual_seed(5) for _ in range(4)]
    together = shapley_truth(case.wrapped, case.images, generator=seeds[0], **options)
    for index in range(3):
        alone = shapley_truth(
            case.wrapped, case.images[index, None], generator=seeds[index + 1], **options
        )
        torch.testing.assert_close(alone.values[0], together.values[index])
        assert alone.estimate.num_coalitions[0] == together.estimate.num_coalitions[index]


class _Table(TableGame):
    players, removal = (1, 5), "a table"

    def __len__(self):
        return len(self.table)

    def select(self, rows):
        part = object.__new__(type(self))
        part.table, part.num_patches, part.asked = self.table[rows], self.num_patches, 0
        return part


def test_any_games_in_slabs():
    game = _Table(19, 5, 2, smooth=False)
    truth = truth_of(game)
    torch.testing.assert_close(truth.values, game.shapley())
    assert truth.estimate.num_coalitions.tolist() == [32] * 19


class _Moody(_Table):
    """Another game once it was asked a few times: what a model with random numbers may do."""

    calls = 0

    def __call__(self, coalitions):
        type(self).calls += 1
        values = super().__call__(coalitions)
        return values + 5.0 * coalitions[..., :1] if type(self).calls > 6 else values


def test_disagreeing_estimators_are_told():
    """KernelSHAP asks six times here: for both ends, and for five batches."""
    with pytest.warns(UserWarning, match="do not trust"):
        truth = truth_of(_Moody(1, 5, 1), method="kernel", cross_check=True, threshold=0.5)
    assert truth.estimate.num_coalitions.tolist() == [5 * 256]
    assert truth.cross_check[0] > 3


def test_save_and_load(tmp_path):
    case = make_case(KIND, grid=(2, 3))
    truth = shapley_truth(case.wrapped, case.images, method="kernel", cross_check=True)
    truth.save(tmp_path / "truth.pt")
    read = ShapleyTruth.load(tmp_path / "truth.pt")
    assert read.protocol() == truth.protocol()
    assert read.protocol()["seed"] == 0 and "shapwrap" in read.protocol()["versions"]
    for field in dataclasses.fields(ShapleyEstimate):
        first, second = getattr(truth.estimate, field.name), getattr(read.estimate, field.name)
        assert torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second
    torch.testing.assert_close(read.cross_check, truth.cross_check)


def test_the_protocol_names_the_seed_of_what_was_drawn():
    case = make_case(KIND, grid=(2, 3))
    generator = torch.Generator().manual_seed(7)
    assert shapley_truth(case.wrapped, case.images, generator=generator).protocol()["seed"] is None
    sampled = shapley_truth(
        case.wrapped, case.images, method="permutation", threshold=0.5, generator=generator
    )
    assert sampled.protocol()["seed"] == 7


def _slow(values, true, total):
    """All five numbers for one image and class."""
    l2 = np.sqrt(sum((a - b) ** 2 for a, b in zip(values, true, strict=True)))
    trivial = sum((total / len(true) - b) ** 2 for b in true)
    return {
        "l2": l2,
        "rmse": l2 / np.sqrt(len(true)),
        "pearson": scipy.stats.pearsonr(values, true)[0],
        "spearman": scipy.stats.spearmanr(values, true)[0],
        "skill": 1 - l2**2 / trivial,
    }


@given(st.integers(1, 3), st.integers(3, 9), st.integers(2, 4), st.integers(0, 999))
def test_errors_by_hand(batch, num, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    true, values = (
        torch.randint(-3, 4, (batch, num, classes), generator=generator).double() for _ in range(2)
    )
    true[:, 0], values[:, 0], true[:, 1], values[:, 1] = 5, -4, -5, 4.5  # none is constant
    target = torch.randint(classes, (batch,), generator=generator)
    noise = torch.rand(batch, num, classes, generator=generator, dtype=torch.float64)
    truth = _truth(true, errors=noise)
    found = shapley_error(values, truth, target=target)
    one = shapley_error(
        values.gather(2, target[:, None, None].expand(-1, num, 1))[..., 0], truth, target=target
    )
    assert one.non_target is None
    for b in range(batch):
        by_class = [
            _slow(values[b, :, k].numpy(), true[b, :, k].numpy(), float(true[b, :, k].sum()))
            for k in range(classes)
        ]
        t = int(target[b])
        others = [by_class[k] for k in range(classes) if k != t]
        for name in by_class[0]:
            assert float(getattr(found.target, name)[b]) == pytest.approx(by_class[t][name])
            assert float(getattr(one.target, name)[b]) == pytest.approx(by_class[t][name])
            mean = np.mean([other[name] for other in others])
            assert float(getattr(found.non_target, name)[b]) == pytest.approx(mean, abs=1e-9)
        gap = abs(float(values[b, :, t].sum() - true[b, :, t].sum()))
        assert float(found.efficiency_gap[b]) == pytest.approx(gap, abs=1e-9)
        assert float(found.noise[b]) == pytest.approx(float(noise[b, :, t].norm()))


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=12))
def test_ranks_share_ties(numbers):
    found = ranks(torch.tensor([numbers], dtype=torch.float64))[0]
    np.testing.assert_allclose(found.numpy(), scipy.stats.rankdata(numbers))


def test_extremes():
    true = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0)).double()
    perfect = shapley_error(true, _truth(true))
    assert torch.equal(perfect.target_class, true.sum(1).argmax(1))
    torch.testing.assert_close(perfect.target.skill, torch.ones(2).double())
    torch.testing.assert_close(perfect.non_target.pearson, torch.ones(2).double())
    reverse = shapley_error(-true, _truth(true))
    torch.testing.assert_close(reverse.target.spearman, -torch.ones(2).double())
    with pytest.warns(UserWarning, match="6 of 6 correlations"):
        even = shapley_error(true.mean(1, keepdim=True).expand_as(true), _truth(true))
    torch.testing.assert_close(even.target.skill, torch.zeros(2).double(), atol=1e-12, rtol=0)
    assert torch.isnan(even.target.pearson).all()
    assert torch.isnan(even.target.spearman).all()
    assert even.num_undefined == 6
    assert np.isnan(even.summary()["target_pearson"])


def test_constant_up_to_rounding_counts_as_constant():
    nearly = torch.full((1, 8), 0.3) + torch.tensor([[1.0, -1] * 4]) * 2e-8
    other = torch.arange(8.0)[None]
    assert torch.isnan(pearson(nearly, other, rounding=ROUNDING))
    assert torch.isnan(spearman(other, nearly, rounding=ROUNDING))
    zeros = torch.zeros(1, 8)
    assert torch.isnan(pearson(zeros, other, rounding=ROUNDING))
    flat = _truth(torch.full((1, 4, 2), 0.25))
    values = torch.randn(1, 4, 2)
    with pytest.warns(UserWarning, match="2 of 2"):
        assert torch.isnan(shapley_error(values, flat).target.skill).all()


def test_undefined_classes_are_left_out_of_the_mean():
    true = torch.randn(1, 6, 3, generator=torch.Generator().manual_seed(0)).double()
    values = true.clone()
    values[:, :, 2] = 1.0
    with pytest.warns(UserWarning, match="1 of 3"):
        found = shapley_error(values, _truth(true), target=0)
    torch.testing.assert_close(found.non_target.pearson, torch.ones(1).double())


@pytest.mark.parametrize("kind", [KIND, "resnet"])
def test_estimation_error_of_a_wrapped_model(kind):
    case = make_case(kind, grid=(2, 3))
    target = torch.tensor([1, 4])
    found = estimation_error(case.wrapped, case.images, target=target, chunk_size=1)
    true = _by_definition(case)
    with torch.no_grad():
        phi = case.wrapped.attribute(case.images).double().numpy()
    for b, t in enumerate(target.tolist()):
        expected = _slow(phi[b, :, t], true[b, :, t], true[b, :, t].sum())
        for name, number in expected.items():
            assert float(getattr(found.target, name)[b]) == pytest.approx(
                number, rel=1e-4, abs=1e-5
            )
    assert found.efficiency_gap.max() < 1e-5
    assert "enumeration" in str(found)
    assert set(found.summary()) > {"target_l2", "non_target_skill", "noise"}
    predicted = estimation_error(case.wrapped, case.images)
    with torch.no_grad():
        assert torch.equal(predicted.target_class, case.wrapped(case.images).argmax(1))
    same = shapley_error(case.wrapped.explain(case.images, target), found.truth)
    torch.testing.assert_close(same.target.l2, found.target.l2, atol=1e-5, rtol=1e-3)


def test_contrast_is_compared_with_contrast():
    case = make_case(KIND, grid=(2, 3))
    truth = shapley_truth(case.wrapped, case.images)
    explanation = case.wrapped.explain(case.images, 2, contrast=True)
    found = shapley_error(explanation, truth)
    true = truth.values[:, :, 2] - truth.values.mean(2)
    expected = (explanation.values - true).norm(dim=1)
    torch.testing.assert_close(found.target.l2, expected)
    assert found.efficiency_gap.max() < 1e-5


def test_coarse_players_add_up_phi():
    case = make_case(KIND, grid=(4, 6))
    found = estimation_error(case.wrapped, case.images, target=0, players=(2, 3))
    with torch.no_grad():
        phi = case.wrapped.attribute(case.images)[:, :, 0]
    blocks = phi.view(2, 2, 2, 3, 2).sum((2, 4)).flatten(1)
    expected = (blocks - found.truth.values[:, :, 0]).norm(dim=1)
    torch.testing.assert_close(found.target.l2, expected, atol=1e-6, rtol=1e-5)
    explained = shapley_error(case.wrapped.explain(case.images, 0), found.truth)
    torch.testing.assert_close(explained.target.l2, expected, atol=1e-6, rtol=1e-5)


def test_the_model_is_left_as_it_was():
    case = make_case("resnet", grid=(2, 2))
    case.wrapped.train()
    next(iter(case.wrapped.model.children())).eval()
    modes = [module.training for module in case.wrapped.modules()]
    state = {k: v.clone() for k, v in case.wrapped.state_dict().items()}
    randomness = torch.get_rng_state()
    estimation_error(case.wrapped, case.images)
    assert modes == [module.training for module in case.wrapped.modules()]
    assert all(torch.equal(v, state[k]) for k, v in case.wrapped.state_dict().items())
    assert all(p.grad is None for p in case.wrapped.parameters())
    assert torch.equal(randomness, torch.get_rng_state())


def test_bad_input():
    case = make_case(KIND, grid=(2, 3))
    wrapped, images = case.wrapped, case.images
    with pytest.raises(ArgumentError, match="method is 'guess'"):
        shapley_truth(wrapped, images, method="guess")
    with pytest.raises(ArgumentError, match="cross_check"):
        shapley_truth(wrapped, images, cross_check=True)
    with pytest.raises(ArgumentError, match="players"):
        shapley_truth(wrapped, images, players=(3, 3))
    with pytest.raises(ImageError):
        shapley_truth(wrapped, images * torch.inf)
    with pytest.raises(TargetError):
        estimation_error(wrapped, images, target=50)
    for measure in (shapley_truth, estimation_error):
        with pytest.raises(BackboneTypeError, match="expected a ShapleyWrapper"):
            measure(wrapped.model, images)
    truth = shapley_truth(wrapped, images)
    with pytest.raises(ArgumentError, match=r"expected \[B, players\] = \(2, 6\)"):
        shapley_error(torch.zeros(2, 7), truth)
    with pytest.raises(ArgumentError, match="NaN"):
        shapley_error(torch.full((2, 6), torch.nan), truth)
    with pytest.raises(ArgumentError, match="int64"):
        shapley_error(torch.zeros(2, 6, dtype=torch.long), truth)
    with pytest.raises(ArgumentError, match="beside an explanation"):
        shapley_error(wrapped.explain(images), truth, target=1)
    sixteen = make_case(KIND, grid=(4, 5))
    with pytest.raises(ArgumentError, match="Group patches"):
        shapley_truth(sixteen.wrapped, sixteen.images, method="exact")
