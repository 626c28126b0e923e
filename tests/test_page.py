"""Explanations as files: what a page holds, how exactly, how large it is, and what is refused."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from shapwrap import Audit, ShapleyCLIP
from shapwrap.errors import ArgumentError, ImageError, PlotError
from shapwrap.page.class_values import LEVELS, quantize
from shapwrap.page.template import SCRIPTS
from shapwrap.page.trust import trust_of
from tests.backbones import make_case
from tests.clip_models import clip_model, images_of, tokens
from tests.reports import HOSTILE, counts, floats, held, made_explanation, pictures


@pytest.mark.parametrize("kind", ["resnet", "vit-class-token"])
@pytest.mark.parametrize("contrast", [False, True])
def test_values_of_all_classes(kind, contrast):
    case = make_case(kind, grid=(2, 3))
    modes = [module.training for module in case.wrapped.modules()]
    explanation = case.wrapped.explain(case.images, 1, contrast=contrast, all_classes=True)
    expected = case.wrapped.eval().attribute(case.images).detach()
    expected = expected - expected.mean(dim=2, keepdim=True) if contrast else expected
    torch.testing.assert_close(explanation.all_values, expected)
    torch.testing.assert_close(explanation.values, expected[:, :, 1])
    assert case.wrapped.explain(case.images).all_values is None
    case.wrapped.train(modes[0])


def test_values_of_all_texts():
    wrapped = ShapleyCLIP(clip_model())
    images, texts = images_of(wrapped), tokens(3)
    explanation = wrapped.explain(images, texts, pairs="best", all_classes=True)
    expected = wrapped.attribute(images, texts).detach()
    torch.testing.assert_close(explanation.all_values, expected)
    assert torch.equal(explanation.target, expected.sum(dim=1).argmax(dim=1))
    best = expected[torch.arange(2), :, explanation.target]
    torch.testing.assert_close(explanation.values, best)
    assert explanation.unit == "similarity"
    every = wrapped.explain(images, texts, pairs="all", contrast=True, all_classes=True)
    centred = expected - expected.mean(dim=2, keepdim=True)
    torch.testing.assert_close(every.all_values, centred.repeat_interleave(3, dim=0))


def test_every_value_is_within_half_a_step():
    values = torch.randn(50, 33, generator=torch.Generator().manual_seed(1))
    values[7] = 0
    for levels in LEVELS:
        stored = quantize(values, levels)
        error = (stored.counts.double() * stored.steps[:, None] - values).abs().amax(dim=1)
        assert (error <= stored.steps / 2 * (1 + 1e-6)).all()
        assert stored.counts.abs().max() == levels
        torch.testing.assert_close(stored.steps * levels, values.abs().amax(dim=1))


@pytest.mark.parametrize("contrast", [False, True])
def test_what_a_page_holds(tmp_path, contrast):
    explanation = made_explanation()
    values = explanation.all_values
    if contrast:
        values = values - values.mean(dim=2, keepdim=True)
        chosen = values[torch.arange(2), :, explanation.target]
        explanation = replace(explanation, all_values=values, values=chosen, contrast=True)
    path = explanation.save(tmp_path / "new" / "report.html", pictures())
    data = held(path.read_text(encoding="utf-8"))
    baseline = floats(data["baseline"])
    assert torch.equal(baseline, explanation.baseline.double())
    assert data["classNames"][3] == HOSTILE
    for row, image in enumerate(data["images"]):
        logits = floats(image["logits"])
        assert torch.equal(logits, explanation.logits[row].double())
        classes = image["exact"]["classes"]
        assert set(classes) == set(logits.topk(10).indices.tolist())
        exact = floats(image["exact"]["values"]).reshape(len(classes), 35)
        assert torch.equal(exact, values[row].T[classes].double())
        rest = image["rest"]
        steps = floats(rest["steps"])
        stored = counts(rest["counts"], 35) * steps[:, None]
        error = (stored - values[row].T.double()).abs()
        assert (error <= steps[:, None] / 2 * (1 + 1e-6)).all()
        assert rest["levels"] == 127, "400 classes of 35 patches leave room"
        sums = baseline + floats(rest["positive"]) + floats(rest["negative"]) + image["meanGain"]
        torch.testing.assert_close(sums, logits, atol=2e-5, rtol=0)


def test_few_values_are_all_kept_as_they_are(tmp_path):
    explanation = made_explanation(num_classes=5)
    [first, _] = held(explanation.save(tmp_path / "a.html", pictures()).read_text())["images"]
    assert first["exact"]["classes"] == [0, 1, 2, 3, 4]
    assert first["rest"] is None
    one = replace(explanation, all_values=None)
    data = held(one.save(tmp_path / "b.html", pictures(), captions=["a", "<b>"]).read_text())
    assert not data["allClasses"]
    assert [image["caption"] for image in data["images"]] == ["a", "<b>"]
    assert data["images"][1]["exact"]["classes"] == [int(explanation.target[1])]


def test_eight_images_of_a_thousand_classes_stay_below_two_megabytes(tmp_path):
    from sklearn.datasets import load_sample_image

    photograph = torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1) / 255
    crops = [photograph[:, 20 * i : 20 * i + 224, 40 * i : 40 * i + 224] for i in range(8)]
    # Independent normal values: nothing that compression could make use of.
    explanation = made_explanation((14, 14), 1000, batch=8, size=(224, 224))
    path = explanation.save(tmp_path / "report.html", torch.stack(crops))
    assert path.stat().st_size < 2_000_000
    data = held(path.read_text(encoding="utf-8"))
    levels = {image["rest"]["levels"] for image in data["images"]}
    assert len(levels) == 1
    assert levels.pop() >= 31, "within 1.7 % of the largest value of each class"


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_names_are_text_and_nothing_is_loaded(tmp_path):
    explanation = made_explanation(num_classes=5)
    page = explanation.save(tmp_path / "a.html", pictures(), title=HOSTILE).read_text("utf-8")
    tags = _Tags()
    tags.feed(page)
    names = [tag for tag, _ in tags.found]
    assert names.count("script") == 2
    assert "img" not in names
    for tag, attributes in tags.found:
        assert "src" not in attributes
        assert attributes.get("href", "data:,") == "data:,", tag
        assert not [name for name in attributes if name.startswith("on")]
    [policy] = [a["content"] for _, a in tags.found if "content-security" in str(a).lower()]
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    # The only address is the namespace of SVG, which nobody fetches.
    assert set(re.findall(r"https?://[^\s\"']+", page)) == {"http://www.w3.org/2000/svg"}


def test_other_methods_and_their_sums(tmp_path):
    explanation = made_explanation(all_values=None, method="occlusion")
    nothing = replace(explanation, total=torch.full((2,), torch.nan))
    data = held(nothing.save(tmp_path / "a.html", pictures()).read_text())
    assert [image["claim"] for image in data["images"]] == ["none", "none"]
    assert data["images"][0]["total"] is None
    other = replace(explanation, total=explanation.values.sum(dim=1))
    data = held(other.save(tmp_path / "b.html", pictures()).read_text())
    assert data["images"][0]["claim"] == "total"
    assert data["images"][0]["total"] == float(other.total[0])


def test_what_is_said_of_trust():
    audit = Audit(
        torch.tensor([0.05, 0.3, 0.8, 1.5, 0.0]), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]), 32
    )
    said = [trust_of(audit, row, "shapley") for row in range(5)]
    assert [trust.level for trust in said] == ["high", "fair", "low", "low", "unmeasured"]
    assert "70 %" in said[1].text
    assert "no better than" in said[3].text
    assert "wrapped.audit" in trust_of(None, 0, "shapley").text
    assert "wrapped.audit" not in trust_of(None, 0, "rise").text
    perfect = Audit(torch.tensor([1e-9]), torch.tensor([1.0]), 2)
    assert "99.9 %" in trust_of(perfect, 0, "shapley").text


def test_figures(tmp_path):
    explanation, images = made_explanation(), pictures()
    pdf = explanation.save(tmp_path / "figure.pdf", images, width=3.25).read_bytes()
    assert pdf.startswith(b"%PDF")
    assert b"/FontFile2" in pdf, "fonts are embedded as TrueType"
    assert b"/Type3" not in pdf
    width = re.search(rb"/MediaBox \[ 0 0 ([\d.]+)", pdf)
    assert float(width[1]) == pytest.approx(3.25 * 72, abs=0.01)
    svg = explanation.save(str(tmp_path / "figure.SVG"), images).read_text()
    assert "<svg" in svg
    assert "<text" not in svg, "letters are outlines, for readers without the font"
    assert explanation.save(tmp_path / "f.png", images).read_bytes().startswith(b"\x89PNG")
    shared = explanation.plot(images, limit=9.0)
    assert {i.get_clim() for axes in shared.axes for i in axes.get_images()} >= {(-9.0, 9.0)}


@pytest.mark.parametrize(
    ("path", "changes", "error", "words"),
    [
        ("report.htm", {}, ArgumentError, r"\.htm'; expected \.html"),
        ("report", {}, ArgumentError, r"expected \.html"),
        ("a.html", {"captions": ["one"]}, ArgumentError, "captions is of 1 images; expected 2"),
        ("a.html", {"class_names": ["a"]}, PlotError, "1 names"),
        ("a.pdf", {"width": 0.0}, ArgumentError, "width is 0"),
        ("a.pdf", {"width": float("nan")}, ArgumentError, "width is nan"),
    ],
)
def test_what_is_refused(tmp_path, path, changes, error, words):
    with pytest.raises(error, match=words):
        made_explanation(num_classes=5).save(tmp_path / path, pictures(), **changes)
    assert list(tmp_path.iterdir()) == []


def test_other_images_and_audits_are_refused(tmp_path):
    explanation = made_explanation(num_classes=5)
    with pytest.raises(ImageError, match="that were explained"):
        explanation.save(tmp_path / "a.html", pictures(1))
    with pytest.raises(PlotError, match="normalization"):
        explanation.save(tmp_path / "a.html", pictures() * 3 - 1)
    audit = Audit(torch.ones(3), torch.ones(3), 2)
    with pytest.raises(ArgumentError, match="audit is of 3 images"):
        explanation.save(tmp_path / "a.html", pictures(), audit=audit)


def test_one_grey_image_in_half_precision(tmp_path):
    explanation = made_explanation(num_classes=5, batch=1)
    explanation = replace(explanation, values=explanation.values.half())
    path = explanation.save(tmp_path / "a.html", pictures(1)[:, :1].half(), title="Grey")
    assert held(path.read_text())["images"][0]["picture"].startswith("data:image/")
    assert (
        path.read_bytes()
        == explanation.save(path, pictures(1)[:, :1].half(), title="Grey").read_bytes()
    )


def test_the_parts_of_the_page_are_in_the_package():
    parts = {"report.html", "report.css", *SCRIPTS}
    folder = files("shapwrap.page")
    assert {
        part.name for part in folder.iterdir() if Path(part.name).suffix in (".js", ".css", ".html")
    } == parts


def test_the_wheel_has_the_parts_of_the_page(tmp_path):
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed")
    from zipfile import ZipFile

    root = Path(__file__).parent.parent
    [built] = wheel.WheelBuilder(str(root)).build(directory=str(tmp_path), versions=["standard"])
    names = set(ZipFile(built).namelist())
    assert {f"shapwrap/page/{part}" for part in ("report.html", "report.css", *SCRIPTS)} <= names
