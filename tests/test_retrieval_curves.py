"""Insertion and deletion for retrieval, against loops over pairs, points and candidates."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shapwrap import ShapleyCLIP
from shapwrap.errors import ArgumentError, ImageError, ImageTypeError, MapError, ShapwrapError
from shapwrap.explanation import Explanation
from shapwrap.masking.fillers import blurred
from shapwrap.metrics import (
    ConstantMapWarning,
    RetrievalInsertionDeletion,
    predictor,
    retrieval,
    retrieval_insertion_deletion,
)
from tests.faithfulness_reference import area, cells_of, filled, most_relevant_first
from tests.retrieval_reference import image_to_text, text_to_image

HEIGHT, WIDTH, EMBEDDING = 6, 8, 5
OWNERS = [0, 1, 2, 3, 1, 2]
HALF = ((0.5,) * 3, (0.5,) * 3)


def make_encoder():
    """A small random network in train mode, in double precision."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * HEIGHT * WIDTH, EMBEDDING), nn.Dropout(0.9))
    model = model.double()
    with torch.no_grad():
        weight = torch.randn(EMBEDDING, 144, generator=generator, dtype=torch.float64)
        model[1].weight.copy_(weight)
        model[1].bias.copy_(torch.linspace(-1, 1, EMBEDDING))
    return predictor(model, HALF)


def make_data(rows=3, columns=4):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(4, 3, HEIGHT, WIDTH, generator=generator, dtype=torch.float64)
    # Whole numbers, so that drawing the maps between centres is exact.
    maps = torch.randint(-4, 9, (6, rows, columns), generator=generator).double()
    texts = torch.randn(6, EMBEDDING, generator=generator, dtype=torch.float64)
    texts = texts + 0.3 * make_encoder()(images)[OWNERS]
    return images, maps, texts


def fillers(images, fill, seed):
    """Pixels to put in, [B, C, H, W]."""
    if isinstance(fill, torch.Tensor):
        return fill.double()[:, None, None].expand_as(images)
    if fill == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(images.shape, generator=generator).double()
    means = images.mean(dim=(2, 3), keepdim=True).expand_as(images)
    blur = blurred(images, 5.0, 5)
    return {"black": torch.zeros_like(images), "mean": means, "blur": blur}[fill]


def slow_curves(images, maps, texts, pairs, shares, ks, fill, start, ranking, seed=0):
    """Hits at each point of each pair, and areas, by name."""
    encode = make_encoder()
    gallery = encode(images).numpy()
    into, onto = fillers(images, fill, seed).numpy(), fillers(images, start, seed).numpy()
    names = [
        f"{c}_{w}_r@{k}" for c in ("insertion", "deletion") for w in ("t2i", "i2t") for k in ks
    ]
    curves, areas = {name: [] for name in names}, {name: [] for name in names}
    for one_map, (image, text) in zip(maps.numpy(), pairs, strict=True):
        values, pixels = cells_of(one_map, HEIGHT, WIDTH, ranking)
        order = most_relevant_first(values)
        cells, picture = len(order), images[image].numpy()
        counts = [int(share * cells) for share in shares]
        deleted = [filled(picture, into[image], pixels, order[:n]) for n in [0, *counts]]
        inserted = [filled(picture, onto[image], pixels, order[n:]) for n in [*counts, cells]]
        for curve, pictures in (("insertion", inserted), ("deletion", deleted)):
            x = [n / cells for n in ([*counts, cells] if curve == "insertion" else [0, *counts])]
            for k in ks:
                rows = {"t2i": [], "i2t": []}
                for perturbed in pictures:
                    embedding = encode(torch.from_numpy(perturbed)[None])[0].numpy()
                    shown = gallery.copy()
                    shown[image] = embedding
                    rows["t2i"].append(text_to_image(shown, texts, OWNERS, text, k))
                    rows["i2t"].append(image_to_text(embedding, image, texts, OWNERS, k))
                for way, hits in rows.items():
                    curves[f"{curve}_{way}_r@{k}"].append(hits)
                    areas[f"{curve}_{way}_r@{k}"].append(area(hits, x) / (x[-1] - x[0]))
    return curves, areas


COLOUR = torch.tensor([0.9, 0.1, 0.4])
TWENTIETHS = [step / 20 for step in range(1, 11)]


