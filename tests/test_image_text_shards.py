"""Streamed shards: every sample once an epoch, resumed without repeats, broken ones skipped."""

import functools
import json
import random
import shlex
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("webdataset")

from shapwrap.data import (
    ImageTextShards,
    SkippedSampleWarning,
    captioned_images,
    count_samples,
)
from shapwrap.data.image_text_sample import captions_of
from shapwrap.data.shard_plan import ShardPlan
from shapwrap.data.shard_reader import StoredSample, shuffled
from shapwrap.errors import ArgumentError, TrainingError
from shapwrap.training.resumable_data import ResumableData
from tests.clip_models import tokenizer
from tests.shards import (
    jittered,
    numbers,
    picture,
    pixels,
    sample,
    write_shard,
    write_shards,
)

SHARED = Path(__file__).parent.parent.parent / "shared" / "data" / "flickr8k-1k"
TOTAL = 26


def shards(folder, **options):
    paths = write_shards(folder)
    return ImageTextShards(paths, pixels, **{"batch_size": 3, "buffer_size": 5, **options})


def epoch_of(parts):
    """The samples of an epoch, by process."""
    return [[numbers(batch) for batch in part] for part in parts]


def flat(nested):
    return [number for process in nested for batch in process for number in batch]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2])
def test_every_sample_once_an_epoch(tmp_path, workers, processes):
    whole = shards(tmp_path, num_workers=workers, drop_last=False, batch_size=4)
    parts = [whole.split(index, processes) for index in range(processes)]
    epochs = [epoch_of(parts) for _ in range(2)]
    for epoch in epochs:
        assert sorted(flat(epoch)) == list(range(TOTAL))
        assert {len(process) for process in epoch} == {len(parts[0])}
    assert epochs[0] != epochs[1]
    assert flat(epochs[0]) != sorted(flat(epochs[0]))


@pytest.mark.parametrize("workers", [0, 2])
def test_dropping_what_fills_no_batch(tmp_path, workers):
    whole = shards(tmp_path, num_workers=workers, batch_size=4)
    parts = [whole.split(index, 2) for index in range(2)]
    left_out = set()
    for _ in range(3):
        epoch = epoch_of(parts)
        assert [[len(batch) for batch in process] for process in epoch] == [[4, 4, 4]] * 2
        found = flat(epoch)
        assert len(set(found)) == len(found) == 24
        left_out |= set(range(TOTAL)) - set(found)
    assert len(left_out) > 2, "other samples each epoch"


def test_unshuffled(tmp_path):
    found = epoch_of([shards(tmp_path, shuffle=False, drop_last=False)])
    assert flat(found) == list(range(TOTAL))


def test_three_processes_that_do_not_divide_the_total(tmp_path):
    whole = shards(tmp_path, drop_last=False, batch_size=4)
    epoch = epoch_of([whole.split(index, 3) for index in range(3)])
    assert [[len(batch) for batch in process] for process in epoch] == [[4, 4, 1]] * 3
    counts = Counter(flat(epoch))
    assert set(counts) == set(range(TOTAL))
    assert sorted(counts.values())[-2:] == [1, 2]


