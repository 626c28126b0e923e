"""Randomisation, sensitivity-n and stability against SciPy, loops and known answers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from shapwrap.errors import (
    ArgumentError,
    BackboneTypeError,
    CoalitionError,
    ImageError,
    TargetError,
)
from shapwrap.explainers import SelfExplaining
from shapwrap.metrics import (
    filled_value,
    native_value,
    randomisation,
    sensitivity_n,
    stability,
)
from shapwrap.metrics.correlation import pearson, ranks, spearman
from shapwrap.metrics.layers import layers_from_output
from shapwrap.metrics.sensitivity import draw_subsets
from tests.backbones import make_case


@given(
    rows=st.integers(1, 4),
    samples=st.integers(2, 12),
    levels=st.sampled_from([1, 2, 4, 1000]),
    scale=st.sampled_from([1.0, 1e-6, 1e6]),
    seed=st.integers(0, 2**16),
)
@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_correlations_are_those_of_scipy(rows, samples, levels, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    first, second = (
        torch.randint(levels, (rows, samples), generator=generator) * scale for _ in range(2)
    )
    np.testing.assert_array_equal(ranks(first), stats.rankdata(first.numpy(), axis=1))
    for row, (a, b) in enumerate(zip(first.double().numpy(), second.double().numpy(), strict=True)):
        for ours, theirs in ((pearson, stats.pearsonr), (spearman, stats.spearmanr)):
            expected = theirs(a, b).statistic
            assert float(ours(first, second)[row]) == pytest.approx(expected, nan_ok=True, abs=1e-9)


# --- randomisation ---------------------------------------------------------------------------


def weighted(model):
    """Explains a linear layer's class by its own weights."""

    def explainer(images, target=None):
        logits = model(images)
        target = logits.argmax(1) if target is None else target
        return SimpleNamespace(values=last_of(model).weight[target].detach(), target=target)

    return explainer


def last_of(model):
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 2, stride=2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(24, 9)
    ).eval()


def test_a_map_of_the_last_layer_depends_on_that_layer_alone(network):
    images = torch.randn(3, 3, 4, 6)
    before = snapshot(network)
    found = randomisation(network, weighted, images, order="independent")
    assert found.layers == ("3", "1", "0")
    torch.testing.assert_close(found.similarity[1:], torch.ones(2, 3).double())
    assert (found.similarity[0].abs() < 0.7).all() and found.undefined == 0
    cascading = randomisation(network, weighted, images)
    assert (cascading.similarity.abs() < 0.7).all()
    torch.testing.assert_close(cascading.similarity, cascading.similarity[:1].expand(3, -1))
    assert all(torch.equal(before[name], tensor) for name, tensor in snapshot(network).items())


@pytest.mark.parametrize("order", ["cascading", "independent"])
@pytest.mark.parametrize("drawing", ["normal", "permutation"])
def test_which_layers_are_random_at_each_step(network, order, drawing):
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    changed, statistics = [], []

    def make(model):
        now = dict(model.named_parameters())
        changed.append({n for n in now if not torch.equal(now[n], before[n])})
        statistics.append({n: (p.mean().item(), p.std().item()) for n, p in now.items()})
        return weighted(model)

    randomisation(network, make, torch.randn(2, 3, 4, 6), order=order, drawing=drawing)
    # Gains of 1 and shifts of 0 have no spread to draw with.
    last, first = {"3.weight", "3.bias"}, {"0.weight", "0.bias"}
    if order == "cascading":
        assert changed == [set(), last, last, last | first]
    else:
        assert changed == [set(), last, set(), first]
    trained, drawn = statistics[0]["3.weight"], statistics[1]["3.weight"]
    tolerance = 1e-6 if drawing == "permutation" else 0.05
    assert drawn == pytest.approx(trained, abs=tolerance)


def test_seeds_reproduce_and_differ(network):
    images = torch.randn(2, 3, 4, 6)
    state = torch.get_rng_state()

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return randomisation(network, weighted, images, generator=generator).similarity

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    assert torch.equal(state, torch.get_rng_state())


