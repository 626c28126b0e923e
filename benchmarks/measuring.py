"""What the benchmarks share: models, training steps, and times and memory taken in turns."""

import json
import platform
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from shapwrap import ShapleyWrapper, __version__, sample_coalitions, shapley_loss
from shapwrap._types import Pairing
from shapwrap.masking.batch_norm import batch_norms

PRECISIONS = {"float32": None, "bf16": torch.bfloat16}
Call = Callable[[], object]


@dataclass(frozen=True)
class Measured:
    """One call beside the first one of its run."""

    seconds: float
    """Median over the rounds."""
    ratio: float
    """Median over the rounds of the time, in multiples of the first call's in the same round."""
    spread: float
    """Half the distance between the quartiles of those multiples."""
    peak_bytes: int
    """Most memory at once: what the call itself needs, and what its model holds all the time."""
    peak_ratio: float
    """The same in multiples of the first call's."""


def measure(
    calls: Mapping[str, Call],
    rounds: int,
    device: torch.device,
    held: Mapping[str, int] | None = None,
) -> dict[str, Measured]:
    """Each call, timed in turn with the others, so that a slow moment hits them alike.

    Two rounds that are not counted come first: one warms up, the other counts memory.

    Args:
        calls: By name; the first is what the others are compared with.
        rounds: That are counted.
        device: Where they run.
        held: Bytes of weights and optimizer state by name, which are there before the call.
    """
    for call in calls.values():
        call()
    held = held or {}
    peaks = {name: held.get(name, 0) + peak_memory(call, device) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            _wait_for(device)
            started = time.perf_counter()
            call()
            _wait_for(device)
            times[name].append(time.perf_counter() - started)
    first = next(iter(calls))
    measured = {}
    for name, taken in times.items():
        ratios = [one / base for one, base in zip(taken, times[first], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
        measured[name] = Measured(
            seconds=statistics.median(taken),
            ratio=middle,
            spread=(high - low) / 2,
            peak_bytes=peaks[name],
            peak_ratio=peaks[name] / max(peaks[first], 1),
        )
    return measured


def peak_memory(call: Call, device: torch.device) -> int:
    """Bytes of tensors that a call holds at once, at most, beyond those held before it."""
    if device.type == "cuda":
        _wait_for(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        _wait_for(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    recorded: Any = profile.profiler
    changes = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_model(name: str, num_classes: int, size: int | None) -> nn.Module:
    """A timm model with random weights, the same at every call, built for this size."""
    torch.manual_seed(0)
    if size is not None:
        try:
            return timm.create_model(name, num_classes=num_classes, img_size=size)
        except TypeError:
            # Convolutional models take any size and have no such option.
            pass
    return timm.create_model(name, num_classes=num_classes)


def plain_and_wrapped(
    name: str, num_classes: int, size: int | None, device: torch.device
) -> tuple[nn.Module, ShapleyWrapper]:
    """The model as timm has it, and another one of the same weights that is wrapped."""
    plain = make_model(name, num_classes, size).to(device)
    image_size = None if size is None else (size, size)
    wrapped = ShapleyWrapper(make_model(name, num_classes, size).to(device), image_size=image_size)
    return plain, wrapped


def random_images(batch: int, wrapped: ShapleyWrapper, device: torch.device) -> Tensor:
    """Normalised noise of the size that the model was wrapped for."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, *wrapped.image_size, generator=generator).to(device)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Memory of these tensors, which share none."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Step:
    """One training step: coalitions, forward, loss, backward and AdamW, as the Trainer does it.

    Batch statistics are frozen, the Trainer's default.

    Args:
        model: A plain model, or a wrapped one.
        images: The batch.
        coalitions: An image, in complement pairs, of one image where even and of two where odd; 0
            for the plain fine-tune step.
        compiled: Forward pass and loss under `torch.compile`, refusing graph breaks.
        precision: Of autocast; None for none.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        coalitions: int = 0,
        *,
        compiled: bool = False,
        precision: torch.dtype | None = None,
    ):
        self.model = model.train()
        for layer in batch_norms(model):
            layer.eval()
        self.images = images
        self.labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
        self.coalitions = coalitions
        self._paired: Pairing = "across" if coalitions % 2 else True
        self.precision = precision
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        self._generator = torch.Generator().manual_seed(0)
        loss = self._shapley_loss if coalitions else self._plain_loss
        self._loss: Any = torch.compile(loss, fullgraph=True) if compiled else loss

    def __call__(self) -> None:
        """One step."""
        drawn = []
        if isinstance(self.model, ShapleyWrapper):
            coalitions = sample_coalitions(
                len(self.images),
                self.model.num_patches,
                self.coalitions,
                paired=self._paired,
                generator=self._generator,
            )
            drawn = [coalitions.to(self.images.device, non_blocking=True)]
        self._loss(*drawn).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def held_bytes(self) -> int:
        """Memory of the weights, and of AdamW's two means of what is trained."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return bytes_of([*self.model.parameters(), *self.model.buffers(), *trained, *trained])

    def _autocast(self) -> torch.autocast:
        device = self.images.device.type
        return torch.autocast(device, dtype=self.precision, enabled=self.precision is not None)

    def _plain_loss(self) -> Tensor:
        with self._autocast():
            logits = self.model(self.images)
        return cross_entropy(logits.float(), self.labels)

    def _shapley_loss(self, coalitions: Tensor) -> Tensor:
        with self._autocast():
            output = self.model(self.images, coalitions, paired=self._paired)
        return cross_entropy(output.logits, self.labels) + shapley_loss(output)


def default_device() -> torch.device:
    """CUDA where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def surroundings(device: torch.device) -> dict[str, str]:
    """Versions and device, to print beside every number."""
    name = platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "shapwrap": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "device": f"{device.type} ({name}), {torch.get_num_threads()} threads",
    }


def as_line(facts: Mapping[str, str]) -> str:
    """Surroundings in one line."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def write(file: Path, facts: Mapping[str, str], options: Namespace, results: list[Any]) -> None:
    """Numbers with all that they depend on, as JSON."""
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    found = {"surroundings": facts, "settings": settings, "results": results}
    file.write_text(json.dumps(found, indent=1) + "\n")


def as_records(measured: Mapping[str, Measured]) -> list[dict[str, Any]]:
    """Numbers for a JSON file."""
    return [{"what": name, **asdict(one)} for name, one in measured.items()]


def as_table(measured: Mapping[str, Measured]) -> str:
    """One row a call."""
    lines = [f"  {'':32} {'time':>8} {'':>8} {'memory':>8} {'ms':>10} {'MiB':>9}"]
    for name, one in measured.items():
        lines.append(
            f"  {name:32} {one.ratio:6.2f} x {f'+-{one.spread:.2f}':>8} {one.peak_ratio:6.2f} x "
            f"{1e3 * one.seconds:10.1f} {one.peak_bytes / 2**20:9.1f}"
        )
    return "\n".join(lines)
