"""ViT-Shapley and FastSHAP: losses, masks, no leak, what is learned, what is left alone."""

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from shapwrap import ShapleyWrapper, all_coalitions, exact_shapley_values
from shapwrap.errors import (
    ArgumentError,
    BackboneTypeError,
    GridError,
    ImageError,
    ImageTypeError,
    TrainingError,
    UnsupportedBackboneError,
)
from shapwrap.explainers import FastSHAP, FastSHAPConfig, ViTShapley, ViTShapleyConfig
from shapwrap.explainers.trained.links import linked
from shapwrap.explainers.trained.masks import sample_kernel, sample_uniform_sizes
from shapwrap.explainers.trained.objectives import (
    additive_efficient,
    explainer_losses,
    surrogate_loss,
)
from shapwrap.explainers.trained.pixel_surrogate import PixelSurrogate
from shapwrap.explainers.trained.token_surrogate import TokenSurrogate
from shapwrap.explainers.trained.unet import UNet
from tests.backbones import SQUARE_KINDS, build
from tests.trained_models import (
    GRID,
    NUM_CLASSES,
    NUM_PATCHES,
    READ,
    SIZE,
    convolutional,
    fastshap_config,
    images,
    stage,
    transformer,
    vit_config,
)


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """accelerate keeps one state a process; each test starts as a new process would."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


DATA = [images(6, seed) for seed in range(2)]
TRAINED = {
    "vit-shapley": lambda data=DATA, **s: ViTShapley.train(
        transformer(), data, config=vit_config(**s)
    ),
    "fastshap": lambda data=DATA, **s: FastSHAP.train(
        convolutional(), data, config=fastshap_config(**s), grid=GRID
    ),
}


# --- losses and masks -----------------------------------------------------------------------


shapes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(2, 6), st.integers(1, 4))


@given(shapes, st.integers(0, 100))
def test_surrogate_loss_is_the_mean_divergence(shape, seed):
    batch, num, _, classes = shape
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, num, classes, generator=generator)
    original = 3 * torch.randn(batch, classes, generator=generator)
    found = surrogate_loss(logits, original).item()
    total = 0.0
    for b in range(batch):
        p = np.exp(original[b].double().numpy())
        p /= p.sum()
        for s in range(num):
            q = np.exp(logits[b, s].double().numpy())
            q /= q.sum()
            total += sum(p[k] * (np.log(p[k]) - np.log(q[k])) for k in range(classes))
    assert found == pytest.approx(total / (batch * num), rel=1e-4, abs=1e-6)


@given(shapes, st.integers(0, 100))
def test_explainer_losses_against_loops(shape, seed):
    batch, num, patches, classes = shape
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(batch, patches, classes, generator=generator)
    empty, full = torch.randn(2, batch, classes, generator=generator)
    values = torch.randn(batch, num, classes, generator=generator)
    coalitions = torch.rand(batch, num, patches, generator=generator) < 0.5
    regression, efficiency = explainer_losses(raw, empty, full, coalitions, values)
    phi = raw.double().numpy().copy()
    gaps, errors = [], []
    for b in range(batch):
        for k in range(classes):
            gain = float(full[b, k]) - float(empty[b, k])
            gap = sum(phi[b, :, k]) - gain
            gaps.append(gap**2)
            for n in range(patches):
                phi[b, n, k] -= gap / patches
            assert sum(phi[b, :, k]) == pytest.approx(gain, abs=1e-6)
            for s in range(num):
                estimate = float(empty[b, k])
                for n in range(patches):
                    estimate += phi[b, n, k] if coalitions[b, s, n] else 0.0
                errors.append((estimate - float(values[b, s, k])) ** 2)
    assert regression.item() == pytest.approx(patches * np.mean(errors), rel=1e-4, abs=1e-6)
    assert efficiency.item() == pytest.approx(patches * np.mean(gaps), rel=1e-4, abs=1e-6)


def test_normalisation_is_exact_and_lets_gradients_through():
    raw = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    gain = torch.randn(2, 3, dtype=torch.float64)
    phi = additive_efficient(raw, gain)
    torch.testing.assert_close(phi.sum(1), gain, rtol=0, atol=1e-14)
    phi[0, 0, 0].backward()
    expected = torch.full((5,), -1 / 5, dtype=torch.float64)
    expected[0] += 1
    torch.testing.assert_close(raw.grad[0, :, 0], expected)
    assert raw.grad[0, :, 1:].count_nonzero() == 0


def test_uniform_sizes_include_empty_and_full():
    generator = torch.Generator().manual_seed(0)
    drawn = sample_uniform_sizes(4000, 7, 5, generator=generator)
    assert drawn.shape == (4000, 5, 7)
    frequencies = torch.bincount(drawn.sum(-1).flatten(), minlength=8) / drawn[..., 0].numel()
    torch.testing.assert_close(frequencies, torch.full((8,), 1 / 8), rtol=0, atol=0.01)


def test_published_masks_have_the_published_fault_and_exact_ones_have_not():
    generator = torch.Generator().manual_seed(0)
    options = {"paired": False, "generator": generator}
    drawn = sample_kernel(20000, 196, 1, distribution="vit-shapley", **options)[:, 0]
    assert drawn.all(1).double().mean().item() == pytest.approx(0.107, abs=0.01)
    assert (~drawn).all(1).double().mean().item() == pytest.approx(0.014, abs=0.004)
    exact = sample_kernel(20000, 196, 1, distribution="shapley", **options)[:, 0]
    assert not (exact.all(1) | (~exact).all(1)).any()
    assert (exact.sum(1) == 1).double().mean().item() == pytest.approx(0.086, abs=0.008)


@pytest.mark.parametrize("distribution", ["shapley", "vit-shapley"])
def test_pairs_are_complements_within_an_image(distribution):
    drawn = sample_kernel(
        3,
        8,
        6,
        distribution=distribution,
        paired=True,
        generator=torch.Generator().manual_seed(0),
    )
    assert drawn.shape == (3, 6, 8)
    assert torch.equal(drawn[:, 0::2], ~drawn[:, 1::2])


# --- surrogates -----------------------------------------------------------------------------


def _coalitions(batch, num_patches, num=4, seed=0):
    """Of all sizes, empty and full included, in pairs."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(batch, num, num_patches, generator=generator) < 0.5
    drawn[:, 0], drawn[0, 1] = True, False
    return torch.stack((drawn, ~drawn), dim=2).flatten(1, 2)