def test_weights_are_back_after_an_error(network):
    before, calls = snapshot(network), []

    def make(model):
        calls.append(model)
        if len(calls) == 3:
            raise RuntimeError("in between")
        return weighted(model)

    with pytest.raises(RuntimeError, match="in between"):
        randomisation(network, make, torch.randn(1, 3, 4, 6))
    assert all(torch.equal(before[name], tensor) for name, tensor in snapshot(network).items())


@pytest.mark.parametrize("kind", ["vit-average", "torchvision-vit", "own-nonlinear-head"])
def test_a_wrapped_model_is_randomised_and_restored(kind):
    case = make_case(kind)
    wrapped = case.wrapped.train()
    before, hooks = snapshot(wrapped), [len(m._forward_pre_hooks) for m in wrapped.modules()]
    explained = wrapped.explain(case.images).values
    groups = layers_from_output(wrapped, case.images)
    grouped = [id(p) for parameters in groups.values() for p in parameters]
    assert len(grouped) == len(set(grouped)) <= len(list(wrapped.parameters()))
    names = list(groups)
    assert names[0].split(".")[-1] in ("head", "8")
    found = randomisation(
        wrapped, SelfExplaining, case.images, layers=[names[0], names[-1]], order="cascading"
    )
    assert found.similarity.shape == (2, 2)
    assert (found.similarity[-1] < 0.95).all()
    assert all(torch.equal(before[name], tensor) for name, tensor in snapshot(wrapped).items())
    assert torch.equal(wrapped.explain(case.images).values, explained)
    assert hooks == [len(m._forward_pre_hooks) for m in wrapped.modules()]
    assert all(module.training for module in wrapped.modules())
    assert all(p.grad is None for p in wrapped.parameters())


def test_output_comes_before_input():
    case = make_case("vit-average")
    model = case.wrapped.unwrap()
    names = list(layers_from_output(model, case.images))
    assert names[0] == "head" and names[-2:] == ["", "patch_embed.proj"]
    assert names.index("blocks.1.mlp.fc2") < names.index("blocks.1.attn.qkv")
    assert names.index("blocks.1.attn.qkv") < names.index("blocks.0.mlp.fc1")


def test_what_only_the_explanation_reads_stands_before_the_output():
    case = make_case("whole-class-token")
    asked = []

    def make(model):
        asked.append(model.patch_layer.weight.detach().clone())
        return SelfExplaining(model)

    found = randomisation(case.wrapped, make, case.images)
    assert found.layers[0] == "patch_layer"
    assert "patch_layer" not in layers_from_output(case.wrapped, case.images)
    assert torch.equal(asked[0], case.wrapped.patch_layer.weight)
    assert not torch.equal(asked[1], asked[0])


def test_unread_parameters_are_left_alone(network):
    network.unused = nn.Linear(2, 2)
    network.forward = lambda images: network[3](network[2](network[1](network[0](images))))
    found = randomisation(network, weighted_fourth, torch.randn(1, 3, 4, 6))
    assert found.layers == ("3", "1", "0")


def weighted_fourth(model):
    def explainer(images, target=None):
        return SimpleNamespace(values=model[3].weight[:1].detach(), target=torch.zeros(1).long())

    return explainer


def test_constant_maps_have_no_similarity(network):
    def flat(model):
        return lambda images, target=None: SimpleNamespace(
            values=torch.ones(len(images), 6), target=torch.zeros(len(images)).long()
        )

    with pytest.warns(UserWarning, match="6 of 6 similarities are undefined"):
        found = randomisation(network, flat, torch.randn(2, 3, 4, 6))
    assert found.similarity.isnan().all() and found.undefined == 6


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"order": "random"}, "order is 'random'"),
        ({"drawing": "zeros"}, "drawing is 'zeros'"),
        ({"layers": ["3", "head"]}, r"\['head'\], which the model lacks"),
        ({"layers": []}, "layers is empty"),
        ({"layers": "head"}, "expected a list"),
        ({"layers": ["2"]}, "no parameters"),
    ],
)
def test_randomisation_errors(network, options, match):
    with pytest.raises(ArgumentError, match=match):
        randomisation(network, weighted, torch.randn(1, 3, 4, 6), **options)
    with pytest.raises(BackboneTypeError, match=r"expected an nn\.Module"):
        randomisation(lambda x: x, weighted, torch.randn(1, 3, 4, 6))


