"""What processes tell each other beside gradients, as bytes and JSON: nothing is pickled."""

import json
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from shapwrap.errors import CheckpointError


def in_main_process(accelerator: Accelerator, act: Callable[[], Any]) -> Any:
    """What `act` returns in the main process, which alone calls it; all wait for it.

    Args:
        accelerator: Of all processes.
        act: Returns what JSON can hold.

    Raises:
        CheckpointError: In the other processes, if it failed.
        Exception: In the main process, whatever it raises.
    """
    if accelerator.num_processes == 1:
        return act()
    failed: Exception | None = None
    said: dict[str, Any] = {}
    if accelerator.is_main_process:
        try:
            said = {"value": act()}
        except Exception as error:  # the others wait, whatever happened
            failed, said = error, {"error": str(error)}
    said = json.loads(_broadcast(accelerator, json.dumps(said).encode()))
    if failed is not None:
        raise failed
    if "error" in said:
        raise CheckpointError(said["error"])
    return said["value"]


def bytes_of_all(accelerator: Accelerator, own: bytes) -> list[bytes]:
    """Those of all processes, in their order."""
    if accelerator.num_processes == 1:
        return [own]
    gathered: Any = accelerator.gather(torch.tensor([len(own)], device=accelerator.device))
    lengths = gathered.tolist()
    row = torch.zeros(max(lengths), dtype=torch.uint8)
    row[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
    rows: Any = accelerator.gather(row[None].to(accelerator.device))
    return [bytes(r[:n].tolist()) for r, n in zip(rows.cpu(), lengths, strict=True)]


def _broadcast(accelerator: Accelerator, text: bytes) -> bytes:
    """That of the main process; the others' own is not read."""
    device = accelerator.device
    length: Any = broadcast(torch.tensor([len(text)], device=device))
    row = torch.zeros(int(length), dtype=torch.uint8)
    if accelerator.is_main_process:
        row = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    sent: Any = broadcast(row.to(device))
    return bytes(sent.tolist())