def samples_of(spans):
    return [(shard, place) for shard, first, last in spans for place in range(first, last)]


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_plan_is_a_partition(processes, workers, drop_last):
    for sizes in ((5, 1, 0, 12, 7), (40,), (1,) * 30):
        total = sum(sizes)
        for batch_size in (1, 3, 4):
            options = (batch_size, drop_last, workers, processes, 3)
            plan = ShardPlan(len(sizes), sizes, total, *options)
            for epoch in range(2):
                read, batches = Counter(), []
                for process in range(processes):
                    shares = [plan.share(epoch, process, worker) for worker in range(workers)]
                    for worker, share in enumerate(shares):
                        own = samples_of(share.spans)
                        assert len(own) >= sum(share.batches)
                        assert all(0 <= first < last for _, first, last in share.spans)
                        assert all(place < sizes[shard] for shard, place in own)
                        read.update(own)
                        row = samples_of(plan.everything(epoch, process, worker))
                        assert row[: len(own)] == own
                        assert len(set(row)) == len(row) == total
                    # In the order of torch's loader, which asks its workers in turn.
                    order = [shares[j % workers].batches[j // workers] for j in range(plan.batches)]
                    assert sum(len(share.batches) for share in shares) == plan.batches
                    batches.append(order)
                assert all(process == batches[0] for process in batches)
                assert all(size == batch_size for size in batches[0][: None if drop_last else -1])
                given = sum(map(sum, batches))
                if drop_last:
                    assert total - processes * batch_size < given <= total
                    assert set(read.values()) == {1}
                else:
                    assert total <= given < total + processes
                    assert len(read) == total


def test_the_buffer_gives_everything_once_and_mixes_only_so_far():
    stored = [StoredSample(str(number), {}) for number in range(50)]
    mixed = [int(s.key) for s in shuffled(stored, 8, random.Random(0))]
    assert sorted(mixed) == list(range(50)) != mixed
    assert all(number < place + 8 for place, number in enumerate(mixed))
    assert list(shuffled(stored, 1, random.Random(0))) == stored


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dies_after", [1, 3])
def test_resuming_goes_on_without_repeats(tmp_path, workers, dies_after):
    """Bit for bit: order, captions, what the transform draws."""
    paths = write_shards(tmp_path)

    def stream():
        whole = ImageTextShards(
            paths, jittered, tokenizer, batch_size=3, buffer_size=5, captions="random",
            num_workers=workers, seed=4,
        )  # fmt: skip
        return [whole.split(index, 2) for index in range(2)]

    for whole, first, second in zip(stream(), stream(), stream(), strict=True):
        expected = [*whole, *whole]
        begun = iter(first)
        for _ in range(dies_after):
            next(begun)
        state = first.state_dict()
        begun.close()
        state = torch.load(saved(tmp_path / "state.pt", state), weights_only=False)
        second.load_state_dict(state)
        assert second.state_dict() == state
        resumed = [*second, *second]
        assert len(expected) == 2 * len(whole) == 8
        assert len(resumed) == 8 - dies_after
        for one, other in zip(expected[dies_after:], resumed, strict=True):
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[1], other[1])


def saved(path, state):
    torch.save(state, path)
    return path


def test_what_was_given_is_not_decoded_again(tmp_path):
    paths = write_shards(tmp_path)
    calls = []

    def counted(image):
        calls.append(1)
        return pixels(image)

    first = ImageTextShards(paths, counted, batch_size=5)
    next(iter(first))
    again = ImageTextShards(paths, counted, batch_size=5)
    again.load_state_dict(first.state_dict())
    calls.clear()
    assert len(list(again)) == 4
    assert len(calls) == 20


def test_an_iteration_that_stops_early_is_begun_anew(tmp_path):
    stream = shards(tmp_path)
    one = numbers(next(iter(stream)))
    assert numbers(next(iter(stream))) == one
    stream.set_epoch(1)
    assert numbers(next(iter(stream))) != one


def test_random_states_are_left_alone(tmp_path):
    paths = write_shards(tmp_path)
    # Not Python's own: the type checker of the tests draws from it.
    before = torch.get_rng_state(), np.random.get_state(legacy=False)  # noqa: NPY002
    states = []
    for seed in (0, 0, 1):
        stream = ImageTextShards(paths, jittered, batch_size=3, seed=seed, shuffle=False)
        states.append(torch.cat([images for images, _ in stream]))
    assert torch.equal(before[0], torch.get_rng_state())
    assert str(before[1]) == str(np.random.get_state(legacy=False))  # noqa: NPY002
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


# --- what cannot be used ------------------------------------------------------------------------


def broken_shard(folder):
    noise = picture(1)[:40] + b"\0" * 30
    good = [sample(number) for number in range(8)]
    bad = [
        sample(100, png=noise),
        sample(101, txt="  ", json="{}"),
        ("000102", {"txt": "text 102"}),
        sample(103, png=b"no image"),
        sample(104, json="{broken", txt=""),
    ]
    mixed = [good[0], bad[0], good[1], bad[1], bad[2], *good[2:6], bad[3], *good[6:], bad[4]]
    return str(write_shard(folder / "broken.tar", mixed))


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_samples_are_skipped_counted_and_reported(tmp_path, workers):
    path = broken_shard(tmp_path)
    options = {"batch_size": 2, "drop_last": False, "num_workers": workers, "buffer_size": 2}
    stream = ImageTextShards(path, pixels, **options)
    with pytest.warns(SkippedSampleWarning) as caught:
        first = epoch_of([stream])
    assert len(caught) == 1
    assert set(flat(first)) == set(range(8))
    # 13 samples were announced: the places of the five are filled, so that nobody waits.
    assert [len(batch) for batch in first[0]] == [2] * 6 + [1]
    assert stream.skipped.total == 5
    assert dict(stream.skipped.items()) == {
        "with a corrupt image": 2,
        "without a caption": 2,
        "without an image": 1,
    }
    message = str(caught[0].message)
    assert "5 samples were skipped" in message
    assert "2 with a corrupt image, the first 00010" in message
    assert "1 without an image, the first 000102" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(flat(epoch_of([stream]))) == set(range(8))
    assert stream.skipped.total == 10


def test_unused_samples_take_the_place_of_skipped_ones(tmp_path):
    stream = ImageTextShards(broken_shard(tmp_path), pixels, batch_size=4, shuffle=False)
    with pytest.warns(SkippedSampleWarning):
        found = flat(epoch_of([stream]))
    assert found == [*range(8), 0, 1, 2, 3], "three batches were announced"


def test_resuming_among_broken_samples(tmp_path):
    path = broken_shard(tmp_path)
    options = {"batch_size": 2, "drop_last": False, "buffer_size": 3}
    with pytest.warns(SkippedSampleWarning):
        expected = epoch_of([ImageTextShards(path, pixels, **options)])[0]
    for stop in range(1, 7):
        first, second = (ImageTextShards(path, pixels, **options) for _ in range(2))
        begun = iter(first)
        found = [numbers(next(begun)) for _ in range(stop)]
        second.load_state_dict(first.state_dict())
        with pytest.warns(SkippedSampleWarning):
            found += epoch_of([second])[0]
            begun.close()
        assert found == expected
        assert second.skipped.total == 5


def test_a_shard_that_ends_too_early(tmp_path):
    paths = write_shards(tmp_path)
    data = Path(paths[2]).read_bytes()
    sizes = {Path(path).name: count_samples(path) for path in paths}
    Path(paths[2]).write_bytes(data[: len(data) * 2 // 3])
    stream = ImageTextShards(paths, pixels, sizes=sizes, batch_size=2, shuffle=False)
    with pytest.warns(SkippedSampleWarning, match=r"not in its shard, the first .*part-002.tar"):
        found = flat(epoch_of([stream]))
    assert len(found) == TOTAL
    assert set(found) > {*range(13), *range(20, TOTAL)}
    missing = set(range(TOTAL)) - set(found)
    assert stream.skipped.total in (len(missing), len(missing) + 1)
    assert missing


@pytest.mark.parametrize("sizes", [{"good.tar": 4, "lost.tar": 4}, 8])
def test_a_share_of_which_nothing_can_be_used(tmp_path, sizes):
    """The other process's samples take its place, so that nobody waits and nothing crashes."""
    paths = [write_shard(tmp_path / "good.tar", [sample(number) for number in range(4)])]
    paths.append(tmp_path / "lost.tar")
    paths[1].write_bytes(b"no archive" * 200)
    whole = ImageTextShards(paths, pixels, batch_size=2, sizes=sizes, shuffle=False)
    first, second = whole.split(0, 2), whole.split(1, 2)
    assert [numbers(batch) for batch in first] == [[0, 1], [2, 3]]
    with pytest.warns(SkippedSampleWarning, match="lost.tar"):
        expected = [numbers(batch) for batch in second]
    assert expected == [[0, 1], [2, 3]]
    lost = {"not in its shard": 4} if isinstance(sizes, dict) else {}
    assert dict(second.skipped.items()) == lost or sizes == 8
    begun = whole.split(1, 2)
    next(iter(begun))
    again = whole.split(1, 2)
    again.load_state_dict(begun.state_dict())
    assert [numbers(batch) for batch in again] == expected[1:]


def test_another_layout_is_an_error_before_everything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("shapwrap.data.image_text_shards.HOPELESS", 5)
    silent = [sample(number, txt="", json="{}") for number in range(9)]
    path = str(write_shard(tmp_path / "a.tar", [sample(20), *silent, sample(21)]))
    stream = iter(ImageTextShards(path, pixels, batch_size=1, shuffle=False))
    assert numbers(next(stream)) == [20]
    with pytest.raises(TrainingError, match=r"none of 5 samples .* caption: 000004"):
        next(stream)


def test_wrong_sizes_are_noticed(tmp_path):
    paths = write_shards(tmp_path, sizes=(5, 6))
    stream = ImageTextShards(
        paths, pixels, batch_size=1, shuffle=False, sizes={"part-000.tar": 4, "part-001.tar": 6}
    )
    with pytest.warns(SkippedSampleWarning, match=r"1 beyond the size .*000004"):
        assert flat(epoch_of([stream])) == [0, 1, 2, 3, *range(5, 11)]


def test_nothing_that_can_be_used(tmp_path):
    path = write_shard(tmp_path / "a.tar", [sample(1, png=b"no"), sample(2, txt="", json="")])
    stream = ImageTextShards(path, pixels, batch_size=1)
    with pytest.raises(TrainingError, match=r"none of 2 samples of a.tar .* can be used"):
        list(stream)


# --- where samples come from --------------------------------------------------------------------


def test_captions():
    several = json.dumps({"captions": [" one ", "", "two"], "caption": "three"}).encode()
    single = json.dumps({"caption": "three"}).encode()
    for fields, expected in (
        ({"json": several, "txt": b"four"}, ["one", "two"]),
        ({"json": single, "txt": b"four\n"}, ["four"]),
        ({"json": single}, ["three"]),
        ({"json": b"[1]", "txt": "fünf".encode()}, ["fünf"]),
        ({"json": b'{"captions": []}'}, []),
        ({"json": b"[" * 100_000, "txt": b"six"}, ["six"]),
        ({}, []),
    ):
        assert captions_of(StoredSample("k", fields)) == expected


def test_random_captions_change_with_the_epoch(tmp_path):
    stream = shards(tmp_path, captions="random", drop_last=False)
    epochs = []
    for _ in range(2):
        texts = [text for batch in stream for text in batch[1]]
        assert {text.split()[0] for text in texts} == {"text", "other"}
        epochs.append(sorted(texts, key=lambda text: int(text.split()[1])))
    assert epochs[0] != epochs[1]


def test_image_formats_and_the_published_layout(tmp_path):
    """img2dataset's: .jpg, .txt, and a .json of facts with "caption"."""
    facts = json.dumps({"caption": "text 3", "url": "x", "status": "success"})
    path = write_shard(
        tmp_path / "00000.tar",
        [
            ("000000003", {"jpg": picture(3, "JPEG"), "txt": "text 3", "json": facts}),
            ("000000004", {"webp": picture(4, "WEBP"), "txt": "text 4"}),
        ],
    )
    (tmp_path / "00000_stats.json").write_text("{}")
    for pattern in (path, str(tmp_path / "{00000..00000}.tar"), str(tmp_path / "*.tar"), [path]):
        stream = ImageTextShards(pattern, pixels, batch_size=2, shuffle=False)
        assert stream.num_samples == 2
        assert flat(epoch_of([stream])) == [3, 4]


def test_sizes_beside_the_shards(tmp_path):
    write_shards(tmp_path, sizes=(5, 6))
    sizes = tmp_path / "sizes.json"
    sizes.write_text(json.dumps({"part-000.tar": 5, "part-001.tar": 3}))
    pattern = str(tmp_path / "*.tar")
    assert ImageTextShards(pattern, pixels, batch_size=1).num_samples == 8
    sizes.write_text(json.dumps({"part-001.tar": 3}))
    assert ImageTextShards(pattern, pixels, batch_size=1).num_samples == 8
    sizes.write_text(json.dumps({"part-001.tar": -3}))
    with pytest.raises(ArgumentError, match="sizes has -3 for 'part-001"):
        ImageTextShards(pattern, pixels, batch_size=1)
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"part-000.tar": 2, "part-001.tar": 3}))
    assert ImageTextShards(pattern, pixels, batch_size=1, sizes=str(other)).num_samples == 5
    with pytest.raises(ArgumentError, match="sizes has None for 'part-001"):
        ImageTextShards(pattern, pixels, sizes={"part-000.tar": 5})


