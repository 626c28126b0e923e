"""Recall at k and zero-shot accuracy, against loops over queries and candidates."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from shapwrap import ShapleyCLIP
from shapwrap.errors import ArgumentError, ShapwrapError, TargetError
from shapwrap.metrics import Retrieval, retrieval, zero_shot
from tests.retrieval_reference import dot, found, recalls
from tests.two_processes import needs_distributed, run_in_two_processes

open_clip = pytest.importorskip("open_clip")

from tests.clip_models import clip_model, images_of, tokenizer  # noqa: E402

ROOT = Path(__file__).parent.parent


@st.composite
def galleries(draw):
    """Images with one to three texts each, in any order, of few different values: many ties."""
    counts = draw(st.lists(st.integers(1, 3), min_size=1, max_size=5))
    owners = draw(st.permutations([i for i, n in enumerate(counts) for _ in range(n)]))
    width = draw(st.integers(1, 3))

    def features(num):
        row = st.lists(st.integers(-2, 2), min_size=width, max_size=width)
        return torch.tensor(draw(st.lists(row, min_size=num, max_size=num)), dtype=torch.float32)

    return features(len(counts)), features(len(owners)), owners


def make_gallery(num=7, width=5, seed=0, dtype=torch.float32):
    """Images with two texts each, close to them."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num, width, generator=generator, dtype=dtype)
    owners = torch.arange(num).repeat(2)
    noise = torch.randn(2 * num, width, generator=generator, dtype=dtype)
    return images, images[owners] + noise, owners


@settings(max_examples=150, deadline=None)
@given(galleries(), st.lists(st.integers(1, 6), min_size=1, max_size=3), st.integers(1, 4))
def test_against_loops(gallery, ks, chunk_size):
    images, texts, owners = gallery
    scores = retrieval(images, texts, owners, ks=ks, chunk_size=chunk_size)
    expected = recalls(images, texts, owners, sorted(set(ks)))
    assert set(scores) == set(expected)
    for name, rows in expected.items():
        assert scores[name].tolist() == [float(hit) for hit in rows], name
        assert scores.mean()[name] == pytest.approx(np.mean(rows))
    for way, places in scores.places.items():
        for k in set(ks):
            assert ((places <= k).float() == scores[f"{way}_r@{k}"]).all()


@settings(max_examples=25, deadline=None)
@given(galleries(), st.integers(1, 3))
def test_chance_is_that_of_all_orders(gallery, k):
    images, texts, owners = gallery
    chance = retrieval(images, texts, owners, ks=[k]).chance
    draws = list(itertools.combinations(range(len(texts)), min(k, len(texts))))
    shares = [
        np.mean([any(owners[t] == i for t in drawn) for drawn in draws]) for i in range(len(images))
    ]
    assert chance[f"i2t_r@{k}"] == pytest.approx(np.mean(shares))
    assert chance[f"t2i_r@{k}"] == pytest.approx(min(k, len(images)) / len(images))


def test_known_answers():
    eye = torch.eye(6)
    owners = torch.arange(6).repeat_interleave(3)
    perfect = retrieval(eye, eye[owners], owners)
    assert set(perfect.mean().values()) == {1.0}
    collapsed = retrieval(torch.ones(6, 4), torch.ones(18, 4), owners)
    assert set(collapsed.mean().values()) == {0.0}
    assert collapsed.places["t2i"].tolist() == [6] * 18
    assert collapsed.places["i2t"].tolist() == [16] * 6
    assert retrieval(eye[:1], eye[:1], [0]).mean()["t2i_r@1"] == 1.0


@pytest.mark.parametrize("num, width", [(7, 5), (50, 64), (301, 513)])
def test_ties_are_ties_however_products_are_rounded(num, width):
    draw = torch.Generator().manual_seed(0)
    texts, one = torch.randn(5 * num, width, generator=draw), torch.randn(width, generator=draw)
    owners = torch.arange(num).repeat(5)
    images = one.repeat(num, 1)
    assert set(retrieval(images, texts, owners).places["t2i"].tolist()) == {num}
    scores = retrieval(texts[:num], one.repeat(5 * num, 1), owners)
    assert set(scores.places["i2t"].tolist()) == {5 * num - 4}
    labels = torch.arange(num)
    assert zero_shot(lambda x: x, [(texts[:num], labels)], images.T).mean()["top1"] == 0
    # What differs by more is no tie.
    near = torch.eye(width)[:2] * torch.tensor([[1.0], [0.99995]])
    near[1] = near[1].roll(-1)
    assert retrieval(near, near[:1].repeat(2, 1), [0, 1]).places["t2i"].tolist() == [1, 2]