def _other_pixels(pixels, coalition, grid):
    """The same image with other values in absent patches, [C, H, W]."""
    rows, columns = grid
    height, width = pixels.shape[1] // rows, pixels.shape[2] // columns
    changed = pixels.clone()
    for n in range(rows * columns):
        if not coalition[n]:
            top, left = n // columns * height, n % columns * width
            changed[:, top : top + height, left : left + width] = 37.0 * (n + 1)
    return changed


TOKEN_KINDS = [
    "vit-class-token",
    "vit-registers",
    "vit-average-norm-registers",
    "vit-average-map-registers",
    "eva-class-token",
    "beit-class-token",
    "convit-class-token",
    "hiera-average",
    "torchvision-vit",
]


@pytest.mark.parametrize("kind", TOKEN_KINDS)
def test_token_surrogate_sees_present_patches_alone(kind):
    model, size = build(kind, (3, 3) if kind in SQUARE_KINDS else (2, 3))
    surrogate = TokenSurrogate(model, size)
    batch = torch.randn(2, 3, *size)
    coalitions = _coalitions(2, surrogate.grid[0] * surrogate.grid[1])
    with torch.no_grad():
        logits = surrogate(batch, coalitions)
        torch.testing.assert_close(logits[:, 0], model(batch), rtol=1e-4, atol=1e-5)
        pairs = surrogate(batch, coalitions, paired=True)
        torch.testing.assert_close(pairs, logits, rtol=1e-4, atol=1e-5)
        for b in range(2):
            for s in range(coalitions.shape[1]):
                changed = _other_pixels(batch[b], coalitions[b, s], surrogate.grid)[None]
                asked = coalitions[b : b + 1, s : s + 1]
                alone = surrogate(batch[b : b + 1], asked)
                assert torch.equal(surrogate(changed, asked), alone)
                torch.testing.assert_close(alone[0, 0], logits[b, s], rtol=1e-4, atol=1e-5)
    empty, full = surrogate.ends(batch, chunk_size=1)
    torch.testing.assert_close(full, logits[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(empty[0], empty[1])


def test_token_surrogate_equals_gathering_tokens_by_hand():
    model = transformer(reg_tokens=1)
    surrogate = TokenSurrogate(model, SIZE)
    batch, coalitions = images(2), _coalitions(2, NUM_PATCHES)
    with torch.no_grad():
        found = surrogate(batch, coalitions, paired=True)
        for b in range(2):
            for s in range(coalitions.shape[1]):
                tokens = model._pos_embed(model.patch_embed(batch[b : b + 1]))
                kept = [0, 1] + [2 + n for n in range(NUM_PATCHES) if coalitions[b, s, n]]
                tokens = tokens[:, kept]
                for block in model.blocks:
                    tokens = block(tokens)
                expected = model.head(model.norm(tokens)[:, 0])[0]
                torch.testing.assert_close(found[b, s], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask_channel", [False, True])
def test_pixel_surrogate_sees_present_cells_alone(mask_channel):
    model = convolutional()
    surrogate = PixelSurrogate(model, GRID, channels=3, mask_channel=mask_channel).eval()
    if mask_channel:
        assert surrogate.model.brightness.in_channels == 4
        assert model.brightness.in_channels == 3
        assert model.brightness.weight.shape[1] == 3
    batch, coalitions = images(2), _coalitions(2, NUM_PATCHES)
    with torch.no_grad():
        logits = surrogate(batch, coalitions)
        for b in range(2):
            for s in range(coalitions.shape[1]):
                changed = _other_pixels(batch[b], coalitions[b, s], GRID)
                masked = torch.where(changed == batch[b], changed, 0.0)
                # The weights of the mask channel start at zero.
                torch.testing.assert_close(logits[b, s], model(masked[None])[0])
                asked = coalitions[b : b + 1, s : s + 1]
                again = surrogate(changed[None], asked)
                assert torch.equal(again, surrogate(batch[b : b + 1], asked))
        if mask_channel:
            surrogate.model.brightness.weight[:, 3] = 1.0
            assert not torch.allclose(surrogate(batch, coalitions), logits)
    for chunk_size in (1, 3, 100):
        parts = surrogate.evaluate(batch, coalitions, paired=True, chunk_size=chunk_size)
        whole = surrogate.evaluate(batch, coalitions, paired=False, chunk_size=1000)
        torch.testing.assert_close(parts, whole)


def test_pixels_beyond_the_patches_are_always_seen():
    surrogate = PixelSurrogate(lambda x: x.flatten(1), (2, 2), channels=1, covered=(4, 4))
    batch = torch.randn(2, 1, 5, 4)
    empty, full = surrogate.ends(batch, chunk_size=4)
    expected = batch.clone()
    expected[:, :, :4] = 0
    assert torch.equal(empty, expected.flatten(1))
    assert torch.equal(full, batch.flatten(1))


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))
def test_unet_gives_a_value_a_class_and_cell(rows, columns, height, width):
    size = (rows * height, columns * width)
    network = UNet(2, 3, size, (rows, columns), width=2).eval()
    batch = torch.randn(2, 2, *size)
    with torch.no_grad():
        found = network(batch)
        assert found.shape == (2, rows * columns, 3)
        torch.testing.assert_close(found[1:], network(batch[1:]), rtol=1e-4, atol=1e-5)


# --- what is learned ------------------------------------------------------------------------


def _truth(explainer, batch, target):
    """Shapley values of the surrogate by enumeration, [B, N]."""
    coalitions = all_coalitions(NUM_PATCHES)[None].expand(len(batch), -1, -1)
    logits = explainer.surrogate.evaluate(batch, coalitions, paired=False, chunk_size=4096)
    values = linked(logits, explainer.config.link)
    exact = [exact_shapley_values(values[i])[:, target[i]] for i in range(len(batch))]
    return torch.stack(exact)


def _agreement(explainer, batch):
    found = explainer(batch)
    truth = _truth(explainer, batch, found.target)
    both = torch.stack((found.values.flatten(), truth.flatten()))
    return torch.corrcoef(both)[0, 1].item(), found, truth


@pytest.mark.parametrize("link", ["probability", "logit"])
def test_vit_shapley_learns_the_shapley_values_of_its_surrogate(link):
    data = [images(32, seed) for seed in range(8)]
    test = images(6, 99)
    agreement = {}
    for rate in (0.0, 3e-3):
        config = vit_config(
            surrogate={"learning_rate": 1e-4},
            explainer={"epochs": 12, "learning_rate": rate, "max_steps": None if rate else 1},
            num_masks=8,
            link=link,
        )
        trained = ViTShapley.train(transformer(), data, config=config)
        agreement[rate] = _agreement(trained, test)[0]
    assert agreement[3e-3] > 0.85
    assert agreement[3e-3] > agreement[0.0] + 0.3


def test_fastshap_learns_the_shapley_values_of_its_surrogate():
    data = [images(32, seed, coarse=True) for seed in range(12)]
    test = images(6, 99, coarse=True)
    agreement = {}
    for rate in (0.0, 1e-2):
        config = fastshap_config(
            surrogate={"learning_rate": 1e-4},
            explainer={"epochs": 12, "learning_rate": rate, "max_steps": None if rate else 1},
            num_masks=8,
            width=8,
        )
        trained = FastSHAP.train(convolutional(), data, config=config, grid=GRID, chunk_size=1024)
        agreement[rate], found, _ = _agreement(trained, test)
    assert agreement[1e-2] > 0.8
    assert agreement[1e-2] > agreement[0.0] + 0.3
    # The evidence is where the model looks.
    share = found.values.abs().mean(0)
    assert share[READ].sum() > 3 * (share.sum() - share[READ].sum())


def test_surrogate_learns_to_answer_for_masked_images():
    model = transformer()
    data = [images(16, seed) for seed in range(6)]
    losses = {}
    for rate in (0.0, 3e-3):
        config = vit_config(
            surrogate={"learning_rate": rate, "epochs": 8},
            explainer={"max_steps": 1},
        )
        trained = ViTShapley.train(model, data, config=config)
        batch = images(32, 50)
        generator = torch.Generator().manual_seed(3)
        coalitions = sample_uniform_sizes(32, NUM_PATCHES, 16, generator=generator)
        logits = trained.surrogate.evaluate(batch, coalitions, paired=False, chunk_size=64)
        losses[rate] = surrogate_loss(logits, model(batch).detach()).item()
        records = trained.history["surrogate"]
        assert len(records) == 48
        assert trained.history["explainer"][0]["regression_loss"] >= 0
    assert losses[3e-3] < 0.8 * losses[0.0]


# --- the explanation ------------------------------------------------------------------------


@pytest.mark.parametrize("method", TRAINED)
def test_values_add_up_and_batches_do_not_matter(method):
    explainer = TRAINED[method]()
    batch = images(3, 9)
    target = torch.tensor([2, 0, 1])
    found = explainer(batch, target)
    assert found.values.shape == (3, NUM_PATCHES)
    assert found.values.dtype == torch.float32
    assert found.grid == GRID
    assert found.method == method
    assert found.heatmap().shape == (3, *SIZE)
    assert found.efficiency_gap().max() < 1e-5
    ends = torch.zeros(3, 2, NUM_PATCHES, dtype=torch.bool)
    ends[:, 1] = True
    logits = explainer.surrogate.evaluate(batch, ends, paired=False, chunk_size=4)
    values = linked(logits, explainer.config.link)
    gain = (values[:, 1] - values[:, 0]).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(found.total, gain, rtol=1e-4, atol=1e-6)
    explainer.chunk_size = 1
    for i in range(3):
        alone = explainer(batch[i : i + 1], int(target[i]))
        torch.testing.assert_close(alone.values[0], found.values[i], rtol=1e-4, atol=1e-6)
    predicted = explainer(batch)
    assert torch.equal(predicted.target, predicted.logits.argmax(1))
    assert torch.equal(explainer(batch, target).values, explainer(batch, target).values)


@pytest.mark.parametrize("method", TRAINED)
def test_seeds_reproduce(method):
    def run(seed, data=DATA):
        torch.manual_seed(torch.randint(1000, ()).item())
        return TRAINED[method](data, surrogate={"seed": seed}, explainer={"seed": seed})

    first, again, other = run(1).state_dict(), run(1).state_dict(), run(2).state_dict()
    assert first.keys() == again.keys() == other.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_labels_are_not_read_and_loaders_are():
    labelled = [(batch, torch.zeros(len(batch))) for batch in DATA]
    loader = DataLoader(TensorDataset(torch.cat(DATA)), batch_size=6)
    states = [TRAINED["fastshap"](data).state_dict() for data in (DATA, labelled, loader)]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
        assert torch.equal(tensor, states[2][name]), name


def _numpy_state():
    return np.random.get_state()[1].copy()  # noqa: NPY002 - the state that must not move


def _traces(model):
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [module.training for module in model.modules()],
        [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        [getattr(m, "fused_attn", None) for m in model.modules()],
    )


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("method", TRAINED)
def test_the_model_and_the_random_states_are_left_alone(method, frozen):
    model = transformer() if method == "vit-shapley" else convolutional()
    next(model.children()).train()
    if frozen:
        model.requires_grad_(False)
    before = _traces(model)
    torch.manual_seed(5)
    # Python's own state is moved by the type checks that the tests run with.
    global_states = torch.get_rng_state(), _numpy_state()
    data = DataLoader(TensorDataset(torch.cat(DATA)), batch_size=6, shuffle=True)
    if method == "vit-shapley":
        explainer = ViTShapley.train(model, data, config=vit_config())
    else:
        explainer = FastSHAP.train(model, data, config=fastshap_config(), grid=GRID)
    explainer(images(2))
    after = _traces(model)
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1:] == after[1:]
    assert torch.equal(torch.get_rng_state(), global_states[0])
    assert (_numpy_state() == global_states[1]).all()
    trained = {id(p) for p in explainer.surrogate.parameters()}
    assert not trained & {id(p) for p in model.parameters()}
    start = {f"model.{name}": tensor for name, tensor in before[0].items()}
    moved = explainer.surrogate.state_dict()
    assert any(not torch.equal(start[name], moved[name]) for name in start)