@pytest.mark.parametrize("processes", [1, 2])
def test_commands(tmp_path, processes):
    paths = [f"pipe:cat {shlex.quote(path)}" for path in write_shards(tmp_path)]
    sizes = {f"part-{i:03d}.tar": size for i, size in enumerate((7, 4, 9, 6))}
    whole = ImageTextShards(paths, pixels, batch_size=1, sizes=sizes, buffer_size=3)
    parts = [whole.split(index, processes) for index in range(processes)]
    assert sorted(flat(epoch_of(parts))) == list(range(TOTAL))


def test_a_command_that_fails_is_reported(tmp_path):
    path = write_shards(tmp_path)[0]
    command = f"pipe:cat {shlex.quote(path)}; exit 3"
    stream = ImageTextShards(command, pixels, batch_size=7, sizes=14, drop_last=False)
    with pytest.warns(SkippedSampleWarning, match="cannot be read whole, .*exit 3"):
        assert set(flat(epoch_of([stream]))) == set(range(7))


def test_only_the_total_is_known(tmp_path):
    paths = write_shards(tmp_path, sizes=(6, 6, 6, 6))
    whole = ImageTextShards(paths, pixels, batch_size=3, sizes=24, num_workers=2)
    epoch = epoch_of([whole.split(index, 2) for index in range(2)])
    assert sorted(flat(epoch)) == list(range(24))
    with pytest.raises(ArgumentError, match="4 shards cannot be handed out to 6 workers"):
        whole.split(0, 3)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared, with Flickr8k shards")
