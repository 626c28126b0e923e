"""WebDataset shards: which ones a pattern names, and how many samples each holds."""

import glob
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from shapwrap.errors import ArgumentError, MissingDependencyError

Shards = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""Paths, globs, brace patterns (`{00000..00575}.tar`), URLs and `pipe:` commands."""


@contextmanager
def webdataset_needed() -> Iterator[None]:
    """Imports of webdataset go inside.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise MissingDependencyError(
            "shards are read with webdataset; install it with pip install 'shapwrap[shards]'."
        ) from error


def is_remote(shard: str) -> bool:
    """Whether it is a URL or a command rather than a file here."""
    scheme, found, _ = shard.partition(":")
    return bool(found) and len(scheme) > 1 and scheme.isalnum() and scheme != "file"


def expand_shards(shards: Shards) -> list[str]:
    """Every shard by name, in the order given, those of a glob sorted.

    Raises:
        ArgumentError: None, one twice, a file that is not there, or a URL of an unknown kind.
        MissingDependencyError: webdataset is not installed.
    """
    with webdataset_needed():
        from webdataset.gopen import gopen_schemes
        from webdataset.shardlists import expand_urls
    patterns = [shards] if isinstance(shards, str | os.PathLike) else list(shards)
    found: list[str] = []
    for pattern in patterns:
        for shard in expand_urls(os.fspath(pattern)):
            if not is_remote(shard) and any(sign in shard for sign in "*?["):
                matches = sorted(glob.glob(shard))  # noqa: PTH207 - the pattern may be absolute
                if not matches:
                    raise ArgumentError(f"no file matches {shard!r}; expected WebDataset shards.")
                found += matches
            else:
                found.append(shard.removeprefix("file://").removeprefix("file:"))
    if not found:
        raise ArgumentError("there is no shard; expected paths, patterns or URLs of .tar files.")
    missing = [shard for shard in found if not is_remote(shard) and not os.path.isfile(shard)]  # noqa: PTH113
    if missing:
        raise ArgumentError(
            f"{len(missing)} of {len(found)} shards are not there, the first {missing[0]!r}; "
            "expected .tar files."
        )
    for shard in filter(is_remote, found):
        if (scheme := shard.partition(":")[0]) not in gopen_schemes:
            raise ArgumentError(
                f"{shard!r} cannot be opened: expected one of {sorted(gopen_schemes)}, or a "
                f"command that prints it, such as 'pipe:some-tool cat {scheme}:...'."
            )
    if len(set(found)) < len(found):
        twice = next(shard for shard in found if found.count(shard) > 1)
        raise ArgumentError(f"{twice!r} is named twice; expected each shard once.")
    return found


def base_name(shard: str) -> str:
    """The last part of a path or URL, without a query: what sizes.json calls the shard."""
    return shard.partition("?")[0].rstrip("/").rsplit("/", 1)[-1]


def shard_sizes(
    shards: Sequence[str], sizes: Mapping[str, int] | str | os.PathLike[str] | None
) -> list[int]:
    """Samples in each shard.

    Args:
        shards: Paths and URLs.
        sizes: By name of the shard, whole or its last part; or path or URL of a JSON file with
            that; or None for the sizes.json beside local shards, and for shards that it does not
            name the headers of the tar files.

    Raises:
        ArgumentError: A shard that `sizes` does not name, or a remote one without sizes.
    """
    if sizes is None:
        return _found_sizes(shards)
    given = sizes if isinstance(sizes, Mapping) else _read_json(os.fspath(sizes))
    return [_size_in(given, shard) for shard in shards]


def _size_in(sizes: Mapping[str, Any], shard: str) -> int:
    number = sizes.get(shard, sizes.get(base_name(shard)))
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ArgumentError(
            f"sizes has {number!r} for {base_name(shard)!r}; expected its number of samples."
        )
    return number


def count_samples(shard: str | os.PathLike[str]) -> int:
    """Samples of one local shard, by the headers of its members.

    Raises:
        ArgumentError: It is no tar file.
    """
    with webdataset_needed():
        from webdataset.tariterators import base_plus_ext
    keys: list[str] = []
    try:
        with tarfile.open(shard) as archive:
            for member in archive:
                key, _ = base_plus_ext(member.name)
                hidden = re.match(r"__[^/]*__($|/)", member.name)
                if member.isreg() and key is not None and not hidden and keys[-1:] != [key]:
                    keys.append(key)
                # Otherwise the archive keeps every header that it has read.
                archive.members = []  # pyright: ignore[reportAttributeAccessIssue]
    except tarfile.ReadError as error:
        if not keys:
            raise ArgumentError(f"{shard} is no tar file ({error}); expected a shard.") from error
    return len(keys)


def _found_sizes(shards: Sequence[str]) -> list[int]:
    remote = [shard for shard in shards if is_remote(shard)]
    if remote:
        raise ArgumentError(
            f"{remote[0]!r} is remote, and its number of samples is not known; pass sizes=: the "
            "path or URL of a sizes.json, a mapping, or one number for all shards together."
        )
    listed: dict[str, Mapping[str, Any]] = {}
    found: list[int] = []
    for shard in shards:
        folder = os.path.dirname(shard)  # noqa: PTH120
        beside = os.path.join(folder, "sizes.json")  # noqa: PTH118
        if folder not in listed:
            listed[folder] = _read_json(beside) if os.path.isfile(beside) else {}  # noqa: PTH113
        known = base_name(shard) in listed[folder]
        found.append(_size_in(listed[folder], shard) if known else count_samples(shard))
    return found


def _read_json(path: str) -> Mapping[str, Any]:
    with webdataset_needed():
        from webdataset.gopen import gopen
    try:
        stream: Any = gopen(path)
        with stream:
            read = json.loads(stream.read())
    except (OSError, ValueError) as error:
        raise ArgumentError(
            f"sizes of shards cannot be read from {path} ({error}); expected a JSON object of "
            "numbers by shard name."
        ) from error
    if not isinstance(read, Mapping):
        raise ArgumentError(f"{path} holds {type(read).__name__}; expected an object of numbers.")
    return read


def total_of(sizes: Iterable[int]) -> int:
    """Samples in all shards.

    Raises:
        ArgumentError: None.
    """
    total = sum(sizes)
    if total < 1:
        raise ArgumentError("the shards have no samples; expected image-text pairs.")
    return total