@pytest.mark.parametrize(
    "fill, start, ranking, shares",
    [
        ("random", "black", "pixel", None),
        ("mean", "blur", "pixel", [0.25, 0.5, 1.0]),
        (COLOUR, "random", "patch", None),
        ("black", "black", "patch", [0.0, 0.5]),
    ],
)
def test_against_loops(fill, start, ranking, shares):
    images, maps, texts = make_data()
    scores = retrieval_insertion_deletion(
        make_encoder(),
        images,
        maps,
        texts,
        OWNERS,
        ks=(1, 2),
        fill=fill,
        insertion_fill=start,
        ranking=ranking,
        fractions=shares,
        chunk_size=5,
    )
    pairs = list(zip(OWNERS, range(6), strict=True))
    expected, areas = slow_curves(
        images, maps, texts, pairs, shares or TWENTIETHS, (1, 2), fill, start, ranking
    )
    assert set(scores) == set(expected) == set(scores.curves)
    for name, rows in expected.items():
        assert scores.curves[name].tolist() == np.array(rows, dtype=float).tolist(), name
        np.testing.assert_allclose(scores[name].numpy(), areas[name], atol=1e-6)
        assert scores.mean()[name] == pytest.approx(np.mean(areas[name]), abs=1e-6)
    # Some are lost and some are not, or the loops would say little.
    assert 0 < np.mean(list(expected.values())) < 1


def test_some_pairs_of_a_gallery():
    images, maps, texts = make_data(HEIGHT, WIDTH)
    encode = make_encoder()
    gallery = encode(images)
    whole = retrieval_insertion_deletion(
        encode, images, maps, texts, OWNERS, fill="mean", ranking="patch", grid=(3, 2)
    )
    some = retrieval_insertion_deletion(
        encode,
        images[[2, 1]],
        maps[[5, 1, 4]],
        texts,
        OWNERS,
        pairs=[(0, 5), (1, 1), (1, 4)],
        gallery=gallery,
        fill="mean",
        ranking="patch",
        grid=(3, 2),
        chunk_size=2,
    )
    for name, curve in whole.curves.items():
        assert torch.equal(some.curves[name], curve[[5, 1, 4]])
        assert torch.equal(some[name], whole[name][[5, 1, 4]])
    one = retrieval_insertion_deletion(
        encode, images[:1], maps[:1], texts, OWNERS, pairs=[(0, 0)], gallery=gallery, fill="mean"
    )
    assert one["deletion_t2i_r@1"].shape == (1,)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 40))
def test_chunks_do_not_matter(chunk_size):
    images, maps, texts = make_data()
    run = [
        retrieval_insertion_deletion(
            make_encoder(), images, maps, texts, OWNERS, steps=4, chunk_size=size
        )
        for size in (chunk_size, 64)
    ]
    for name, curve in run[1].curves.items():
        assert torch.equal(run[0].curves[name], curve)


# --- known answers ------------------------------------------------------------------------------


def one_pixel_each():
    """Image i is one bright pixel, which is all that the encoder looks for; 20 pixels."""
    images = torch.zeros(4, 3, 4, 5)
    places = torch.tensor([3, 7, 12, 19])
    images.flatten(2)[torch.arange(4), :, places] = 1.0

    def encode(images):
        return images[:, 0].flatten(1)[:, places]

    return encode, images, torch.eye(4), images[:, 0].clone()