def test_flickr():
    def small(image):
        return pixels(image.resize((12, 8)))

    pattern = str(SHARED / "{val,test}-00000.tar")
    stream = ImageTextShards(pattern, small, tokenizer, batch_size=50, captions="random")
    assert stream.num_samples == 113 + 125
    batches = list(stream)
    assert [tuple(images.shape) for images, _ in batches] == [(50, 3, 8, 12)] * 4
    assert stream.skipped.total == 0


# --- refusals -----------------------------------------------------------------------------------


def test_refusals(tmp_path):
    paths = write_shards(tmp_path)
    make = functools.partial(ImageTextShards, transform=pixels)
    for refused, words in (
        (lambda: make(str(tmp_path / "none-*.tar")), "no file matches"),
        (lambda: make([]), "there is no shard"),
        (lambda: make(str(tmp_path / "{a,b}.tar")), "2 of 2 shards are not there"),
        (lambda: make([paths[0], paths[0]]), "named twice"),
        (lambda: make("https://host/a.tar"), "its number of samples is not known"),
        (lambda: make("s3://bucket/a.tar", sizes=4), "cannot be opened.*pipe:"),
        (lambda: make(paths, batch_size=100), "less than one batch of 100"),
        (lambda: make(paths, batch_size=10).split(0, 3), "each of 3 processes"),
        (lambda: make(paths, batch_size=0), "batch_size is 0"),
        (lambda: make(paths, num_workers=-1), "num_workers is -1"),
        (lambda: make(paths, captions="all"), "captions is 'all'"),
        (lambda: make(paths, sizes=str(tmp_path / "no.json")), "cannot be read from"),
        (lambda: make(paths, batch_size=1).split(2, 2), "process_index is 2"),
        (lambda: make(str(Path(__file__))), "is no tar file"),
    ):
        with pytest.raises(ArgumentError, match=words):
            refused()
    stream = make(paths, batch_size=3)
    with pytest.raises(TrainingError, match=r"batch_size.*seed"):
        make(paths, batch_size=4, seed=1).load_state_dict(stream.state_dict())
    assert isinstance(stream, ResumableData)