@pytest.mark.parametrize("method", TRAINED)
def test_state_is_saved_and_loaded(method):
    explainer = TRAINED[method](surrogate={"epochs": 2})
    batch = images(2, 9)
    if method == "vit-shapley":
        fresh = ViTShapley(transformer(), config=explainer.config)
    else:
        fresh = FastSHAP(convolutional(), config=explainer.config, grid=GRID)
    with pytest.raises(TrainingError, match=r"not trained; call fit\(data\)"):
        fresh(batch)
    with pytest.raises(ArgumentError, match="image_shape"):
        fresh.load_state_dict({})
    state = explainer.state_dict()
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    loaded = fresh.load_state_dict(state)
    assert torch.equal(loaded(batch, 1).values, explainer(batch, 1).values)
    other = {name: tensor for name, tensor in state.items() if not name.endswith("weight")}
    with pytest.raises(ArgumentError, match="does not fit"):
        fresh.load_state_dict(other)


def test_a_run_is_resumed(tmp_path):
    def settings(folder):
        return vit_config(
            surrogate={"output_dir": folder / "surrogate"},
            explainer={"output_dir": folder / "explainer", "epochs": 2, "checkpoint_every": 1},
        )

    whole = ViTShapley.train(transformer(), DATA, config=settings(tmp_path / "whole"))
    config = settings(tmp_path / "parts")
    stopped = [DATA[0], torch.full_like(DATA[1], torch.nan)]
    # The surrogate's stage is finished; the explainer's dies in its second step.
    ViTShapley.train(
        transformer(),
        DATA,
        config=vit_config(
            surrogate={"output_dir": tmp_path / "parts" / "surrogate"},
            explainer={"max_steps": 1},
        ),
    )
    with pytest.raises(TrainingError, match="not finite"):
        ViTShapley(transformer(), config=config).fit(stopped, resume=True)
    resumed = ViTShapley(transformer(), config=config).fit(DATA, resume=True)
    state, expected = resumed.state_dict(), whole.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    with pytest.raises(TrainingError, match="earlier run"):
        ViTShapley.train(transformer(), DATA, config=config)