def test_protocols_name_every_choice(network):
    images, generator = torch.randn(1, 3, 4, 6), torch.Generator().manual_seed(5)
    said = str(
        randomisation(
            network, weighted, images, drawing="permutation", generator=generator
        ).protocol
    )
    for word in ("cascading", "permutation", "predicted", "seed", "5", "torch"):
        assert word in said, word
    said = str(randomisation(network, weighted, images, torch.tensor([1])).protocol)
    assert "given" in said and "normal" in said
    values = torch.randn(1, 5, generator=generator)
    said = str(sensitivity_n(values, additive(values), sizes=[2, "all"], num_subsets=7).protocol)
    for word in ("2, all", "7", "v(everybody) - v(the rest)", "seed", "torch"):
        assert word in said, word
    said = str(stability(squares, images, radius=0.25, num_samples=3).protocol)
    for word in ("0.25", "3", "predicted", "seed", "torch"):
        assert word in said, word


def test_one_size_needs_no_list():
    values = torch.randn(1, 5, generator=torch.Generator().manual_seed(0))
    for size in (2, "all"):
        alone = sensitivity_n(values, additive(values + 1), sizes=size, num_subsets=9)
        listed = sensitivity_n(values, additive(values + 1), sizes=[size], num_subsets=9)
        assert alone.sizes == (size,) and torch.equal(alone.pearson, listed.pearson)


# --- sensitivity-n ---------------------------------------------------------------------------


def additive(values):
    return lambda coalitions: (coalitions * values[:, None]).sum(2)


