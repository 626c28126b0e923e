"""What every number of a run is printed with."""

import datetime
import importlib.metadata
import platform
import shlex
import sys
from typing import Any

import torch

from shapwrap._version import __version__
from shapwrap.errors import ConfigurationError

PACKAGES = ("torchvision", "timm", "accelerate", "captum", "torchmetrics")


def choose_device(name: str) -> torch.device:
    """The device that was asked for; "auto" takes an accelerator where there is one.

    Raises:
        ConfigurationError: No such device here.
    """
    if name == "auto":
        if not torch.accelerator.is_available():
            return torch.device("cpu")
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(
            f"device is {name!r}, which cannot be used here ({error}); expected cpu, cuda, mps or "
            "auto."
        ) from error
    return device


def describe_run(device: torch.device, command: str | None) -> dict[str, Any]:
    """Command, device, versions and date."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "command": command or shlex.join(sys.argv),
        "device": f"{device} ({name}, {torch.get_num_threads()} threads)",
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str]:
    """Of everything that numbers depend on, where it is installed."""
    found = {"shapwrap": __version__, "python": platform.python_version()}
    found["torch"] = str(torch.__version__)
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
