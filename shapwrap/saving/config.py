"""`config.json`: all that makes a wrapped model again, but its weights."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from shapwrap._version import __version__
from shapwrap.errors import SavedModelError
from shapwrap.saving.files import CONFIG

FORMAT = "shapwrap"
FORMAT_VERSION = 1
KINDS = ("ShapleyWrapper", "ShapleyCLIP")
_LIBRARIES = ("torch", "timm", "torchvision", "open_clip_torch")


@dataclass(frozen=True)
class Config:
    """What `config.json` says."""

    kind: str
    """"ShapleyWrapper" or "ShapleyCLIP"."""
    backbone: dict[str, Any]
    """See `shapwrap.saving.backbone`."""
    options: dict[str, Any]
    """Arguments of the wrapper as they were given: masking, readout, prefix_tokens, features,
    num_classes, and head, see `shapwrap.saving.wrapping`."""
    facts: dict[str, Any]
    """What came of them: masking, readout, prefix_tokens, grid, image_size, num_classes."""
    weights: dict[str, Any]
    """File, bytes and SHA-256; `complete`, and if not: how many tensors of the backbone are left
    out, their digest, and the library's name of the pretrained weights that they are."""
    dtype: str | None = None
    """Precision of all weights, where it is one."""
    tied: dict[str, str] = field(default_factory=dict)
    """Names of tensors that are one with another one, which is stored."""
    class_names: list[str] | None = None
    adapters: dict[str, Any] | None = None
    """Low-rank adapters, which are not merged."""
    tokenizer: dict[str, Any] | None = None
    data: dict[str, Any] = field(default_factory=dict)
    """How images are to be prepared: size, normalization, and what the library knows beside."""
    measured: dict[str, Any] = field(default_factory=dict)
    """Numbers that were measured, as the caller passed them."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of the libraries at the time of saving."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        head = {"format": FORMAT, "format_version": FORMAT_VERSION, "shapwrap": __version__}
        return {**head, **asdict(self)}


def versions() -> dict[str, str]:
    """Of the libraries that are installed."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def from_json(said: Mapping[str, Any], where: str) -> Config:
    """The configuration.

    Args:
        said: A JSON object.
        where: It was found, for the error.

    Raises:
        SavedModelError: Of something else, of another version, or malformed.
    """
    if said.get("format") != FORMAT:
        hint = ""
        if "_target_" in said or "architectures" in said or "architecture" in said:
            hint = " It is of a plain model: build that with its library, and wrap it."
        raise SavedModelError(
            f"{where} is no {CONFIG} of a wrapped model: 'format' is {said.get('format')!r}, "
            f"expected {FORMAT!r}.{hint}"
        )
    if said.get("format_version") != FORMAT_VERSION:
        raise SavedModelError(
            f"{where} has format version {said.get('format_version')!r}, written by shapwrap "
            f"{said.get('shapwrap')}; this is {__version__}, expected version {FORMAT_VERSION}. "
            "Load it with the version that wrote it, and save it again."
        )
    types: dict[str, tuple[type, ...]] = {
        "kind": (str,),
        "class_names": (list, type(None)),
        "dtype": (str, type(None)),
        "adapters": (dict, type(None)),
        "tokenizer": (dict, type(None)),
    }
    found: dict[str, Any] = {}
    for part in fields(Config):
        expected = types.get(part.name, (dict,))
        if part.name not in said or not isinstance(said[part.name], expected):
            came = said.get(part.name, "absent")
            raise SavedModelError(
                f"{where}: {part.name!r} is {came!r:.60}; expected "
                f"{' or '.join(kind.__name__ for kind in expected)}, as save_pretrained writes it."
            )
        found[part.name] = said[part.name]
    config = Config(**found)
    if config.kind not in KINDS:
        raise SavedModelError(f"{where}: 'kind' is {config.kind!r}; expected one of {KINDS}.")
    return config
