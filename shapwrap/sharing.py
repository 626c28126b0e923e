"""Saving, loading and sharing of wrapped models, as the libraries around the hub do it."""

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn


class Sharing:
    """`save_pretrained`, `from_pretrained` and `push_to_hub` of a wrapped model."""

    def save_pretrained(
        self,
        save_directory: str | PathLike[str],
        *,
        only_changed: bool = False,
        base: nn.Module | Mapping[str, Tensor] | None = None,
        base_weights: str | None = None,
        architecture: str | None = None,
        constructor: Mapping[str, Any] | None = None,
        rebuild: bool = True,
        measured: Mapping[str, Any] | None = None,
        dataset: str | None = None,
        card_data: Mapping[str, Any] | None = None,
        repo_id: str | None = None,
    ) -> Path:
        """The folder, with `model.safetensors`, `config.json` and a model card, `README.md`.

        `config.json` holds all that makes the model again: library, architecture and constructor
        arguments of the backbone, data configuration, grid, masking, readout, class names. The
        backbone is built once without data to prove that. Nothing is pickled.

        Args:
            save_directory: Made if it is not there; other files in it stay.
            only_changed: Leave out the weights that fine-tuning has not moved: parameters that do
                not require gradients, as with `add_lora` or a frozen backbone; with `base` those
                that are equal to its. Their digest is kept, so that loading refuses others.
            base: The pretrained backbone, or its state dict.
            base_weights: The library's name of the pretrained weights, from which loading gets what
                is left out: a tag of timm (by default the model's) or open_clip, or such as
                "IMAGENET1K_V2" of torchvision. Without one, loading needs `model=`.
            architecture: Name of the backbone in its library, where it is not found out.
            constructor: Arguments it was built with, where the model does not tell them.
            rebuild: False saves a backbone that cannot be described: loading needs `model=`.
            measured: Numbers for the model card and `config.json`, as `Trainer.evaluate` returns
                them, or an `Audit`.
            dataset: On which they were measured.
            card_data: Metadata of the card, such as license, datasets or base_model, as
                `huggingface_hub.ModelCardData` takes them.
            repo_id: Where it will be on the hub, for the snippet of the card.

        Raises:
            SavedModelError: The backbone cannot be rebuilt from what is known, or the folder not be
                written.
            ArgumentError: Options that do not go together, or nothing that `only_changed` leaves
                out.
        """
        from shapwrap.saving.save import save_pretrained

        wrapped: Any = self
        return save_pretrained(
            wrapped,
            save_directory,
            only_changed=only_changed,
            base=base,
            base_weights=base_weights,
            architecture=architecture,
            constructor=constructor,
            rebuild=rebuild,
            measured=measured,
            dataset=dataset,
            card_data=card_data,
            repo_id=repo_id,
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        *,
        model: nn.Module | None = None,
        features: Callable[..., Any] | None = None,
        head: nn.Module | Callable[..., Any] | None = None,
        tokenizer: Callable[..., Any] | None = None,
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Self:
        """The saved model in eval mode, with the logits and patch values that it had.

        A folder needs no network. `ShapleyWrapper.from_pretrained` returns a `ShapleyCLIP` where
        one was saved. Nothing is unpickled; sizes, digests, names and shapes are checked.

        Args:
            pretrained_model_name_or_path: A folder, or a repository of the hub, "owner/name".
            model: The backbone to use, in place of one that is built; its weights are replaced,
                but for those that `only_changed` left out.
            features: The function with which the model was wrapped, if it was one.
            head: The function or the module with which it was wrapped; layers are rebuilt.
            tokenizer: Of a `ShapleyCLIP`; open_clip's own is rebuilt.
            device: Where the model goes; the CPU, or where `model` lies.
            trust_remote_code: Import a backbone's class from your Python path, where it is of none
                of torch, timm, torchvision and open_clip. Code is never downloaded.
            revision: Branch, tag or commit on the hub.
            token: As in `huggingface_hub`.
            cache_dir: As in `huggingface_hub`.
            force_download: As in `huggingface_hub`.
            local_files_only: As in `huggingface_hub`.

        Raises:
            SavedModelError: No saved model; damaged, changed, of another version, or not to be
                rebuilt here; or other pretrained weights than were fine-tuned.
            BackboneTypeError: `model` is no backbone, or another kind of model was saved.
            MissingDependencyError: Its library is not installed.
        """
        from shapwrap.saving.from_source import from_pretrained
        from shapwrap.saving.hub import HubOptions
        from shapwrap.saving.load import Parts

        found: Any = from_pretrained(
            cls,
            pretrained_model_name_or_path,
            Parts(model, features, head, tokenizer),
            HubOptions(revision, token, cache_dir, force_download, local_files_only),
            device=device,
            trust=trust_remote_code,
        )
        return found

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Push model using shapwrap",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **save_options: Any,
    ) -> str:
        """Address of the commit that holds the saved model; the repository is made if needed.

        Args:
            repo_id: "owner/name".
            commit_message: Of the commit.
            private: Whether a new repository is private; the account's default if None.
            token: As in `huggingface_hub`.
            revision: Branch, made if needed.
            create_pr: Open a pull request instead.
            save_options: As `save_pretrained` takes them.

        Raises:
            SavedModelError: It cannot be saved, or the hub refuses it.
        """
        from shapwrap.saving.hub import push

        return push(
            self,
            repo_id,
            commit_message=commit_message,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            options=save_options,
        )