@pytest.mark.parametrize("chunk_size", [1, 64])
def test_maps_that_find_the_only_pixel(chunk_size):
    encode, images, texts, maps = one_pixel_each()
    options = {"fill": "black", "chunk_size": chunk_size}
    owners = range(4)
    assert set(retrieval(encode(images), texts, owners).mean().values()) == {1.0}
    right = retrieval_insertion_deletion(encode, images, maps, texts, owners, **options)
    wrong = retrieval_insertion_deletion(encode, images, -maps, texts, owners, **options)
    for way in ("t2i", "i2t"):
        assert right.curves[f"deletion_{way}_r@1"].tolist() == [[1.0, *[0.0] * 10]] * 4
        assert right.curves[f"insertion_{way}_r@1"].tolist() == [[1.0] * 11] * 4
        assert wrong.curves[f"deletion_{way}_r@1"].tolist() == [[1.0] * 11] * 4
        assert wrong.curves[f"insertion_{way}_r@1"].tolist() == [[*[0.0] * 10, 1.0]] * 4
        # From 1 to 0 within the first of ten steps; from 0 to 1 between 50 % and 100 % of 95 %.
        assert right.mean()[f"deletion_{way}_r@1"] == pytest.approx(0.05)
        assert wrong.mean()[f"insertion_{way}_r@1"] == pytest.approx(0.25 / 0.95)
        assert right.mean()[f"insertion_{way}_r@1"] == pytest.approx(1.0)
    # Five of four candidates are all of them.
    assert right.mean()["deletion_t2i_r@5"] == pytest.approx(1.0)
    torch.testing.assert_close(right.fractions["deletion"], torch.linspace(0, 0.5, 11))
    expected = torch.tensor([*TWENTIETHS, 1.0])
    torch.testing.assert_close(right.fractions["insertion"], expected)


def test_an_encoder_that_sees_nothing_finds_nothing():
    draw = torch.Generator().manual_seed(0)
    one, texts = torch.randn(512, generator=draw), torch.randn(12, 512, generator=draw)
    images, maps = torch.rand(6, 3, 4, 6, generator=draw), torch.rand(12, 4, 6, generator=draw)
    owners = torch.arange(6).repeat(2)
    scores = retrieval_insertion_deletion(
        lambda images: one.repeat(len(images), 1), images, maps, texts, owners, ks=(1,), steps=3
    )
    assert scores.curves["deletion_t2i_r@1"].sum() == scores.curves["insertion_t2i_r@1"].sum() == 0


def test_clean_points_are_retrieval():
    images, maps, texts = make_data()
    gallery = make_encoder()(images)
    recall = retrieval(gallery, texts, OWNERS, ks=(1, 3))
    scores = retrieval_insertion_deletion(
        make_encoder(), images, maps, texts, OWNERS, ks=(1, 3), steps=2
    )
    for k in (1, 3):
        for curve, point in (("deletion", 0), ("insertion", -1)):
            clean = scores.curves[f"{curve}_t2i_r@{k}"][:, point]
            assert torch.equal(clean, recall[f"t2i_r@{k}"])
            clean = scores.curves[f"{curve}_i2t_r@{k}"][:, point]
            assert torch.equal(clean, recall[f"i2t_r@{k}"][OWNERS])


def test_seeds():
    images, maps, texts = make_data()
    encode = make_encoder()

    def run(generator=None, **options):
        scores = retrieval_insertion_deletion(
            encode, images, maps, texts, OWNERS, generator=generator, **options
        )
        return torch.cat(list(scores.curves.values())), scores.protocol.settings["seed"]

    state = torch.random.get_rng_state()
    first, seed = run()
    assert seed == "0"
    assert torch.equal(first, run()[0])
    assert torch.equal(first, run(torch.Generator().manual_seed(0))[0])
    other, seed = run(torch.Generator().manual_seed(3))
    assert seed == "3" and not torch.equal(first, other)
    assert run(fill="mean")[1] == "none, nothing is drawn"
    assert torch.equal(torch.random.get_rng_state(), state)


def test_constant_maps_warn():
    images, maps, texts = make_data()
    maps[2] = 1.0
    with pytest.warns(ConstantMapWarning, match="1 of 6 maps are constant"):
        retrieval_insertion_deletion(make_encoder(), images, maps, texts, OWNERS, chunk_size=2)


def test_protocol():
    images, maps, texts = make_data()
    scores = retrieval_insertion_deletion(make_encoder(), images, maps, texts, OWNERS)
    written = str(scores)
    for words in ("mean of 6 pairs", "shapwrap's own", "uniform random colours", "black", "pixels"):
        assert words in written
    for words in ("[2, 4, 7, 9, 12, 14, 16, 19, 21, 24] cells", "trapezoids", "seed", "versions"):
        assert words in written


# --- wrapped models -----------------------------------------------------------------------------


def make_clip(kind="vit-average"):
    pytest.importorskip("open_clip")
    from tests.clip_models import clip_model, tokens

    model = clip_model(kind).train()
    clip = ShapleyCLIP(model)
    predict = predictor(clip.tower, HALF)
    images = torch.rand(4, 3, *clip.image_size, generator=torch.Generator().manual_seed(4))
    return clip, predict, images, tokens(num=6)


