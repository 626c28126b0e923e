"""What is asked of accelerate: processes, devices, gradient scaling, the split of data."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from shapwrap.errors import TrainingError
from shapwrap.training.config import LoopConfig
from shapwrap.training.loader_order import unseeded_samplers
from shapwrap.training.resumable_data import ResumableData

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def make_accelerator(config: LoopConfig) -> Accelerator:
    """An accelerator for this configuration.

    Raises:
        TrainingError: fp16 without a GPU, or beside another precision in the same process.
    """
    try:
        return Accelerator(
            # Without a word about the CPU, several processes would each train alone.
            cpu=not torch.accelerator.is_available(),
            # bf16 needs autocast alone, which is ours; fp16 needs accelerate's gradient scaler.
            mixed_precision="fp16" if config.precision == "fp16" else "no",
            step_scheduler_with_optimizer=False,
            # A seed of the sampler's own would shuffle apart from the data's random stream.
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=False),
        )
    except ValueError as error:
        raise TrainingError(
            f"precision={config.precision!r} cannot be set up: {error} fp16 needs a GPU and a "
            "process in which nothing else trains; use bf16."
        ) from error


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: Optimizer
) -> tuple[nn.Module, Any]:
    """Model and optimizer for this device and these processes: as they are, in DDP, or split.

    FSDP2 gives the model other parameters, and the optimizer those.
    """
    if accelerator.is_fsdp2:
        split, prepared = accelerator.prepare(model, optimizer)
        return split, prepared
    return _prepare_model(accelerator, model), accelerator.prepare_optimizer(optimizer)


def _prepare_model(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The model on its device, in DDP where there are several processes.

    accelerate replaces `forward` by one under autocast, which would outlive the Trainer; the
    Trainer enters autocast around its own calls instead.
    """
    prepared: Any = accelerator.prepare_model(model)
    for name in ("forward", "_original_forward"):
        model.__dict__.pop(name, None)
    return prepared


def prepare_data(accelerator: Accelerator, data: Iterable[Any]) -> Iterable[Any]:
    """The data, split among processes: a DataLoader by accelerate, resumable data by itself.

    Raises:
        TrainingError: Not iterable, or no DataLoader among several processes.
    """
    if isinstance(data, ResumableData):
        return data.split(accelerator.process_index, accelerator.num_processes)
    if isinstance(data, DataLoader):
        samplers = unseeded_samplers(data)
        prepared = accelerator.prepare_data_loader(data)
        for sampler in samplers:
            # accelerate's is drawn from whatever the global state was, and would stay there.
            sampler.generator = None
        return prepared
    if not isinstance(data, Iterable):
        raise TrainingError(f"the data is {type(data).__name__}; expected an iterable of batches.")
    if accelerator.num_processes > 1:
        raise TrainingError(
            f"the data is {type(data).__name__}; with {accelerator.num_processes} processes only "
            "a torch DataLoader can be split among them, and ImageTextShards."
        )
    return data


def autocast(accelerator: Accelerator, config: LoopConfig) -> AbstractContextManager[Any]:
    """The precision of the encoder."""
    half = HALF.get(config.precision)
    if half is None:
        return accelerator.autocast()
    return torch.autocast(accelerator.device.type, dtype=half)


def batches_per_epoch(data: Iterable[Any], config: LoopConfig) -> int:
    """Batches of one process in one epoch.

    Raises:
        TrainingError: Unknown, or none.
    """
    if config.steps_per_epoch is not None:
        return config.steps_per_epoch
    try:
        length = len(data)  # pyright: ignore[reportArgumentType]
    except TypeError as error:
        raise TrainingError(
            f"the training data ({type(data).__name__}) has no length, which the schedules need; "
            "set steps_per_epoch in the configuration."
        ) from error
    if length == 0:
        raise TrainingError("the training data is empty; expected at least one batch.")
    return length