# --- other models, precisions and links -----------------------------------------------------


def test_a_function_is_explained_without_a_trained_surrogate():
    weight = torch.randn(NUM_PATCHES, NUM_CLASSES, generator=torch.Generator().manual_seed(0))

    def function(batch):
        return nn.functional.avg_pool2d(batch.mean(1), 4).flatten(1) @ weight

    config = FastSHAPConfig(
        surrogate=None, explainer=stage(epochs=2), link="logit", width=4, num_masks=4
    )
    explainer = FastSHAP.train(function, DATA, config=config, grid=GRID)
    batch = images(2)
    found = explainer(batch, 1)
    # v(1) - v(0) of the function itself; zero images give zero logits.
    torch.testing.assert_close(found.total, function(batch)[:, 1])
    assert explainer.history["surrogate"] == []
    trained = FastSHAPConfig(surrogate=stage(), explainer=stage())
    with pytest.raises(UnsupportedBackboneError, match="surrogate=None"):
        FastSHAP.train(function, DATA, config=trained, grid=GRID)
    with pytest.raises(ArgumentError, match=r"pass grid=\(rows, columns\)"):
        FastSHAP.train(function, DATA, config=config)
    with pytest.raises(UnsupportedBackboneError, match="expected a ViT"):
        ViTShapley(function)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precisions(dtype):
    model = convolutional().to(dtype)
    explainer = FastSHAP.train(model, DATA, config=fastshap_config(), grid=GRID)
    found = explainer(images(2).to(dtype), 0)
    assert found.values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.efficiency_gap().max() < 1e-5
    assert next(model.parameters()).dtype == dtype


