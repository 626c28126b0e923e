"""ONNX files and torch programs of (logits, values), against the wrapped model run eagerly."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import shapwrap
from shapwrap import ShapleyCLIP, ShapleyWrapper
from shapwrap.errors import (
    ArgumentError,
    BackboneTypeError,
    ExportError,
    ImageError,
    ImageTypeError,
    MissingDependencyError,
)
from shapwrap.export import exportable, metadata, to_onnx, to_torch
from shapwrap.export.compared import compare
from tests.backbones import OwnConvolutions, OwnPooling, make_case

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


def session_of(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def facts_of(session):
    """What a consumer reads, with no more than onnxruntime and json."""
    notes = session.get_modelmeta().custom_metadata_map
    return {key.removeprefix("shapwrap."): json.loads(text) for key, text in notes.items()}


def run(session, images):
    logits, values = session.run(["logits", "values"], {"images": images.numpy()})
    return torch.from_numpy(logits), torch.from_numpy(values)


def drawn(case, batch, seed=11):
    shape = (batch, *case.images.shape[1:])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(case.images)


def own():
    """The cheapest model to export: convolutions and batch normalisation, h != w."""
    model = OwnPooling("mean").eval()
    model.norm.running_mean.normal_(0, 0.5)
    model.norm.running_var.uniform_(0.5, 2)
    return ShapleyWrapper(model, image_size=(8, 12))


def state_of(model):
    """All that an export must leave alone."""
    return {
        "modes": [module.training for module in model.modules()],
        "gradients": [(p.requires_grad, p.grad is None) for p in model.parameters()],
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m)))
            for m in model.modules()
        ],
        "random": torch.get_rng_state(),
    }


def assert_same(before, after):
    for key in ("modes", "gradients", "hooks"):
        assert before[key] == after[key], key
    assert torch.equal(before["random"], after["random"])
    for name, tensor in before["weights"].items():
        assert torch.equal(tensor, after["weights"][name]), name


# --- what is written --------------------------------------------------------------------------


def test_a_class_token_readout_with_all_values(tmp_path):
    case = make_case("vit-registers", readout="class-token")
    report = to_onnx(case.wrapped, tmp_path / "model.onnx", case.images, values="all")
    session = session_of(report.path)
    facts = facts_of(session)
    assert facts["grid"] == [3, 4] and facts["image_size"] == [12, 16]
    assert facts["readout"] == "class-token" and facts["values"] == "all"
    baseline = torch.tensor(facts["baseline"])
    assert torch.equal(baseline, case.wrapped.baseline) and baseline.abs().min() > 0
    for batch in (1, 2, 5):
        images = drawn(case, batch)
        logits, values = run(session, images)
        with torch.no_grad():
            torch.testing.assert_close(logits, case.wrapped(images), atol=2e-6, rtol=1e-5)
            expected = case.wrapped.attribute(images)
        torch.testing.assert_close(values, expected, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(values.sum(1) + baseline, logits, atol=2e-6, rtol=1e-5)
    assert {item.name for item in tmp_path.iterdir()} == {"model.onnx"}
    assert report.compared.batches == (2, 1, 3) and report.compared.relative < 1e-5
    assert "0.0001" in str(report)


def test_a_dropped_class_token_from_one_image(tmp_path):
    case = make_case("vit-class-token", batch=1)
    report = to_onnx(case.wrapped, tmp_path / "model.onnx", case.images)
    session = session_of(report.path)
    images = drawn(case, 4)
    logits, values = run(session, images)
    explanation = case.wrapped.explain(images)
    torch.testing.assert_close(logits, explanation.logits, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(values, explanation.values, atol=2e-6, rtol=1e-5)
    assert facts_of(session)["baseline"] == [0.0] * 5
    assert [item.shape[0] for item in session.get_outputs()] == ["batch", "batch"]


def test_batch_normalisation_in_train_mode_with_pixels(tmp_path):
    case = make_case("torchvision-resnet")
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    # One frozen layer in a model in train mode: nothing of it may be lost.
    case.wrapped.train()
    case.wrapped.model.layer1.eval()
    case.wrapped.model.conv1.weight.requires_grad_(False)
    before = state_of(case.wrapped)
    pixels = torch.rand(case.images.shape, generator=torch.Generator().manual_seed(1))
    report = to_onnx(
        case.wrapped,
        tmp_path / "model.onnx",
        pixels,
        pixels=True,
        normalization=(mean, std),
        class_names=list("abcdé"),
    )
    assert_same(before, state_of(case.wrapped))
    session = session_of(report.path)
    facts = facts_of(session)
    assert facts["class_names"] == list("abcdé") and facts["pixels"] == "0 to 1"
    assert facts["mean"] == list(mean) and facts["std"] == list(std)
    more = torch.rand((3, *pixels.shape[1:]), generator=torch.Generator().manual_seed(2))
    by_hand = np.stack([(more.numpy()[:, c] - mean[c]) / std[c] for c in range(3)], axis=1)
    explanation = case.wrapped.explain(torch.from_numpy(by_hand.astype(np.float32)))
    logits, values = run(session, more)
    bound = 1e-5 * float(explanation.logits.abs().max())
    torch.testing.assert_close(logits, explanation.logits, atol=bound, rtol=0.0)
    torch.testing.assert_close(values, explanation.values, atol=bound, rtol=0.0)


@pytest.mark.parametrize("values", ["predicted", "all"])
def test_images_against_fixed_texts(tmp_path, values):
    pytest.importorskip("open_clip")
    from tests.clip_models import clip_model, images_of, tokenizer

    clip = ShapleyCLIP(clip_model(), tokenizer=tokenizer)
    texts = ["a cat", "two dogs", "rain"]
    before = state_of(clip)
    report = to_onnx(clip, tmp_path / "m.onnx", images_of(clip), values=values, texts=texts)
    assert_same(before, state_of(clip))
    session = session_of(report.path)
    facts = facts_of(session)
    assert facts["class_names"] == texts and facts["unit"] == "similarities"
    images = images_of(clip, num=4, seed=9)
    similarities, found = run(session, images)
    explanation = clip.explain(images, texts, pairs="all")
    expected = explanation.values.view(4, 3, -1)
    torch.testing.assert_close(similarities, expected.sum(dim=2), atol=1e-6, rtol=1e-5)
    if values == "all":
        torch.testing.assert_close(found, expected.mT, atol=1e-6, rtol=1e-5)
    else:
        best = expected[torch.arange(4), similarities.argmax(dim=1)]
        torch.testing.assert_close(found, best, atol=1e-6, rtol=1e-5)
    assert b"resblocks.1" in (written := report.path.read_bytes())
    # Neither the text tower is in the file, nor where it was made.
    assert b"text." not in written and str(Path(shapwrap.__file__).parent).encode() not in written


def test_half_precision(tmp_path):
    half = own().to(torch.float16)
    images = torch.randn(2, 3, 8, 12).half()
    report = to_onnx(half, tmp_path / "model.onnx", images)
    logits, values = run(session_of(report.path), images)
    assert logits.dtype == values.dtype == torch.float32
    torch.testing.assert_close(values.sum(1), logits.max(1).values, atol=1e-3, rtol=1e-3)
    assert report.tolerance == 2e-2
    with pytest.raises(ExportError, match="bfloat16, which onnxruntime"):
        to_onnx(half.to(torch.bfloat16), tmp_path / "b.onnx", images.bfloat16())
    logits, values = to_torch(half, images.bfloat16()).module()(images.bfloat16())
    assert logits.dtype == torch.float32 and values.shape == (2, 6)


def test_weights_in_a_file_of_their_own_and_a_fixed_batch(tmp_path):
    wrapped, images = own(), torch.randn(2, 3, 8, 12)
    path = tmp_path / "model.onnx"
    unchecked = to_onnx(wrapped, path, images, check=False)
    assert unchecked.compared is None and "not compared" in str(unchecked)
    # A second export takes the place of the first.
    report = to_onnx(
        wrapped,
        path,
        images,
        values="all",
        external_data=True,
        dynamic_batch=False,
        opset=18,
    )
    assert {item.name for item in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert report.opset == 18 and report.compared.batches == (2,)
    session = session_of(path)
    assert session.get_inputs()[0].shape == [2, 3, 8, 12]
    logits, values = run(session, images)
    with torch.no_grad():
        torch.testing.assert_close(logits, wrapped(images))
        torch.testing.assert_close(values, wrapped.attribute(images), atol=1e-6, rtol=1e-5)


def test_anybody_may_trace_it():
    wrapped, images = own().train(), torch.randn(2, 3, 8, 12)
    before = state_of(wrapped)
    program = torch.export.export(exportable(wrapped), (images,)).module()
    assert_same(before, state_of(wrapped))
    explanation = wrapped.explain(images)
    torch.testing.assert_close(program(images)[0].detach(), explanation.logits)
    torch.testing.assert_close(program(images)[1].detach(), explanation.values)


def test_a_program_is_saved_and_loaded(tmp_path):
    wrapped, images = own(), torch.randn(2, 3, 8, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        program = to_torch(wrapped, images, values="all")
    notes = metadata(exportable(wrapped, values="all"), images)
    torch.export.save(program, tmp_path / "model.pt2", extra_files=notes)
    found = dict.fromkeys(notes, "")
    loaded = torch.export.load(tmp_path / "model.pt2", extra_files=found).module()
    assert {key: str(text) for key, text in found.items()} == notes
    with torch.no_grad():
        for batch in (images, images[:1], torch.randn(7, 3, 8, 12)):
            logits, values = loaded(batch)
            torch.testing.assert_close(logits, wrapped(batch))
            torch.testing.assert_close(values, wrapped.attribute(batch))


def test_the_examples_of_the_docs_run(tmp_path, monkeypatch):
    pytest.importorskip("timm")
    page = (Path(__file__).parent.parent / "docs" / "export.md").read_text()
    monkeypatch.chdir(tmp_path)
    scope = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(block, scope)
    assert scope["heat_map"].shape == (1, *scope["wrapped"].grid)
    with torch.no_grad():
        expected = scope["wrapped"].attribute(scope["images"])
    torch.testing.assert_close(scope["values"], expected, atol=1e-5, rtol=1e-4)


# --- what is refused --------------------------------------------------------------------------


def test_a_file_that_differs_is_not_written(tmp_path):
    wrapped, images = own(), torch.randn(2, 3, 8, 12)
    path = tmp_path / "model.onnx"
    path.write_text("an earlier file")
    with pytest.raises(ExportError, match="differs from the wrapped one by"):
        to_onnx(wrapped, path, images, tolerance=1e-30)
    assert path.read_text() == "an earlier file" and len(list(tmp_path.iterdir())) == 1


def test_comparison_sees_every_kind_of_error():
    module, images = exportable(own()), torch.randn(2, 3, 8, 12)
    assert compare(module, module, [images], 1e-6).relative < 1e-6

    def wrong(change):
        def outputs(images):
            logits, values = (part.detach() for part in module(images))
            return change(logits, values)

        return outputs

    for change in (
        lambda logits, values: (logits, values * 1.001),
        lambda logits, values: (logits, values.flip(1)),
        lambda logits, values: (logits + 0.01 * logits.abs().max(), values),
        lambda logits, values: (-logits, values),
        lambda logits, values: (logits, values * torch.nan),
        lambda logits, values: (logits[:1], values),
        lambda logits, values: (logits, values[:1]),
        lambda logits, values: (logits, values[:, :1]),
    ):
        with pytest.raises(ExportError):
            compare(wrong(change), module, [images], 1e-4)
    # An error may be in the second batch alone.
    with pytest.raises(ExportError, match="for 1 images"):
        compare(wrong(lambda a, b: (a, b if len(b) > 1 else b.T)), module, [images, images[:1]], 1)


class Branches(OwnConvolutions):
    """A forward pass that depends on the numbers in the images."""

    def forward(self, images):
        return super().forward(images if images.mean() > 0 else -images)


class Unusual(OwnConvolutions):
    """A function that ONNX has no operators for."""

    def forward(self, images):
        return super().forward(torch.special.bessel_j0(images))


def test_models_that_cannot_be_exported(tmp_path):
    images = torch.randn(2, 3, 8, 12)
    branches = ShapleyWrapper(Branches("mean").eval(), image_size=(8, 12))
    before = state_of(branches)
    with pytest.raises(ExportError, match=r"torch\.export cannot trace Branches"):
        to_torch(branches, images)
    assert_same(before, state_of(branches))
    unusual = ShapleyWrapper(Unusual("mean").eval(), image_size=(8, 12))
    with pytest.raises(ExportError, match=r"torch\.onnx cannot express Unusual"):
        to_onnx(unusual, tmp_path / "model.onnx", images)
    assert not list(tmp_path.iterdir())
    assert to_torch(unusual, images).module()(images)[1].shape == (2, 6)


def test_wrong_arguments(tmp_path, monkeypatch):
    wrapped, images = own(), torch.randn(2, 3, 8, 12)
    path = tmp_path / "model.onnx"
    for options, error, match in (
        ({"values": "top"}, ArgumentError, "expected 'predicted' or 'all'"),
        ({"texts": ["a"]}, ArgumentError, "with a ShapleyCLIP alone"),
        ({"class_names": ["a"]}, ArgumentError, "has 1 names; expected 5"),
        ({"pixels": True}, ExportError, "does not tell its mean"),
        ({"normalization": ((0.5,), (0.5,))}, ArgumentError, "of 3 numbers each"),
        ({"normalization": ((0.5,) * 3, (0.0,) * 3)}, ArgumentError, "above 0"),
        ({"pixels": True, "normalization": ((0,) * 3, (1,) * 3)}, ImageError, "in \\[0, 1\\]"),
        ({"tolerance": 0.0}, ArgumentError, "above 0"),
    ):
        with pytest.raises(error, match=match):
            to_onnx(wrapped, path, images, **options)
    with pytest.raises(ArgumentError, match="existing folder"):
        to_onnx(wrapped, tmp_path / "nowhere" / "model.onnx", images)
    with pytest.raises(ImageError, match="NaN"):
        to_torch(wrapped, images * torch.nan)
    with pytest.raises(ImageTypeError, match=r"use images\.to"):
        to_torch(wrapped, images.double())
    with pytest.raises(BackboneTypeError, match="expected a ShapleyWrapper"):
        exportable(nn.Identity())
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingDependencyError, match=r"onnxscript.*'shapwrap\[export\]'"):
        to_onnx(wrapped, path, images)
    wrapped.unwrap()
    with pytest.raises(BackboneTypeError, match="unwrapped"):
        exportable(wrapped)
    assert not list(tmp_path.iterdir())
