"""The local page: what it answers, that it is local, and that nothing global is left changed."""

import os
import urllib.request

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from shapwrap import ShapleyCLIP, ShapleyWrapper
from shapwrap.cli import serve as command
from shapwrap.cli.app import app as shapwrap_command
from shapwrap.cli.run_folder import ModelSettings, build_model, save_run, wrap_model
from shapwrap.data.folder import image_transform
from shapwrap.errors import ArgumentError
from shapwrap.page import app as page
from shapwrap.page.app import ImageExplainer, build_app, serve_app
from tests.clip_models import clip_model, tokenizer
from tests.reports import held


def _picture(width=90, height=60):
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(0))
    return Image.fromarray(pixels.byte().numpy())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    mean = (0.4, 0.5, 0.6)
    settings = ModelSettings("test_resnet", 3, (96, 64), None, ["cat", "dog", "owl"], mean, mean)
    wrapped = wrap_model(settings, build_model(settings))
    with torch.no_grad():
        for parameter in wrapped.head_parameters():
            parameter.normal_()
    save_run(folder, settings, wrapped)
    return folder


def test_an_image_is_explained(checkpoint):
    explain = command.load_explainer(checkpoint)
    state = torch.get_rng_state()
    answer = explain(_picture(), coalitions=4)
    assert torch.equal(torch.get_rng_state(), state)
    data = held(answer.report)
    wrapped = explain._wrapped
    assert isinstance(wrapped, ShapleyWrapper)
    images = explain._transform(_picture())[None]
    best = int(wrapped(images).argmax())
    assert data["images"][0]["target"] == best
    assert answer.sentence.startswith(f"{['cat', 'dog', 'owl'][best]}, logit ")
    assert data["audit"]["coalitions"] == 4
    assert data["contrast"]
    assert not any(module.training for module in wrapped.modules())
    with pytest.raises(ArgumentError, match="no picture"):
        explain(None)


def test_an_image_and_texts():
    wrapped = ShapleyCLIP(clip_model(), tokenizer=tokenizer)
    statistics = wrapped.normalization or ((0.5,) * 3, (0.5,) * 3)
    normalization = page.Normalization(*statistics)
    transform = image_transform(wrapped.image_size, normalization, augment=False)
    explain = ImageExplainer(wrapped, transform, normalization=normalization)
    answer = explain(_picture(), " a cat \n\na dog", coalitions=2)
    data = held(answer.report)
    assert data["classNames"] == ["a cat", "a dog"]
    assert data["unit"] == "similarity"
    assert data["images"][0]["exact"]["classes"] == [0, 1]
    assert not held(explain(_picture(), "one", contrast=True).report)["contrast"]
    with pytest.raises(ArgumentError, match="no text"):
        explain(_picture(), " \n")


def test_the_page_is_local_and_leaves_nothing_behind(checkpoint, monkeypatch):
    pytest.importorskip("gradio")
    environment = dict(os.environ)
    sent = []
    monkeypatch.setattr("gradio.analytics._do_analytics_request", lambda *a, **k: sent.append(a))
    app = build_app(command.load_explainer(checkpoint), title="<b>run</b>")
    assert app.analytics_enabled is False
    [function] = [block.fn for block in app.fns.values() if block.fn is not None]
    sentence, shown, saved = function(_picture(), "", True, False)
    assert sentence.split(",")[0] in ("cat", "dog", "owl")
    assert 'sandbox="allow-scripts"' in shown
    with open(saved, encoding="utf-8") as file:
        assert held(file.read())["title"] == sentence
    with pytest.raises(Exception, match="no picture"):
        function(None, "", True, False)
    address = serve_app(app, port=0, block=False)
    try:
        assert address.startswith("http://127.0.0.1:")
        assert app.share_url is None
        with urllib.request.urlopen(address, timeout=20) as reply:
            served = reply.read().decode()
        assert reply.status == 200
        assert "fonts.googleapis" not in served
        assert (
            "&lt;b&gt;run" in served or "<b>run</b>" not in served.split("window.gradio_config")[0]
        )
        port = int(address.rstrip("/").rsplit(":", 1)[1])
        with pytest.raises(ArgumentError, match=f"port {port}"):
            serve_app(build_app(command.load_explainer(checkpoint)), port=port, block=False)
    finally:
        app.close()
    assert sent == []
    assert dict(os.environ) == environment


def test_the_command(checkpoint, monkeypatch, tmp_path):
    served = []

    class Started:
        def block_thread(self):
            served.append("blocked")

    def build(explain, title):
        served.append(title)
        return Started()

    monkeypatch.setattr(command, "build_app", build)
    monkeypatch.setattr(
        command, "serve_app", lambda app, port, block: f"http://127.0.0.1:{port}/ {block}"
    )
    result = CliRunner().invoke(shapwrap_command, ["serve", str(checkpoint), "--port", "7999"])
    assert result.exit_code == 0, result.output
    assert "http://127.0.0.1:7999/ False" in result.output
    assert served == [f"shapwrap: {checkpoint.name}", "blocked"]
    result = CliRunner().invoke(shapwrap_command, ["serve", str(tmp_path)])
    assert isinstance(result.exception, ArgumentError)
