"""The Hugging Face hub: from where a model is fetched, and to where it goes."""

import tempfile
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from shapwrap._version import __version__
from shapwrap.errors import SavedModelError
from shapwrap.saving.files import CONFIG, WEIGHTS


@dataclass(frozen=True)
class HubOptions:
    """As `huggingface_hub.hf_hub_download` takes them."""

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | PathLike[str] | None = None
    force_download: bool = False
    local_files_only: bool = False


def folder_of(source: str | PathLike[str], options: HubOptions) -> Path:
    """The folder of a saved model: itself, or where the hub's files were put.

    Two files are fetched, `config.json` and `model.safetensors`; without network they are taken
    from the cache.

    Raises:
        SavedModelError: There is no such folder or repository, or it cannot be reached.
    """
    path = Path(source)
    if path.is_dir():
        if options.revision is not None:
            raise SavedModelError(
                f"revision={options.revision!r} came with {path}, which is a folder here; expected "
                "the name of a repository, or no revision."
            )
        return path
    if not isinstance(source, str) or not _may_be_repository(source):
        raise SavedModelError(
            f"{source} is no folder; expected one that save_pretrained wrote, or the name of a "
            "repository, 'owner/name'."
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    files = []
    # The small one first: what is no saved model is known before the weights are fetched.
    for name in (CONFIG, WEIGHTS):
        try:
            files.append(
                hf_hub_download(
                    source,
                    name,
                    revision=options.revision,
                    token=options.token,
                    cache_dir=None if options.cache_dir is None else Path(options.cache_dir),
                    force_download=options.force_download,
                    local_files_only=options.local_files_only,
                    library_name="shapwrap",
                    library_version=__version__,
                )
            )
        except (HfHubHTTPError, EntryNotFoundError, HFValidationError, OSError) as error:
            raise SavedModelError(
                f"{source} is no folder here, and {name} of a repository of that name cannot be "
                f"fetched ({type(error).__name__}: {str(error).splitlines()[0]:.200}); expected a "
                "folder, or a repository with a saved model that this machine, and this token, "
                "can reach or has in its cache."
            ) from error
    config, weights = map(Path, files)
    if config.parent != weights.parent:
        raise SavedModelError(
            f"{source} changed while it was fetched: {CONFIG} and {WEIGHTS} are of two revisions. "
            "Fetch it again."
        )
    return config.parent


def push(
    wrapped: Any,
    repo_id: str,
    *,
    commit_message: str,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    create_pr: bool,
    options: dict[str, Any],
) -> str:
    """Address of the commit; see `ShapleyWrapper.push_to_hub`.

    Raises:
        SavedModelError: It cannot be saved, or the hub refuses it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    with tempfile.TemporaryDirectory() as temporary:
        # Before a repository is made in vain.
        folder = wrapped.save_pretrained(Path(temporary) / "model", repo_id=repo_id, **options)
        api = HfApi(token=token, library_name="shapwrap", library_version=__version__)
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not create_pr:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
            )
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise SavedModelError(
                f"{repo_id} cannot be written ({type(error).__name__}: "
                f"{str(error).splitlines()[0]:.200}); expected the name of a repository, "
                "'owner/name', and a token that may write it: run `hf auth login`, or pass token=."
            ) from error
    return commit.commit_url


def _may_be_repository(source: str) -> bool:
    parts = source.split("/")
    plain = all(part and part not in (".", "..") for part in parts) and len(parts) <= 2
    return plain and "\\" not in source and not source.startswith("~")