def test_explanations_of_a_wrapped_model():
    clip, predict, images, ids = make_clip()
    normalized = predict.normalize(images)[OWNERS]
    explanation = clip.explain(normalized, ids)
    texts = clip.text_features(ids).detach()
    modes = [module.training for module in clip.modules()]
    hooks = [len(module._forward_hooks) for module in clip.modules()]
    scores = retrieval_insertion_deletion(predict, images, explanation, texts, OWNERS, steps=4)
    assert [module.training for module in clip.modules()] == modes
    assert [len(module._forward_hooks) for module in clip.modules()] == hooks
    assert all(p.grad is None and p.requires_grad for p in clip.parameters())
    maps = explanation.values.unflatten(1, explanation.grid)
    same = retrieval_insertion_deletion(predict, images, maps, texts, OWNERS, steps=4)
    drawn = retrieval_insertion_deletion(
        predict, images, explanation.heatmap(), texts, OWNERS, steps=4
    )
    for name, curve in same.curves.items():
        assert torch.equal(scores.curves[name], curve)
        assert torch.equal(drawn.curves[name], curve)
    recall = retrieval(predict(images), texts, OWNERS)
    assert torch.equal(scores.curves["deletion_t2i_r@1"][:, 0], recall["t2i_r@1"])
    assert "wrapped" in str(scores.protocol)


def test_plain_models_by_a_function():
    clip, predict, images, ids = make_clip()
    model = clip.unwrap().eval()
    texts = model.encode_text(ids, normalize=True).detach()

    def encode(images):
        return model.encode_image(predict.normalize(images), normalize=True)

    maps = torch.rand(6, 3, 4, generator=torch.Generator().manual_seed(6))
    scores = retrieval_insertion_deletion(encode, images, maps, texts, OWNERS, steps=3)
    assert "length 1" in scores.protocol.settings["images"]
    recall = retrieval(encode(images), texts, OWNERS)
    assert torch.equal(scores.curves["insertion_t2i_r@1"][:, -1], recall["t2i_r@1"])


def test_values_of_pixels_and_of_a_covered_part():
    images, maps, texts = make_data()
    facts = {"logits": texts, "target": torch.zeros(6, dtype=torch.long), "grid": (3, 4)}
    pixels = torch.randn(6, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(2)).double()
    values = maps.flatten(1)
    options = {"values": values, "image_size": (HEIGHT, WIDTH), **facts}
    for explanation, expected in (
        (Explanation(pixels=pixels, **options), pixels),
        (Explanation(covered=(6, 4), **options), Explanation(covered=(6, 4), **options).heatmap()),
    ):
        run = [
            retrieval_insertion_deletion(make_encoder(), images, each, texts, OWNERS, steps=5)
            for each in (explanation, expected)
        ]
        for name, curve in run[0].curves.items():
            assert torch.equal(run[1].curves[name], curve)


def test_an_explanation_in_another_frame():
    images, maps, texts = make_data()
    explanation = Explanation(
        values=maps.flatten(1),
        logits=texts,
        target=torch.zeros(6, dtype=torch.long),
        grid=(3, 4),
        image_size=(WIDTH, WIDTH),
    )
    with pytest.raises(MapError, match="expected one frame for both"):
        retrieval_insertion_deletion(make_encoder(), images, explanation, texts, OWNERS)


# --- bad input ----------------------------------------------------------------------------------

