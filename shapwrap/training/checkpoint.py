"""Checkpoints of a run: safetensors and JSON, written by one process, read by any number."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from shapwrap.errors import CheckpointError, ShapwrapError, TrainingError
from shapwrap.saving.state_tree import pack, unpack
from shapwrap.training.checkpoint_folder import (
    MODEL,
    TENSORS,
    TREE,
    fault,
    folder_of,
    folders,
    verify,
    write,
)
from shapwrap.training.position import Position
from shapwrap.training.processes import bytes_of_all, in_main_process
from shapwrap.training.run_state import RunState

MALFORMED = (KeyError, IndexError, TypeError, ValueError, AttributeError)
"""What JSON of another form leads to."""


def checkpoints(directory: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return [folder for folder in folders(directory) if fault(folder) is None]


def check_unused(directory: Path) -> None:
    """Raise if another run has left checkpoints, which a new one would mix with its own.

    Raises:
        TrainingError: There are some, whole or not.
    """
    if found := folders(directory):
        raise TrainingError(
            f"{directory} holds checkpoints of an earlier run, the newest {found[-1].name}; go on "
            "with fit(resume=True) (--resume), choose another output_dir (--out), or delete them."
        )


def check_supported(accelerator: Accelerator) -> None:
    """Raise if the processes hold their state in a way that cannot be put together.

    Raises:
        TrainingError: DeepSpeed, Megatron-LM, or the first version of FSDP.
    """
    kind = accelerator.distributed_type
    first = kind == DistributedType.FSDP and not accelerator.is_fsdp2
    if first or kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise TrainingError(
            f"training is split by {kind.value}, whose state cannot be put together in a "
            "checkpoint; expected one process, DDP or FSDP2 (fsdp_version: 2). Or set "
            "output_dir=None, and save the model yourself."
        )


def save(
    accelerator: Accelerator, directory: Path, run: RunState, position: Position, keep: int
) -> None:
    """Write a checkpoint, in the main process alone, and remove old ones.

    Raises:
        CheckpointError: In all processes, if it could not be written. Earlier ones are untouched.
        TrainingError: The state holds what cannot be stored.
    """
    final = folder_of(directory, position.step)
    if in_main_process(accelerator, lambda: fault(final) is None):
        return
    main = accelerator.is_main_process
    model = pack(run.model_state(), keep=main)
    training = pack({**run.training_state(), "position": position.shared_state()}, keep=main)
    owns = bytes_of_all(accelerator, _to_bytes(position.own_state()))

    def write_all() -> None:
        tensors, trees = dict(training.tensors), []
        for number, own in enumerate(owns):
            tree, found = _from_bytes(own)
            trees.append(tree)
            tensors |= {f"{number}/{name}": tensor for name, tensor in found.items()}
        tree = {"model": model.tree, "training": training.tree, "processes": trees}
        files: dict[str, Callable[[Path], None]] = {
            MODEL: partial(save_file, model.tensors, metadata={"format": "pt"}),
            TENSORS: partial(save_file, tensors),
            TREE: partial(_write_json, tree),
        }
        about = {"step": position.step, "epoch": position.epoch, "processes": len(owns)}
        write(final, files, about, keep)

    in_main_process(accelerator, write_all)


def resume(
    accelerator: Accelerator, directory: Path, run: RunState, position: Position
) -> list[dict[str, Any]]:
    """Go to the newest whole checkpoint; newer ones that are not whole, with the reason.

    Raises:
        CheckpointError: There is none; it is damaged, changed, of another format or another model.
        TrainingError: It is of another run, or cannot be shared out among these processes.
    """
    chosen = in_main_process(accelerator, lambda: _choose(directory))
    folder = directory / chosen["name"]
    try:
        tree = json.loads((folder / TREE).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
        model = unpack(tree["model"], load_file(folder / MODEL))
        training = unpack(tree["training"], tensors)
        processes = [
            unpack(own, _below(tensors, f"{number}/"))
            for number, own in enumerate(tree["processes"])
        ]
    except FileNotFoundError as error:
        raise CheckpointError(
            f"process {accelerator.process_index} does not find {error.filename}, which the main "
            "process sees; expected an output_dir that all machines share."
        ) from error
    except (OSError, RecursionError, SafetensorError, *MALFORMED) as error:
        raise _unreadable(folder, error) from error
    try:
        run.check(model, str(folder))
        position.load(training["position"], processes)
        run.load(model, training)
    except ShapwrapError:
        raise
    except (RuntimeError, *MALFORMED) as error:
        raise _unreadable(folder, error) from error
    return chosen["skipped"]


def _unreadable(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{folder} cannot be read ({type(error).__name__}: {error}); expected what shapwrap "
        f"writes. Delete {folder.name} to go on from an earlier checkpoint."
    )


def _choose(directory: Path) -> dict[str, Any]:
    """The newest whole checkpoint, verified, and what is newer."""
    skipped: list[dict[str, str]] = []
    for folder in reversed(folders(directory)):
        reason = fault(folder)
        if reason is None:
            verify(folder)
            return {"name": folder.name, "skipped": skipped}
        if any(folder.glob("position-*.pt")):
            raise CheckpointError(
                f"{folder} was written by an earlier development version, with pickled files, "
                "which are not read; expected safetensors and JSON with a manifest.json. Finish "
                "the run with the version that began it, or start anew elsewhere."
            )
        skipped.append({"checkpoint": folder.name, "reason": reason})
    damaged = "; ".join(f"{skip['checkpoint']}: {skip['reason']}" for skip in skipped)
    if damaged:
        raise CheckpointError(
            f"no checkpoint in {directory} is whole ({damaged}); restore one from a copy, or "
            "delete them and start anew."
        )
    raise CheckpointError(
        f"no checkpoint in {directory}; expected folders named step-... from an earlier fit(). "
        "Call fit() without resume=True to start."
    )


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)
    }


def _write_json(tree: Any, path: Path) -> None:
    path.write_text(json.dumps(tree), encoding="utf-8")


def _to_bytes(state: Any) -> bytes:
    packed = pack(state)
    tree = torch.frombuffer(bytearray(json.dumps(packed.tree).encode()), dtype=torch.uint8)
    return to_bytes({**packed.tensors, "$tree": tree})


def _from_bytes(stored: bytes) -> tuple[Any, dict[str, Tensor]]:
    tensors = load(stored)
    return json.loads(bytes(tensors.pop("$tree").tolist())), tensors