def test_autocast_in_training():
    half = {"precision": "bf16"}
    explainer = TRAINED["vit-shapley"](surrogate=half, explainer=half)
    assert explainer(images(2)).efficiency_gap().max() < 1e-5
    assert all(record["loss"] > 0 for record in explainer.history["explainer"])


@pytest.mark.parametrize("link", ["probability", "log-probability", "logit"])
def test_links(link):
    explainer = TRAINED["fastshap"](link=link)
    found = explainer(images(2), 1)
    full = explainer.surrogate.ends(images(2), chunk_size=8)[1]
    empty = explainer.surrogate.ends(images(2), chunk_size=8)[0]
    make = {
        "probability": lambda x: x.softmax(-1),
        "log-probability": lambda x: x.softmax(-1).log(),
        "logit": lambda x: x,
    }[link]
    torch.testing.assert_close(found.total, (make(full) - make(empty))[:, 1])


def test_grid_of_the_backbone_is_the_default():
    model, size = build("resnet", (1, 2))
    explainer = FastSHAP.train(model, [torch.randn(2, 3, *size)], config=fastshap_config())
    assert explainer(torch.randn(1, 3, *size)).grid == (1, 2)


def test_a_wrapped_model_can_be_compared_with_itself():
    wrapped = ShapleyWrapper(transformer(class_token=False, global_pool="avg", fc_norm=False))
    explainer = FastSHAP.train(wrapped, DATA, config=fastshap_config())
    found = explainer(images(2))
    assert found.grid == GRID
    torch.testing.assert_close(found.logits, wrapped(images(2)))