def test_transforms_that_fail_say_where(tmp_path):
    def wrong(image):
        raise KeyError("no such option")

    with pytest.raises(KeyError) as caught:
        list(ImageTextShards(write_shards(tmp_path), wrong, batch_size=1, shuffle=False))
    assert caught.value.__notes__ == ["while transforming sample '000000'"]
    path = write_shard(tmp_path / "x.tar", [sample(1), sample(2, png=picture(2, size=(9, 9)))])
    with pytest.raises(ArgumentError, match="expected one shape"):
        list(ImageTextShards(str(path), pixels, batch_size=2))


def test_all_captions_of_all_images(tmp_path):
    broken = sample(2, png=b"no picture")
    silent = sample(3, txt="", json="{}")
    write_shard(tmp_path / "a.tar", [sample(0), sample(1, json="{}"), broken])
    write_shard(tmp_path / "b.tar", [silent, sample(4)])

    def red(image):
        return torch.tensor(image.getpixel((0, 0))[:1]).float().view(1, 1, 1)

    for batch_size, sizes in ((None, [3]), (2, [2, 1])):
        with pytest.warns(SkippedSampleWarning, match="2 samples were skipped: ") as warned:
            parts = list(captioned_images(f"{tmp_path}/*.tar", red, batch_size=batch_size))
        assert len(warned) == 1
        assert [len(part.images) for part in parts] == sizes
        images = torch.cat([part.images for part in parts]).flatten().tolist()
        assert images == [0.0, 1.0, 4.0]
        texts = [text for part in parts for text in part.captions]
        assert texts == ["text 0", "other 0", "text 1", "text 4", "other 4"]
        found = [part.image_of_text.tolist() for part in parts]
        assert found == ([[0, 0, 1, 2, 2]] if batch_size is None else [[0, 0, 1], [0, 0]])
    begun = captioned_images(f"{tmp_path}/*.tar", red, batch_size=2)
    next(begun), next(begun)
    with pytest.warns(SkippedSampleWarning, match="2 samples were skipped: "):
        begun.close()


def test_captioned_images_that_cannot_be_had(tmp_path):
    """What is wrong with the arguments is said at once, the rest with the sample it is of."""
    path = str(write_shard(tmp_path / "a.tar", [sample(1), sample(2, png=picture(2, size=(9, 9)))]))
    with pytest.raises(ArgumentError, match="batch_size"):
        captioned_images(path, pixels, batch_size=0)
    with pytest.raises(ArgumentError, match="no file matches"):
        captioned_images(str(tmp_path / "none-*.tar"), pixels)
    with pytest.raises(ArgumentError, match="expected one shape"):
        next(captioned_images(path, pixels))
    with pytest.raises(ZeroDivisionError) as caught:
        next(captioned_images(path, lambda image: 1 / 0))
    assert caught.value.__notes__ == ["while transforming sample '000001'"]
