"""Weights, optimizer, schedule and whatever else a checkpoint holds beside the position."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from shapwrap.errors import CheckpointError


class RunState:
    """What changes while a model is trained.

    Objects that were given to `accelerator.register_for_checkpointing` belong to it.

    Args:
        accelerator: Of the run; it may have a gradient scaler.
        module: What is trained, without DDP around it.
        optimizer: As prepared.
        scheduler: As it is.
        own: What else this run has that holds a state. Not given to the accelerator, which may
            serve another run, too.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        module: nn.Module,
        optimizer: Any,
        scheduler: Any,
        own: Sequence[Any] = (),
    ):
        self._accelerator, self._module, self._own = accelerator, module, list(own)
        self._optimizer, self._scheduler = optimizer, scheduler

    def model_state(self) -> dict[str, Any]:
        """Weights and statistics, by name."""
        return self._module.state_dict()

    def training_state(self) -> dict[str, Any]:
        """All the rest."""
        scaler = self._accelerator.scaler
        return {
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "registered": [one.state_dict() for one in self._registered],
        }

    def check(self, model: dict[str, Any], where: str) -> None:
        """Raise unless these are weights of this model.

        Raises:
            CheckpointError: Other names or shapes.
        """
        own = self.model_state()
        missing = [name for name in own if name not in model]
        unknown = [name for name in model if name not in own]
        shapes = {
            name: (tuple(value.shape), tuple(own[name].shape))
            for name, value in model.items()
            if isinstance(value, Tensor) and name in own and value.shape != own[name].shape
        }
        if missing or unknown or shapes:
            raise CheckpointError(
                f"{where} is of another model: it lacks {missing[:3]} ({len(missing)} in all), has "
                f"{unknown[:3]} in addition ({len(unknown)}), and other shapes (there, here) of "
                f"{dict(list(shapes.items())[:3])} ({len(shapes)}). Resume with the model that the "
                "run was started with."
            )

    def load(self, model: dict[str, Any], training: dict[str, Any]) -> None:
        """Go there.

        Raises:
            CheckpointError: The optimizer or what is registered is another.
        """
        own = self.model_state()
        self._module.load_state_dict({name: placed_like(own[name], model[name]) for name in own})
        registered = training["registered"]
        if len(registered) != len(self._registered):
            raise CheckpointError(
                f"{len(registered)} objects were registered for checkpoints, and now "
                f"{len(self._registered)}; register the same before fit(resume=True)."
            )
        try:
            self._optimizer.load_state_dict(self._split(training["optimizer"]))
        except ValueError as error:
            raise CheckpointError(
                f"the optimizer's state does not fit ({error}); resume with the same settings, and "
                "the same parameters frozen."
            ) from error
        self._scheduler.load_state_dict(training["scheduler"])
        if self._accelerator.scaler is not None and training["scaler"] is not None:
            self._accelerator.scaler.load_state_dict(training["scaler"])
        for one, state in zip(self._registered, registered, strict=True):
            one.load_state_dict(state)

    @property
    def _registered(self) -> list[Any]:
        # accelerate has no public way to ask.
        return [*self._own, *getattr(self._accelerator, "_custom_objects", ())]

    def _split(self, state: dict[str, Any]) -> dict[str, Any]:
        """The optimizer's state, split as its parameters are."""
        groups = self._optimizer.param_groups
        parameters = [parameter for group in groups for parameter in group["params"]]
        return {
            **state,
            "state": {
                index: {
                    name: placed_like(parameters[index], value)
                    if index < len(parameters)
                    else value
                    for name, value in values.items()
                }
                for index, values in state["state"].items()
            },
        }


def placed_like(own: Any, value: Any) -> Any:
    """The value, split among processes where this tensor is."""
    mesh = getattr(own, "device_mesh", None)
    if mesh is None or not isinstance(value, Tensor) or value.shape != own.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    placed = value.to(torch.device(mesh.device_type))
    return distribute_tensor(placed, mesh, own.placements)