@given(
    batch=st.integers(1, 3),
    num_patches=st.integers(2, 9),
    number=st.integers(2, 12),
    chunk_size=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
@pytest.mark.filterwarnings("ignore:An input array is constant", "ignore:.*are undefined")
def test_sensitivity_is_that_of_the_loop(batch, num_patches, number, chunk_size, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-4, 5, (batch, num_patches), generator=generator).float()
    table = torch.randn(batch, 2**num_patches, generator=generator).double()
    seen = []

    def value(coalitions):
        assert coalitions.shape[1] <= chunk_size
        seen.append(coalitions)
        codes = (coalitions * 2 ** torch.arange(num_patches)).sum(2)
        return table.gather(1, codes)

    sizes = [1, num_patches - 1, "all"]
    found = sensitivity_n(
        values,
        value,
        sizes=sizes,
        num_subsets=number,
        chunk_size=chunk_size,
        generator=generator,
    )
    kept = torch.cat(seen, dim=1).view(batch, 3, number, num_patches).numpy()
    for row, size in enumerate(sizes):
        for image in range(batch):
            sums, drops = [], []
            for present in kept[image, row]:
                absent = [n for n in range(num_patches) if not present[n]]
                assert size in ("all", len(absent))
                sums.append(sum(float(values[image, n]) for n in absent))
                full, rest = 2**num_patches - 1, sum(2**n for n in range(num_patches) if present[n])
                drops.append(float(table[image, full] - table[image, rest]))
            r, rho = stats.pearsonr(sums, drops).statistic, stats.spearmanr(sums, drops).statistic
            assert float(found.pearson[row, image]) == pytest.approx(r, nan_ok=True, abs=1e-7)
            assert float(found.spearman[row, image]) == pytest.approx(rho, nan_ok=True, abs=1e-7)


def test_an_additive_model_is_explained_perfectly():
    values = torch.randn(2, 28)
    found = sensitivity_n(values, additive(values), num_subsets=50)
    assert found.sizes == tuple(range(2, 28, 2))
    torch.testing.assert_close(found.pearson, torch.ones(13, 2).double())
    opposite = sensitivity_n(-values, additive(values), num_subsets=50, sizes=[3])
    torch.testing.assert_close(opposite.pearson, -torch.ones(1, 2).double())
    other = sensitivity_n(torch.randn(2, 28), additive(values), num_subsets=200, sizes=["all"])
    assert (other.pearson.abs() < 0.9).all()


def test_subsets_take_every_patch_alike():
    drawn = draw_subsets(2, 4000, 6, 2, torch.Generator().manual_seed(0))
    assert (drawn.sum(2) == 2).all()
    torch.testing.assert_close(drawn.float().mean(1), torch.full((2, 6), 1 / 3), atol=0.03, rtol=0)
    sizes = draw_subsets(1, 7000, 6, "all", torch.Generator().manual_seed(0)).sum(2)
    assert torch.bincount(sizes[0]).tolist() == pytest.approx([1000] * 7, abs=120)


def test_undefined_correlations_are_counted():
    with pytest.warns(UserWarning, match="2 of 4 correlations are undefined"):
        found = sensitivity_n(
            torch.stack((torch.ones(5), torch.arange(5.0))),
            additive(torch.randn(2, 5)),
            sizes=[1, 3],
            num_subsets=9,
        )
    assert found.undefined == 2 and found.pearson[:, 0].isnan().all()


def test_native_value_is_that_of_the_wrapped_model():
    case = make_case("vit-average", batch=3)
    wrapped = case.wrapped.train()
    coalitions = torch.rand(3, 5, wrapped.num_patches) < 0.5
    target = torch.tensor([2, 0, 4])
    expected = torch.stack(
        [
            wrapped.eval().value(case.images[i : i + 1], coalitions[i : i + 1])[0, :, target[i]]
            for i in range(3)
        ]
    )
    wrapped.train()
    for chunk_size in (1, 2, 7, 64):
        value = native_value(wrapped, case.images, target, chunk_size=chunk_size)
        torch.testing.assert_close(value(coalitions), expected, atol=2e-5, rtol=1e-4)
    assert all(module.training for module in wrapped.modules())
    assert not value(coalitions).requires_grad
    predicted = native_value(wrapped, case.images)(torch.ones(3, 1, wrapped.num_patches).bool())
    torch.testing.assert_close(
        predicted[:, 0], wrapped.eval()(case.images).amax(1), atol=2e-5, rtol=1e-4
    )


@pytest.mark.parametrize("probability", [True, False])
@pytest.mark.parametrize("fill", [0.0, 2, "image"])
def test_filled_value_is_that_of_painted_images(network, probability, fill):
    images, grid = torch.randn(3, 3, 4, 6), (2, 3)
    filler = torch.randn(3, 1, 1) if fill == "image" else fill
    coalitions = torch.rand(3, 5, 6) < 0.5
    target = torch.tensor([8, 0, 3])
    value = filled_value(
        network, images, target, grid=grid, fill=filler, probability=probability, chunk_size=4
    )
    network.train()
    found = value(coalitions)
    assert not found.requires_grad
    assert network.training
    network.eval()
    for image in range(3):
        for s in range(5):
            painted = images[image].clone()
            for n in range(6):
                if not coalitions[image, s, n]:
                    rows, columns = slice(2 * (n // 3), 2 * (n // 3) + 2), slice(2 * (n % 3), None)
                    block = painted[:, rows, columns][:, :, :2]
                    block.copy_(torch.as_tensor(filler).expand_as(block))
            output = network(painted[None])[0]
            output = output.softmax(0) if probability else output
            torch.testing.assert_close(found[image, s], output[target[image]].detach())


def test_value_function_errors(network):
    images = torch.randn(2, 3, 4, 6)
    with pytest.raises(BackboneTypeError, match="expected a ShapleyWrapper"):
        native_value(network, images)
    with pytest.raises(ArgumentError, match="broadcasts"):
        filled_value(network, images, grid=(2, 3), fill=torch.zeros(5))
    with pytest.raises(ArgumentError, match="chunk_size"):
        filled_value(network, images, grid=(2, 3), chunk_size=0)
    value = filled_value(network, images, grid=(2, 3))
    with pytest.raises(CoalitionError, match="coalitions"):
        value(torch.ones(len(images), 1, 5, dtype=torch.bool))
    with pytest.raises(TargetError):
        filled_value(network, images, 9, grid=(2, 3))
    with pytest.raises(ImageError, match="B >= 1"):
        filled_value(network, images[:0], grid=(2, 3))


@pytest.mark.parametrize(
    ("values", "options", "match"),
    [
        (torch.randn(5), {}, r"expected finite floats \[B, N\]"),
        (torch.full((1, 5), torch.nan), {}, "expected finite floats"),
        (torch.randn(2, 1), {}, "at least 2 patches"),
        (torch.randn(2, 5), {"sizes": [0]}, "sizes hold 0"),
        (torch.randn(2, 5), {"sizes": [5]}, "expected 1 to 4"),
        (torch.randn(2, 5), {"sizes": []}, "empty"),
        (torch.randn(2, 5), {"num_subsets": 1}, "num_subsets"),
        (torch.randn(2, 5), {"chunk_size": 0}, "chunk_size"),
    ],
)
def test_sensitivity_errors(values, options, match):
    with pytest.raises(ArgumentError, match=match):
        sensitivity_n(values, additive(torch.randn(2, 5)), **options)
    with pytest.raises(ArgumentError, match="value gives"):
        sensitivity_n(torch.randn(2, 5), lambda c: torch.zeros(2), num_subsets=4)
    with pytest.raises(ArgumentError, match="expected finite values"):
        sensitivity_n(torch.randn(2, 5), lambda c: c.sum(2) / 0.0, num_subsets=4)


# --- stability -------------------------------------------------------------------------------


def squares(images, target=None):
    """Channel sums of squares as values, at most four images at a time."""
    assert len(images) <= 4
    target = torch.zeros(len(images)).long() if target is None else target
    return SimpleNamespace(values=images.square().sum(1).flatten(1), target=target)


@given(
    batch=st.integers(1, 3),
    samples=st.integers(1, 5),
    chunk_size=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_stability_is_that_of_the_loop(batch, samples, chunk_size, seed):
    images = torch.randn(batch, 2, 3, 4, generator=torch.Generator().manual_seed(seed))
    seen = []

    def explainer(images, target=None):
        seen.append(images)
        return squares(images, target)

    found = stability(
        explainer,
        images,
        radius=0.1,
        num_samples=samples,
        chunk_size=chunk_size,
        generator=torch.Generator().manual_seed(seed),
    )
    noisy = torch.cat(seen[1:]).view(batch, samples, 2, 3, 4)
    assert ((noisy - images[:, None]).abs() <= 0.1 + 1e-6).all()
    for image in range(batch):
        clean = (images[image].numpy() ** 2).sum(0)
        changes = [
            np.linalg.norm((copy.numpy() ** 2).sum(0) - clean) / np.linalg.norm(clean)
            for copy in noisy[image]
        ]
        np.testing.assert_allclose(found.changes[image], changes, rtol=1e-5)
        assert float(found.maximum[image]) == pytest.approx(max(changes), rel=1e-5)
        assert float(found.mean[image]) == pytest.approx(np.mean(changes), rel=1e-5)


def test_stability_of_a_wrapped_model_grows_with_the_noise():
    case = make_case("own-nonlinear-head")
    explainer = SelfExplaining(case.wrapped)
    state = torch.get_rng_state()
    small, large = (
        stability(explainer, case.images, radius=radius, num_samples=4) for radius in (1e-3, 0.3)
    )
    assert (small.maximum < large.maximum).all() and (small.maximum > 0).all()
    again = stability(explainer, case.images, radius=1e-3, num_samples=4, chunk_size=3)
    torch.testing.assert_close(small.changes, again.changes, rtol=1e-3, atol=1e-6)
    assert torch.equal(state, torch.get_rng_state())


def test_the_class_of_the_clean_image_is_kept():
    targets = []

    def explainer(images, target=None):
        targets.append(target)
        return SimpleNamespace(
            values=images.flatten(1), target=torch.arange(3) if target is None else target
        )

    stability(explainer, torch.randn(3, 1, 2, 2), num_samples=2)
    assert targets[0] is None and targets[1].tolist() == [0, 0, 1, 1, 2, 2]


def test_zero_maps_have_no_relative_change():
    with pytest.warns(UserWarning, match="1 of 2 maps is undefined"):
        found = stability(
            squares, torch.stack((torch.zeros(1, 2, 2), torch.ones(1, 2, 2))), num_samples=2
        )
    assert found.maximum.isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    "options", [{"radius": 0}, {"radius": torch.inf}, {"num_samples": 0}, {"chunk_size": 0}]
)
def test_stability_errors(options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        stability(squares, torch.rand(1, 1, 2, 2), **options)