def test_nothing_is_normalised():
    images, texts, owners = make_gallery()
    longer = images * torch.tensor([9.0, 1, 1, 1, 1, 1, 1])[:, None]
    scores = retrieval(longer, texts, owners)
    for name, rows in recalls(longer, texts, owners, (1, 5)).items():
        assert scores[name].tolist() == [float(hit) for hit in rows]
    assert not torch.equal(scores.places["t2i"], retrieval(images, texts, owners).places["t2i"])
    unit = retrieval(torch.nn.functional.normalize(images), texts, owners)
    assert "features of length 1\n" in str(unit.protocol)


def test_precision():
    # In float32 both images are the same.
    images = torch.tensor([[1.0, 0.0], [1.0 + 1e-12, 0.0]], dtype=torch.float64)
    texts = torch.ones(2, 2, dtype=torch.float64)
    assert retrieval(images, texts, [0, 1]).places["t2i"].tolist() == [2, 1]
    assert retrieval(images.float(), texts.float(), [0, 1]).places["t2i"].tolist() == [2, 2]
    images, texts, owners = make_gallery()
    half = retrieval(images.half(), texts.half(), owners)
    full = retrieval(images.half().float(), texts.half().float(), owners)
    assert torch.equal(half.places["i2t"], full.places["i2t"])
    trained = images.requires_grad_()
    assert not retrieval(trained, texts, owners)["t2i_r@1"].requires_grad