# --- what a user can get wrong --------------------------------------------------------------


def test_wrong_models():
    with pytest.raises(BackboneTypeError, match="explains itself"):
        ViTShapley(ShapleyWrapper(transformer()))
    model, size = build("resnet", (1, 2))
    data = [torch.randn(2, 3, *size)]
    with pytest.raises(UnsupportedBackboneError, match="Use FastSHAP"):
        ViTShapley.train(model, data, config=vit_config())
    model, size = build("cait-class-token", (2, 3))
    with pytest.raises(UnsupportedBackboneError, match="Use FastSHAP"):
        ViTShapley.train(model, [torch.randn(2, 3, *size)], config=vit_config())
    with pytest.raises(UnsupportedBackboneError, match="mask_channel=False"):
        FastSHAP.train(
            nn.Sequential(nn.Flatten(), nn.Linear(384, 3)),
            DATA,
            config=fastshap_config(mask_channel=True),
            grid=GRID,
        )
    with pytest.raises(GridError, match="at least one pixel"):
        FastSHAP.train(convolutional(), DATA, config=fastshap_config(), grid=(9, 4))


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ([], TrainingError, "empty"),
        (iter(DATA), TrainingError, "once an epoch"),
        (["images"], TrainingError, r"expected images \[B, C, H, W\]"),
        ([DATA[0][0]], TrainingError, r"expected images \[B, C, H, W\]"),
        ([(DATA[0] * 10).long()], ImageTypeError, "floating point"),
        ([DATA[0], (DATA[0] * 10).long()], ImageTypeError, "floating point"),
        ([DATA[0], DATA[0][..., :8]], ImageError, "expected one size"),
        ([DATA[0] * torch.nan], ImageError, "NaN"),
    ],
)
def test_wrong_data(data, error, words):
    with pytest.raises(error, match=words):
        TRAINED["fastshap"](data)


