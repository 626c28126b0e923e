"""The survey of all models: it runs, it resumes, it shrinks, and every check of it can fail."""

import csv
import json
import os
import time

import pytest
import timm
import torch
from typer.testing import CliRunner

from shapwrap import ShapleyWrapper
from shapwrap.backbones.timm_maps import TimmMaps
from shapwrap.cli.app import app
from shapwrap.cli.zoo import parse_number
from shapwrap.errors import ArgumentError
from shapwrap.masking.pixels import zero_absent_pixels
from shapwrap.values import game
from shapwrap.zoo import checks, train_checks
from shapwrap.zoo.catalogue import ModelName, list_models
from shapwrap.zoo.construct import construct
from shapwrap.zoo.constructor import KeepFirst, changed_constructors, replaced
from shapwrap.zoo.row import PASSED, Row
from shapwrap.zoo.run import RESULTS, RunSettings, load_rows, run_survey, to_do, versions
from shapwrap.zoo.shrink import Limits
from shapwrap.zoo.similarity_checks import check_similarities
from shapwrap.zoo.survey import check_specimen, survey_model
from shapwrap.zoo.table import Origin, markdown

RESNET = ModelName("timm", "test_resnet")
VIT = ModelName("timm", "test_vit")
TINY = Limits(work=30e6)


def test_catalogue():
    assert len(list_models(["timm"])) == len(timm.list_models())
    assert list_models(["timm"], "test_vit, test_resnet") == [RESNET, VIT]
    assert ModelName("torchvision", "resnet18") in list_models(["torchvision"])
    with pytest.raises(ArgumentError, match="library"):
        list_models(["keras"])
    with pytest.raises(ArgumentError, match="no model"):
        list_models(["timm"], "no_such_model*")
    assert parse_number("1.5M") == 1.5e6
    with pytest.raises(ArgumentError, match="positive"):
        parse_number("many")


