"""The local page: what it answers, that it is local, and that nothing global is left changed."""

import json
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from shapwrap import ShapleyCLIP, ShapleyWrapper
from shapwrap.cli import serve as command
from shapwrap.cli.app import app as shapwrap_command
from shapwrap.cli.run_folder import ModelSettings, build_model, save_settings, wrap_model
from shapwrap.data.folder import image_transform
from shapwrap.errors import ArgumentError, SavedModelError
from shapwrap.page import app as page
from shapwrap.page.app import ImageExplainer
from tests.clip_models import clip_model, known_to_open_clip, tokenizer
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
    save_settings(folder, settings)
    wrapped.save_pretrained(folder)
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


# open_clip reads a JSON file of its own and leaves it open.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_a_saved_image_text_model_is_served(tmp_path):
    model = open_clip.create_model(known_to_open_clip(tmp_path))
    saved = ShapleyCLIP(model, tokenizer=open_clip.SimpleTokenizer(context_length=8))
    saved.save_pretrained(tmp_path / "clip")
    explain = command.load_explainer(tmp_path / "clip")
    assert explain.reads_texts


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


SESSION = """
import json, os, sys, urllib.request
import gradio.analytics
import tests.test_serve as here
from shapwrap.cli.serve import load_explainer
from shapwrap.errors import ArgumentError, SavedModelError
from shapwrap.page.app import build_app, serve_app

before, sent = dict(os.environ), []
gradio.analytics._do_analytics_request = lambda *given, **named: sent.append(given)
app = build_app(load_explainer(here.Path(sys.argv[1])), title="<b>run</b>")
[answer] = [block.fn for block in app.fns.values() if block.fn is not None]
sentence, shown, saved = answer(here._picture(), "", True, False)
facts = {"sentence": sentence, "shown": shown, "saved": saved, "report": open(saved).read()}
try:
    answer(None, "", True, False)
except gradio.Error as error:
    facts["refused"] = str(error)
address = serve_app(app, port=0, block=False)
with urllib.request.urlopen(address, timeout=30) as reply:
    facts["served"] = reply.read().decode()
try:
    port = int(address.rstrip("/").rsplit(":", 1)[1])
    serve_app(build_app(load_explainer(here.Path(sys.argv[1]))), port=port, block=False)
except ArgumentError as error:
    facts["taken"] = str(error)
facts |= {"address": address, "sent": len(sent), "share": app.share_url}
changed = [k for k in before.keys() | os.environ if before.get(k) != os.environ.get(k)]
facts |= {"changed": sorted(changed)}
app.close()
print("FACTS" + json.dumps(facts))
"""


def test_the_page_is_local_and_leaves_nothing_behind(checkpoint):
    """In a process of its own: gradio's threads leave loops and sockets open until it ends."""
    pytest.importorskip("gradio")
    done = subprocess.run(
        [sys.executable, "-c", SESSION, str(checkpoint)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.split("FACTS")[1])
    assert facts["sentence"].split(",")[0] in ("cat", "dog", "owl")
    assert facts["shown"].startswith("<iframe")
    assert 'sandbox="allow-scripts"' in facts["shown"]
    assert "<script" not in facts["shown"], "the page within is an attribute's text"
    assert held(facts["report"])["title"] == facts["sentence"]
    assert "no picture" in facts["refused"]
    assert facts["address"].startswith("http://127.0.0.1:")
    assert facts["share"] is None
    assert "gradio" in facts["served"]
    assert "fonts.googleapis" not in facts["served"]
    assert "cannot be used" in facts["taken"]
    assert facts["sent"] == 0
    assert facts["changed"] == []


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
    assert isinstance(result.exception, SavedModelError)