def test_wrong_images():
    explainer = TRAINED["fastshap"]()
    with pytest.raises(ImageError, match="trained on images"):
        explainer.attribute(torch.randn(1, 3, 16, 8), torch.tensor([0]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_masks": 3}, "come in twos"),
        ({"num_masks": 0}, "num_masks is 0"),
        ({"surrogate_masks": 0}, "surrogate_masks is 0"),
        ({"link": "softmax"}, "expected one of"),
        ({"distribution": "uniform"}, "expected one of"),
        ({"efficiency_weight": -1.0}, "efficiency_weight is -1"),
        ({"surrogate": stage(output_dir="x"), "explainer": stage(output_dir="x")}, "for each"),
    ],
)
@pytest.mark.parametrize("kind", [ViTShapleyConfig, FastSHAPConfig])
def test_wrong_settings(kind, settings, words):
    with pytest.raises(ArgumentError, match=words):
        kind(**settings)


def test_wrong_settings_of_one_method():
    with pytest.raises(ArgumentError, match="width is 0"):
        FastSHAPConfig(width=0)
    with pytest.raises(ArgumentError, match="mask_channel=True"):
        FastSHAPConfig(surrogate=None, mask_channel=True)
    with pytest.raises(ArgumentError, match="mlp_ratio is 0"):
        ViTShapleyConfig(mlp_ratio=0.0)