def test_command_runs_and_resumes(tmp_path):
    arguments = ["zoo", "--library", "timm", "--filter", "test_resnet,test_vit,test_vit3"]
    arguments += ["--max-params", "0.48M", "--processes", "1", "--out", str(tmp_path)]
    page = tmp_path / "docs.md"
    result = CliRunner().invoke(app, [*arguments, "--markdown", str(page)])
    assert result.exit_code == 0, (result.output, result.exception)
    assert "2 models, 0 of them finished" in result.output
    rows = load_rows(tmp_path)
    assert {row.outcome for row in rows.values()} == {"wraps"}, [r.reason for r in rows.values()]
    assert set(rows) == {RESNET, VIT}
    assert rows[VIT].masking == "token-removal"
    assert "<td>test_vit</td>" in page.read_text()
    assert len(json.loads((tmp_path / "compatibility.json").read_text())) == 2
    with (tmp_path / "compatibility.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [line["no leak alone"] for line in table] == [PASSED, PASSED]

    written = (tmp_path / RESULTS).read_text()
    again = CliRunner().invoke(app, arguments)
    assert "2 of them finished before" in again.output
    assert (tmp_path / RESULTS).read_text() == written


def _write(folder, *rows):
    (folder / RESULTS).write_text("".join(json.dumps(row.to_json()) + "\n" for row in rows))


def test_what_is_done_again(tmp_path):
    now = versions()
    _write(
        tmp_path,
        Row("timm", "test_resnet", "failed", versions=now),
        Row("timm", "test_vit", "wraps", versions=now),
        Row("timm", "test_vit2", "wraps", versions="shapwrap 0.0.1"),
    )
    models = [RESNET, VIT, ModelName("timm", "test_vit2"), ModelName("timm", "test_vit3")]
    rows = load_rows(tmp_path)
    assert to_do(models, rows, RunSettings(tmp_path)) == models[2:]
    assert to_do(models, rows, RunSettings(tmp_path, retry=True)) == [models[0], *models[2:]]
    assert to_do(models, rows, RunSettings(tmp_path, seed=1)) == models
    with (tmp_path / RESULTS).open("a") as file:
        file.write('{"library": "timm", "na')
    assert load_rows(tmp_path) == rows
    (tmp_path / RESULTS).write_text("{}}\n" + (tmp_path / RESULTS).read_text())
    with pytest.raises(ArgumentError, match="line 1 is damaged"):
        load_rows(tmp_path)


def _dies(model, *_):
    if model == RESNET:
        os._exit(1)
    time.sleep(60)


def test_a_lost_process_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr("shapwrap.zoo.run._survey", _dies)
    settings = RunSettings(tmp_path, processes=1, time_limit=1)
    rows = {row.name: row for row in run_survey([RESNET, VIT], settings)}
    assert rows["test_resnet"].outcome == rows["test_vit"].outcome == "error"
    assert "died" in rows["test_resnet"].reason
    assert "more than 1 s" in rows["test_vit"].reason
    assert load_rows(tmp_path)[VIT] == rows["test_vit"]


@pytest.mark.parametrize(
    "name", ["resnet50", "vit_large_patch16_224", "efficientnet_b4", "convnext_large"]
)
def test_shrinking_keeps_the_class(name):
    specimen = construct(ModelName("timm", name))
    with torch.device("meta"):
        full = timm.create_model(name)
    assert type(specimen.model) is type(full)
    assert specimen.parameters == sum(p.numel() for p in full.parameters())
    assert sum(p.numel() for p in specimen.model.parameters()) < specimen.parameters / 2
    assert "fewer blocks" in specimen.shrunken
    assert specimen.model.pretrained_cfg == full.pretrained_cfg
    assert torch.isfinite(specimen.model.eval()(specimen.images(0))).all()


def test_small_models_are_checked_as_they_are():
    specimen = construct(VIT)
    assert specimen.shrunken == ""
    assert specimen.image_size == (160, 160)
    again = construct(VIT).model.state_dict()
    assert all(torch.equal(t, again[name]) for name, t in specimen.model.state_dict().items())


def test_constructors_are_left_as_they_were():
    cls = timm.models.resnet.ResNet
    before = cls.__init__
    with changed_constructors({cls: {("layers", 0): 2}}):
        model = timm.create_model("test_resnet")
    assert len(model.layer1) == 2
    assert cls.__init__ is before
    assert replaced([{"a": (1, 2)}, 3], (0, "a", 1), 5) == [{"a": (1, 5)}, 3]
    assert replaced([1, 2, 3], (), KeepFirst(2)) == [1, 2]


def _checked(name):
    row = Row(name.library, name.name)
    check_specimen(row, construct(name, limits=TINY))
    return row


def _broken_value(images, coalitions, grid, covered):
    masked = zero_absent_pixels(images, coalitions, grid, covered)
    return masked + 1e-3 * images.repeat_interleave(coalitions.shape[1], 0)


def test_a_leak_is_found(monkeypatch):
    monkeypatch.setattr("shapwrap.backbones.base.zero_absent_pixels", _broken_value)
    row = _checked(RESNET)
    assert row.outcome == "failed"
    assert row.checks["no leak alone"] != PASSED
    assert row.checks["efficiency"] == PASSED


def test_ignored_pixels_are_found(monkeypatch):
    def blind(images, coalitions, grid, covered):
        return torch.zeros_like(zero_absent_pixels(images, coalitions, grid, covered))

    monkeypatch.setattr("shapwrap.backbones.base.zero_absent_pixels", blind)
    assert _checked(RESNET).checks["present pixels matter alone"] != PASSED


def test_wrong_sums_are_found(monkeypatch):
    attribute, value = ShapleyWrapper.attribute, ShapleyWrapper.value
    monkeypatch.setattr(ShapleyWrapper, "attribute", lambda self, x: attribute(self, x) * 1.001)
    row = _checked(RESNET)
    assert {"efficiency", "estimates", "other size"} <= {f.split(":")[0] for f in row.failures()}
    monkeypatch.setattr(ShapleyWrapper, "attribute", attribute)
    monkeypatch.setattr(ShapleyWrapper, "value", lambda self, *a: value(self, *a) + 0.01)
    row = _checked(RESNET)
    assert {"empty", "full"} == {f.split(":")[0] for f in row.failures()}


def test_wrong_logits_are_found(monkeypatch):
    logits_of = game.logits_of
    monkeypatch.setattr(
        "shapwrap.wrapper.game.logits_of", lambda *a, **k: logits_of(*a, **k).roll(1, 1)
    )
    assert _checked(RESNET).checks["logits"] != PASSED


def test_missing_gradients_are_found(monkeypatch):
    feature_map = TimmMaps._map
    monkeypatch.setattr(TimmMaps, "_map", lambda self, images: feature_map(self, images).detach())
    assert "none in" in _checked(RESNET).checks["gradients"]


def test_a_step_that_does_not_help_is_found(monkeypatch):
    monkeypatch.setattr(train_checks, "STEP_LENGTHS", (-0.01,))
    assert "->" in _checked(RESNET).checks["step"]


def test_a_dead_model_is_found():
    specimen = construct(RESNET, limits=TINY)
    torch.nn.init.zeros_(specimen.model.get_classifier().weight)
    row = Row("timm", "test_resnet")
    check_specimen(row, specimen)
    assert row.checks["response"] != PASSED


def test_refusals_and_errors_have_reasons(monkeypatch):
    def refuse(*_, **__):
        raise ArgumentError("no such thing.")

    def crash(*_, **__):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("shapwrap.zoo.survey.ShapleyWrapper", refuse)
    row = survey_model(RESNET)
    assert (row.outcome, row.reason) == ("refused", "ArgumentError: no such thing.")
    monkeypatch.setattr("shapwrap.zoo.survey.ShapleyWrapper", crash)
    row = survey_model(RESNET)
    assert row.outcome == "error"
    assert "ZeroDivisionError: by zero" in row.reason


def test_coalitions_of_the_leak_check():
    drawn = checks.mixed_coalitions(12, torch.Generator().manual_seed(0))
    assert drawn.sum(1).tolist() == [1, 4, 11]
    pixels = checks.absent_pixels(torch.tensor([[True, False]]), (1, 2), (4, 7), (4, 6))
    # The last column is read by no patch.
    assert pixels[0, 0, 0].tolist() == [False, False, False, True, True, True, True]


def test_page():
    rows = [
        Row("timm", "good", "wraps", class_name="A", readout="affine", masking="zero-mask"),
        Row("timm", "odd", "refused", "ReadoutError: a|b <c>"),
        Row("torchvision", "bad", "failed", "efficiency: gap 1"),
    ]
    text = markdown(rows, Origin("2026-01-02", "shapwrap zoo"))
    assert "| wraps | 1 | 0 | 1 |" in text
    assert "- `timm:odd`: ReadoutError: a\\|b &lt;c&gt;" in text
    assert "2026-01-02" in text
    assert text.count("<tr>") == 4
    assert Row.from_json(json.loads(json.dumps(rows[0].to_json()))) == rows[0]


def test_similarity_checks_can_fail(monkeypatch):
    pytest.importorskip("open_clip")
    specimen = construct(ModelName("open_clip", "ViT-S-16-alt"))
    row, images = Row("open_clip", "ViT-S-16-alt"), specimen.images(1)
    width = specimen.model.eval()(images).shape[1]
    check_similarities(row, specimen, images, width, torch.Generator().manual_seed(0))
    assert row.checks and not row.failures()
    monkeypatch.setattr(
        "shapwrap.clip.ShapleyCLIP.attribute",
        lambda self, images, texts: self.tower.attribute(images) @ self.text_features(texts).T / 2,
    )
    check_similarities(row, specimen, images, width, torch.Generator().manual_seed(0))
    assert [failure.split(": ")[1] for failure in row.failures()] == ["of texts"]