class _Largest(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_chunks_bound_memory():
    images, texts, owners = make_gallery(num=60)
    whole = retrieval(images, texts, owners)
    with _Largest() as largest:
        chunked = retrieval(images, texts, owners, chunk_size=7)
    assert largest.elements <= max(7 * 120, texts.numel())
    for way, places in whole.places.items():
        assert torch.equal(chunked.places[way], places)


def test_protocol():
    images, texts, owners = make_gallery()
    written = str(retrieval(images, texts, owners.tolist()))
    for words in ("t2i_r@1", "mean of 14 texts, chance 0.1429", "mean of 7 images", "dot product"):
        assert words in written
    for words in ("features of length", "2 an image", "count against", "shapwrap", "any text"):
        assert words in written


BAD = {
    "whole numbers": (lambda i, t, o: (i, t.long(), o), "text_features are torch.int64"),
    "one axis": (lambda i, t, o: (i[0], t, o), "two axes, one embedding a row"),
    "no image": (lambda i, t, o: (i[:0], t, o), "one embedding a row"),
    "two spaces": (lambda i, t, o: (i[:, :3], t, o), "expected embeddings in one space"),
    "not finite": (lambda i, t, o: (i, t / 0, o), "hold NaN or infinity, first in rows"),
    "another number": (lambda i, t, o: (i, t, o[:-1]), r"expected \(14,\)"),
    "out of range": (lambda i, t, o: (i, t, o + 1), "there are images 0 to 6"),
    "an image without a text": (
        lambda i, t, o: (i, t, o.clamp(max=5)),
        r"1 images have no text, first \[6\]",
    ),
    "floats": (lambda i, t, o: (i, t, o.float()), "expected indices, int64"),
    "huge": (lambda i, t, o: (i, t, [2**80]), "image_of_text is list"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, words = BAD[case]
    with pytest.raises(ArgumentError, match=words):
        retrieval(*change(*make_gallery()))


@pytest.mark.parametrize("option", [{"ks": ()}, {"ks": (0,)}, {"chunk_size": 0}])
def test_bad_options(option):
    with pytest.raises(ArgumentError, match=f"{next(iter(option))} is"):
        retrieval(*make_gallery(), **option)


# --- over batches and processes -----------------------------------------------------------------


def batch(start, stop):
    """Images of the gallery with their texts, which lie apart there."""
    images, texts, owners = make_gallery()
    own = ((owners >= start) & (owners < stop)).nonzero()[:, 0]
    return images[start:stop], texts[own], owners[own] - start


def check_collected(result):
    for name, mean in retrieval(*make_gallery()).mean().items():
        assert abs(result[name].item() - mean) < 1e-6, (name, result)
    assert (result["num_images"], result["num_texts"]) == (7, 14)


def test_batches_are_one_gallery():
    metric = Retrieval(chunk_size=3)
    for start, stop in ((0, 3), (3, 4), (4, 7)):
        metric.update(*batch(start, stop))
    check_collected(metric.compute())
    assert "dot product" in str(metric.protocol)
    metric.reset()
    alone = metric(*batch(0, 3))
    expected = retrieval(*batch(0, 3)).mean()
    assert alone["i2t_r@1"].item() == pytest.approx(expected["i2t_r@1"])
    metric(*batch(3, 7))
    check_collected(metric.compute())
    other = Retrieval()
    other.update(*batch(0, 5))
    last = Retrieval()
    last.update(*batch(5, 7))
    other.merge_state(last)
    check_collected(other.compute())


def test_repeated_images_count_once():
    metric = Retrieval()
    metric.update(*batch(0, 4), image_ids=[10, 11, 12, 13])
    metric.update(*batch(2, 7), image_ids=torch.tensor([12, 13, 14, 15, 16]))
    check_collected(metric.compute())
    without = Retrieval()
    without.update(*batch(0, 4))
    without.update(*batch(2, 7))
    # The same image twice: neither copy is first, as ties count against.
    assert without.compute()["num_images"] == 9
    assert without.compute()["t2i_r@1"] < metric.compute()["t2i_r@1"]


def test_what_cannot_be_collected():
    with pytest.raises(ArgumentError, match="call update first"):
        Retrieval().scores()
    with pytest.raises(ArgumentError, match=r"expected int64 \[3\], at least 0"):
        Retrieval().update(*batch(0, 3), image_ids=[1, -1, 2])
    with pytest.raises(ArgumentError, match="ks is"):
        Retrieval(ks=[])
    with pytest.raises(ArgumentError, match="chunk_size is 0"):
        Retrieval(chunk_size=0)
    metric = Retrieval()
    metric.update(*batch(0, 3))
    images, texts, owners = batch(3, 5)
    with pytest.raises(ArgumentError, match="5 dimensions before, and 4 now"):
        metric.update(images[:, :4], texts[:, :4], owners)


SCRIPT = """
import torch
import torch.distributed as dist

from shapwrap.metrics import Retrieval, RetrievalInsertionDeletion
from tests import test_retrieval, test_retrieval_curves

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
metric = Retrieval()
for start, stop in (((0, 2), (2, 5)) if rank == 0 else ((4, 7),)):
    metric.update(*test_retrieval.batch(start, stop), image_ids=range(start, stop))
test_retrieval.check_collected(metric.compute())
test_retrieval_curves.check_collected(slice(0, 2) if rank == 0 else slice(2, 6))
dist.destroy_process_group()
print("fine")
"""


@pytest.mark.slow
@needs_distributed
def test_two_processes_agree(tmp_path):
    assert run_in_two_processes(SCRIPT, tmp_path).count("fine") == 2


def test_without_torchmetrics():
    code = """
import sys
import shapwrap.metrics
sys.modules["torchmetrics"] = None
shapwrap.metrics.retrieval
try:
    shapwrap.metrics.Retrieval
except shapwrap.errors.MissingDependencyError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert "pip install 'shapwrap[metrics]'" in done.stdout


# --- zero-shot classification -------------------------------------------------------------------


def from_the_end(strings):
    """The small text encoder reads seven letters, and all templates begin alike."""
    return tokenizer([string[::-1] for string in strings])


def make_zero_shot(wrapped, num=7):
    names = ["cat", "dog", "grass", "sky", "sea", "road"]
    templates = open_clip.OPENAI_IMAGENET_TEMPLATES[:3]
    weights = open_clip.build_zero_shot_classifier(wrapped, from_the_end, names, templates)
    images = images_of(wrapped, num=num)
    labels = torch.arange(num) % 6
    return weights, images, labels


@pytest.mark.parametrize("kind", ["wrapped", "plain"])
def test_zero_shot_against_loops(kind):
    model = clip_model()
    wrapped = ShapleyCLIP(model)
    asked = wrapped if kind == "wrapped" else model
    weights, images, labels = make_zero_shot(wrapped)
    batches = [(images[:3], labels[:3]), (images[3:6], labels[3:6]), (images[6:], labels[6:])]
    scores = zero_shot(asked, batches, weights, ks=(1, 3))
    with torch.no_grad():
        features = asked.encode_image(images)
    for k in (1, 3):
        expected = [
            found([dot(feature, column) for column in weights.T], {int(label)}, k)
            for feature, label in zip(features, labels, strict=True)
        ]
        assert scores[f"top{k}"].tolist() == [float(hit) for hit in expected]
    unit = zero_shot(lambda x: asked.encode_image(x) * 7, batches, weights, ks=(1, 3))
    assert torch.equal(unit["top1"], scores["top1"])
    for words in ("top1", "mean of 7 images", "6, one embedding each", "count against"):
        assert words in str(scores)


def test_zero_shot_agrees_with_the_classifier():
    wrapped = ShapleyCLIP(clip_model())
    weights, images, _ = make_zero_shot(wrapped)
    with torch.no_grad():
        labels = wrapped.classifier(weights.T)(images).argmax(dim=1)
    assert zero_shot(wrapped, [(images, labels)], weights).mean() == {"top1": 1.0, "top5": 1.0}


def test_zero_shot_leaves_the_model_as_it_was():
    model = clip_model()
    model.train()
    model.text.eval()
    wrapped = ShapleyCLIP(model)
    weights, images, labels = make_zero_shot(wrapped, num=2)
    modes = [module.training for module in wrapped.modules()]
    state = torch.random.get_rng_state()
    zero_shot(wrapped, [(images, labels)], weights)
    assert [module.training for module in wrapped.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in wrapped.parameters())


def test_zero_shot_ties_count_against():
    images, labels = torch.zeros(3, 3, 4, 6), torch.arange(3)
    scores = zero_shot(lambda x: torch.ones(len(x), 2), [(images, labels)], torch.ones(2, 6))
    assert scores.mean() == {"top1": 0.0, "top5": 0.0}
    assert zero_shot(lambda x: torch.ones(len(x), 2), [(images, labels)], torch.ones(2, 4)).mean()[
        "top5"
    ]


class _Broken(torch.nn.Module):
    encode_image = None


@pytest.mark.parametrize(
    "change, error, words",
    [
        (lambda e, b, w: (e, [], w), ArgumentError, "batches held none"),
        (
            lambda e, b, w: (e, iter([b[0][0]]), w),
            ArgumentError,
            "a batch is Tensor; expected a pair",
        ),
        (
            lambda e, b, w: (e, iter([(*b[0], 1)]), w),
            ArgumentError,
            "a batch is tuple; expected a pair",
        ),
        (
            lambda e, b, w: (e, iter([([1], b[0][1])]), w),
            ArgumentError,
            "the images of a batch are list",
        ),
        (lambda e, b, w: (e, iter([(b[0][0][:0], b[0][1][:0])]), w), ArgumentError, "are empty"),
        (lambda e, b, w: (e, b, w[0]), ArgumentError, "weights have shape"),
        (lambda e, b, w: (e, b, w[:3]), ArgumentError, r"expected embeddings \[4, 3\]"),
        (lambda e, b, w: (_Broken(), b, w), ArgumentError, "expected one with encode_image"),
        (lambda e, b, w: (e, [(b[0][0], b[0][1] + 9)], w), TargetError, "classes 0 to 5"),
        (lambda e, b, w: (e, [(b[0][0], b[0][1][:, None])], w), ArgumentError, "one class an"),
        (lambda e, b, w: (lambda x: e(x) / 0, b, w), ShapwrapError, "NaN or infinity"),
    ],
)
def test_zero_shot_bad_input(change, error, words):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(5, 6, generator=generator)
    batches = [(torch.randn(4, 5, generator=generator), torch.arange(4))]
    with pytest.raises(error, match=words):
        zero_shot(*change(lambda x: x, batches, weights))