GALLERY = torch.ones(4, EMBEDDING, dtype=torch.float64)
BAD = {
    "another gallery": ({"gallery": GALLERY}, ArgumentError, "another embedding of the image"),
    "a wider gallery": (
        {"gallery": torch.ones(4, 9), "text_features": torch.ones(6, 9)},
        ArgumentError,
        "gives 5 dimensions, the gallery has 9",
    ),
    "no pairs": ({"gallery": GALLERY, "images": 2}, ArgumentError, "pairs is None with 2 images"),
    "unmatched": ({"pairs": [(0, 1)] * 6}, ArgumentError, "another image than its own"),
    "no such text": ({"pairs": [(0, 6)] * 6}, ArgumentError, "text indices from 6 to 6"),
    "no such image": ({"pairs": [(-1, 0)] * 6}, ArgumentError, "image indices from -1"),
    "one column": ({"pairs": torch.tensor([1, 2])}, ArgumentError, "in each row"),
    "floating pairs": ({"pairs": torch.ones(6, 2)}, ArgumentError, "expected indices"),
    "huge pairs": ({"pairs": [(2**80, 0)]}, ArgumentError, "pairs is list"),
    "too few maps": ({"maps": 5}, MapError, "one map a pair"),
    "native": ({"fill": "native"}, ArgumentError, "plain models do not have"),
    "unknown filler": ({"insertion_fill": "grey"}, ArgumentError, "fill is 'grey'"),
    "no step": ({"steps": 0}, ArgumentError, "steps is 0"),
    "no order": ({"fractions": [0.5, 0.1]}, ArgumentError, "increasing order"),
    "no range": ({"fractions": [1.0]}, ArgumentError, "the first below 1"),
    "nothing": ({"fractions": [0.001]}, ArgumentError, "the last at least one cell"),
    "no share": ({"fractions": [0.5, 1.5]}, ArgumentError, "share in"),
    "no chunk": ({"chunk_size": 0}, ArgumentError, "chunk_size is 0"),
    "unknown unit": ({"ranking": "row"}, ArgumentError, "'pixel' or 'patch'"),
    "three axes": ({"ranking": "patch", "grid": (1, 2, 3)}, ArgumentError, "grid is"),
    "statistics": ({"fill": "zero_normalised", "plain": True}, ArgumentError, "plain function"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    changes, error, words = BAD[case]
    images, maps, texts = make_data()
    changes = dict(changes)
    images = images[: changes.pop("images", 4)]
    maps = maps[: changes.pop("maps", 6)]
    texts = changes.pop("text_features", texts)
    encode = make_encoder()
    model = (lambda x: encode(x)) if changes.pop("plain", False) else encode
    with pytest.raises(error, match=words):
        retrieval_insertion_deletion(model, images, maps, texts, OWNERS, **changes)


def test_bad_images_and_embeddings():
    images, maps, texts = make_data()
    with pytest.raises(ImageError, match="before normalisation"):
        retrieval_insertion_deletion(make_encoder(), images * 3 - 1, maps, texts, OWNERS)
    with pytest.raises(ImageTypeError, match="expected a float"):
        retrieval_insertion_deletion(make_encoder(), images.byte(), maps, texts, OWNERS)
    with pytest.raises(MapError, match="NaN"):
        retrieval_insertion_deletion(make_encoder(), images, maps / 0, texts, OWNERS)
    encode = make_encoder()

    def breaks_down(pixels):
        dark = (pixels == 0).flatten(1).any(dim=1)[:, None]
        return torch.where(dark, torch.nan, encode(pixels))

    with pytest.raises(ShapwrapError, match="perturbed images hold NaN"):
        retrieval_insertion_deletion(breaks_down, images, maps, texts, OWNERS)


# --- over batches and processes -----------------------------------------------------------------


def check_collected(own, others=()):
    """Pairs in batches, in this process and any other, against all pairs at once."""
    images, maps, texts = make_data()
    encode = make_encoder()
    options = {"fill": "mean", "steps": 4}
    metric = RetrievalInsertionDeletion(
        encode, encode(images), texts, OWNERS, ks=[1, 2], chunk_size=7, **options
    )
    pairs = torch.tensor(list(zip(OWNERS, range(6), strict=True)))
    for part in (own, *others):
        metric.update(images, maps[part], pairs[part])
    result = metric.compute()
    whole = retrieval_insertion_deletion(encode, images, maps, texts, OWNERS, ks=[1, 2], **options)
    assert result.keys() == whole.keys() | {"num_pairs"}
    for name, mean in whole.mean().items():
        assert abs(result[name].item() - mean) < 1e-6, (name, result)
    assert result["num_pairs"] == 6
    return metric


def test_batches_of_pairs():
    metric = check_collected(slice(0, 1), [slice(1, 6)])
    assert "shapwrap's own" in str(metric.protocol)
    assert list(metric.children()) == []
    metric.reset()
    with pytest.raises(ArgumentError, match="call update first"), pytest.warns(UserWarning):
        metric.compute()
