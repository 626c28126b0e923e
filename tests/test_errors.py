"""Every bad input of the contract: its own type, what came, what was expected, what to do."""

import pytest
import timm
import torch
from torch import nn

from shapwrap import ShapleyOutput, ShapleyWrapper, ShapwrapError, shapley_loss
from shapwrap.errors import (
    ArgumentError,
    BackboneTypeError,
    CoalitionError,
    CoalitionTypeError,
    GridError,
    ImageError,
    ImageTypeError,
    MaskingError,
    MissingHeadError,
    PlotError,
    ReadoutError,
    TargetError,
    UnsupportedBackboneError,
)
from tests.backbones import make_case


def _test_vit(**options):
    return timm.create_model("test_vit", num_classes=3, **options)


WRAPPING = [
    ("a class", lambda: ShapleyWrapper(nn.Linear), BackboneTypeError, TypeError, "an instance"),
    (
        "not a module",
        lambda: ShapleyWrapper("resnet50"),
        BackboneTypeError,
        TypeError,
        "create_model",
    ),
    (
        "wrapped twice",
        lambda: ShapleyWrapper(ShapleyWrapper(_test_vit())),
        BackboneTypeError,
        TypeError,
        "wrapped already",
    ),
    (
        "no classifier",
        lambda: ShapleyWrapper(timm.create_model("test_vit", num_classes=0)),
        MissingHeadError,
        ValueError,
        "head=nn.Linear",
    ),
    (
        "a grid that is no multiple",
        lambda: ShapleyWrapper(timm.create_model("test_resnet"), grid=(7, 9)),
        GridError,
        ValueError,
        "out of reach",
    ),
    (
        "removal of what was mixed",
        lambda: ShapleyWrapper(timm.create_model("test_resnet"), masking="token-removal"),
        MaskingError,
        ValueError,
        "mixes patches",
    ),
    (
        "a size that is refused",
        lambda: ShapleyWrapper(_test_vit(), image_size=(50, 50), masking="zero-mask"),
        ImageError,
        ValueError,
        "refuses images of 50 x 50",
    ),
    (
        "a readout that is not exact",
        lambda: ShapleyWrapper(timm.create_model("test_convnext"), readout="affine"),
        ReadoutError,
        ValueError,
        "not exact",
    ),
    (
        "an unknown readout",
        lambda: ShapleyWrapper(_test_vit(), readout="x"),
        ReadoutError,
        ValueError,
        "'x'",
    ),
    (
        "an unknown masking",
        lambda: ShapleyWrapper(_test_vit(), masking="x"),
        ArgumentError,
        ValueError,
        "'x'",
    ),
    (
        "an unknown prefix policy",
        lambda: ShapleyWrapper(_test_vit(), prefix_tokens="x"),
        ArgumentError,
        ValueError,
        "'auto', 'drop' or 'keep'",
    ),
    (
        "head and classes",
        lambda: ShapleyWrapper(_test_vit(), head=nn.Linear(64, 2), num_classes=2),
        ArgumentError,
        ValueError,
        "one of them",
    ),
    (
        "a head that is not linear",
        lambda: ShapleyWrapper(_test_vit(), head=nn.Sequential(nn.Linear(64, 2), nn.Tanh())),
        ReadoutError,
        ValueError,
        "Tanh",
    ),
    (
        "a head that is no module",
        lambda: ShapleyWrapper(_test_vit(), head=len),
        BackboneTypeError,
        TypeError,
        "head is",
    ),
    (
        "a grid of one number",
        lambda: ShapleyWrapper(_test_vit(), grid=7),
        ArgumentError,
        ValueError,
        "rows first",
    ),
    (
        "no classes",
        lambda: ShapleyWrapper(_test_vit(), num_classes=0),
        ArgumentError,
        ValueError,
        "num_classes is 0",
    ),
    (
        "an unknown module",
        lambda: ShapleyWrapper(nn.Linear(3, 3)),
        UnsupportedBackboneError,
        ValueError,
        "expected a vision model",
    ),
]


@pytest.mark.parametrize(
    ("act", "error", "builtin", "words"),
    [row[1:] for row in WRAPPING],
    ids=[r[0] for r in WRAPPING],
)
def test_wrapping(act, error, builtin, words):
    with pytest.raises(error) as caught:
        act()
    assert isinstance(caught.value, ShapwrapError)
    assert isinstance(caught.value, builtin)
    assert words in str(caught.value)


@pytest.fixture(scope="module")
def case():
    return make_case("vit-average", grid=(2, 2))


BAD_IMAGES = [
    ("integer", torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ImageTypeError, "Divide by 255"),
    ("a list", [[1.0]], ImageTypeError, "list"),
    ("one image", torch.zeros(3, 8, 8), ImageError, "images[None]"),
    ("no image", torch.zeros(0, 3, 8, 8), ImageError, "B >= 1"),
    ("grey", torch.zeros(2, 1, 8, 8), ImageError, "1 channels"),
    ("another size", torch.zeros(2, 3, 16, 16), ImageError, "refuses images of 16 x 16"),
    ("another device", torch.zeros(2, 3, 8, 8, device="meta"), ImageError, "meta"),
]


@pytest.mark.parametrize(
    ("images", "error", "words"), [r[1:] for r in BAD_IMAGES], ids=[r[0] for r in BAD_IMAGES]
)
@pytest.mark.parametrize("method", ["forward", "attribute", "value", "explain", "audit"])
def test_images(case, images, error, words, method):
    call = getattr(case.wrapped, method)
    arguments = (torch.ones(2, 1, 4, dtype=torch.bool),) if method == "value" else ()
    with pytest.raises(error) as caught:
        call(images, *arguments)
    assert words in str(caught.value)
    assert isinstance(caught.value, TypeError if error is ImageTypeError else ValueError)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_images(case, bad):
    images = case.images.clone()
    images[1, 0, 3, 3] = bad
    coalitions = torch.ones(2, 1, 4, dtype=torch.bool)
    for call in (
        case.wrapped.attribute,
        case.wrapped.explain,
        case.wrapped.audit,
        lambda images: case.wrapped.value(images, coalitions),
    ):
        with pytest.raises(ImageError, match=r"images \[1\] contain NaN or infinity"):
            call(images)
    assert not case.wrapped(images).isfinite().all(), "a training step does not look"


@pytest.mark.parametrize(
    ("coalitions", "error", "words"),
    [
        (torch.ones(2, 2, 4), CoalitionTypeError, "torch.float32"),
        ([[True]], CoalitionTypeError, "list"),
        (torch.ones(2, 4, dtype=torch.bool), CoalitionError, "(2, 4)"),
        (torch.ones(2, 2, 5, dtype=torch.bool), CoalitionError, "[2, S >= 1, 4]"),
        (torch.ones(1, 2, 4, dtype=torch.bool), CoalitionError, "(1, 2, 4)"),
        (torch.ones(2, 0, 4, dtype=torch.bool), CoalitionError, "(2, 0, 4)"),
    ],
)
def test_coalitions(case, coalitions, error, words):
    for call in (case.wrapped, case.wrapped.value):
        with pytest.raises(error) as caught:
            call(case.images, coalitions)
        assert words in str(caught.value)


def test_other_arguments(case):
    model = timm.create_model("test_vit", num_classes=3, global_pool="avg")
    with pytest.raises(ReadoutError, match=r"expected nn.Linear\(64, classes\)"):
        ShapleyWrapper(model, head=nn.Linear(7, 3))
    with pytest.raises(ArgumentError, match="class_names has 2 names; expected 3"):
        ShapleyWrapper(model, class_names=["a", "b"])
    for bad in ("5", 5.0):
        with pytest.raises(ArgumentError, match="expected an int"):
            ShapleyWrapper(model, num_classes=bad)
    with pytest.raises(ImageTypeError, match=r"torch\.float64, the model is torch\.float32"):
        case.wrapped(case.images.double())
    same = torch.ones(2, 2, 4, dtype=torch.bool)
    with pytest.raises(CoalitionError, match="not the complement"):
        case.wrapped(case.images, same, paired=True)
    explanation = case.wrapped.explain(case.images)
    with pytest.raises(PlotError, match="class_names has 1 names"):
        explanation.plot(case.images, normalization=((0.5,) * 3, (0.2,) * 3), class_names=["a"])


def test_batch_norm_without_statistics():
    model = timm.create_model("test_resnet", num_classes=3)
    model.bn1 = nn.BatchNorm2d(model.bn1.num_features, track_running_stats=False)
    with pytest.raises(UnsupportedBackboneError, match="bn1 of ResNet"):
        ShapleyWrapper(model)


def test_odd_number_of_pairs(case):
    with pytest.raises(CoalitionError, match="paired=True with 3"):
        case.wrapped(case.images, torch.ones(2, 3, 4, dtype=torch.bool), paired=True)
    with pytest.raises(ArgumentError, match="even number"):
        case.wrapped.audit(case.images, num_coalitions=3)
    with pytest.raises(ArgumentError, match="chunk_size is 1"):
        case.wrapped.audit(case.images, chunk_size=1)
    with pytest.raises(ArgumentError, match="chunk_size is 0"):
        case.wrapped.value(case.images, torch.ones(2, 2, 4, dtype=torch.bool), chunk_size=0)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (5, "classes 0 to 4"),
        (-1, "from -1"),
        (torch.tensor([0, 9]), "classes 0 to 4"),
        (torch.tensor([0, 1, 2]), "2 images"),
        (torch.tensor([0.0, 1.0]), "class indices"),
        (2.9, "class indices"),
        ([1.5, 0.2], "class indices"),
        (True, "class indices"),
        ("cat", "class indices"),
    ],
)
def test_targets(case, target, words):
    with pytest.raises(TargetError) as caught:
        case.wrapped.explain(case.images, target)
    assert words in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_loss(case):
    with pytest.raises(ArgumentError, match="Without coalitions"):
        shapley_loss(case.wrapped(case.images))
    zeros = torch.zeros(2, 2, 5)
    with pytest.raises(ArgumentError, match="'median'"):
        shapley_loss(ShapleyOutput(zeros[:, 0], zeros, zeros), reduction="median")


def test_plots(case):
    explanation = case.wrapped.explain(case.images)
    with pytest.raises(PlotError, match="pass normalization"):
        explanation.plot(case.images)
    with pytest.raises(PlotError, match="channels"):
        explanation.plot(case.images, normalization=((0.5,), (0.5,)))
    with pytest.raises(ImageError, match="that were explained"):
        explanation.plot(case.images[:1])
    with pytest.raises(ArgumentError, match="height, width"):
        explanation.heatmap((0, 4))
