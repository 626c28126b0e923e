"""A wrapped model as an ONNX file, run once by onnxruntime before it is handed out."""

import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.export import ExportedProgram

from shapwrap.clip.shapley_clip import ShapleyCLIP
from shapwrap.errors import ArgumentError, ExportError, MissingDependencyError
from shapwrap.export.compared import Compared, Run, batches_of, compare
from shapwrap.export.exportable import What, exportable
from shapwrap.export.metadata import metadata
from shapwrap.export.program import check_example, first_line, quiet, tolerance_for, traced
from shapwrap.wrapper import ShapleyWrapper

INPUT, OUTPUTS, BATCH = "images", ("logits", "values"), "batch"


@dataclass(frozen=True)
class OnnxReport:
    """What was written, and how far it is from the wrapped model."""

    path: Path
    """The file; larger weights than one file can hold lie beside it, in `<name>.data`."""
    opset: int
    """Version of the operators."""
    metadata: dict[str, str]
    """The file's metadata, see `shapwrap.export.metadata`."""
    tolerance: float
    """What the relative difference was held to."""
    compared: Compared | None
    """Differences to eager that onnxruntime showed; None if nothing was compared."""

    def __str__(self) -> str:
        """Two lines at the most."""
        text = f"{self.path} (opset {self.opset})"
        if self.compared is None:
            return f"{text}\nnot compared with the wrapped model"
        return (
            f"{text}\nlargest difference to eager in onnxruntime: {self.compared.logits:.2g} in "
            f"logits, {self.compared.values:.2g} in values, {self.compared.relative:.2g} relative "
            f"(tolerance {self.tolerance:g}), over batches of {list(self.compared.batches)}"
        )


def to_onnx(
    wrapped: ShapleyWrapper | ShapleyCLIP,
    path: str | os.PathLike[str],
    images: Tensor,
    *,
    dynamic_batch: bool = True,
    check: bool = True,
    tolerance: float | None = None,
    opset: int | None = None,
    external_data: bool | None = None,
    **what: Unpack[What],
) -> OnnxReport:
    """Writes an ONNX file from "images" to "logits" and "values"; returns what was measured.

    Exported is what the model computes in eval mode, whatever its modes, which stay. A file that
    fails the comparison is not written, and one that was there before stays.

    Args:
        wrapped: A wrapped classifier or a `ShapleyCLIP`, in float32 or float16.
        path: Where the file goes.
        images: An example batch [B, C, H, W], normalised (with `pixels` in [0, 1]). The file takes
            images of this height and width.
        dynamic_batch: Whether it takes any number of images, else B.
        check: Run the file in onnxruntime, on the CPU, and compare it with the wrapped model: on
            these images and, with `dynamic_batch`, on one and on one more.
        tolerance: Largest difference that passes, relative to the size of the logits (of their N-th
            part for values); by default 1e-4, 2e-2 in float16.
        opset: Version of the operators; by default torch's.
        external_data: Whether weights go to a file of their own; by default where they exceed 2 GB.
        **what: `values`, `pixels`, `normalization`, `texts`, `class_names` as in `exportable`.

    Raises:
        ExportError: torch cannot trace the model or has no ONNX operators for it, onnxruntime
            refuses the file (as it does most layers in float64), the comparison fails, or the
            weights are bfloat16.
        MissingDependencyError: onnx, onnxscript or, with `check`, onnxruntime is not installed.
        ArgumentError: No folder to write to.
        ImageError: Images that the model refuses, or pixels outside of [0, 1].
        ImageTypeError: Images that are not floating point.
        ShapwrapError: What `exportable` says.
    """
    _need("onnx", "onnxscript", *(["onnxruntime"] if check else []))
    path = Path(path)
    if not path.parent.is_dir() or path.is_dir():
        raise ArgumentError(f"path is {str(path)!r}; expected a file name in an existing folder.")
    module = exportable(wrapped, **what)
    check_example(module, images)
    if images.dtype == torch.bfloat16:
        raise ExportError(
            "the model is torch.bfloat16, which onnxruntime's operators do not take; expected "
            "float32 or float16. Use wrapped.float() or wrapped.half() first, or to_torch."
        )
    bound = tolerance_for(images, tolerance)
    with quiet(module, images):
        program = traced(module, images, dynamic_batch=dynamic_batch)
        converted = _converted(program, opset, type(module.wrapped.model).__name__, dynamic_batch)
        notes = metadata(module, images)
        converted.model.metadata_props.update(notes)
        for node in converted.model.graph.all_nodes():
            # Paths of the machine that exports are nobody's business, and most of a small file.
            node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
        with TemporaryDirectory(dir=path.parent) as folder:
            written = Path(folder) / path.name
            converted.save(written, external_data=external_data)
            compared = None
            if check:
                batches = batches_of(images, dynamic=dynamic_batch)
                compared = compare(_runtime(written), module, batches, bound)
            # The weights first: a file never names others that are not there yet.
            for made in sorted(Path(folder).iterdir(), key=lambda made: made.name == path.name):
                made.replace(path.parent / made.name)
    used = int(converted.model.opset_imports[""])
    return OnnxReport(path, used, notes, bound, compared)


def _converted(program: ExportedProgram, opset: int | None, name: str, dynamic: bool) -> Any:
    """The ONNX program."""
    try:
        return torch.onnx.export(
            program,
            (),
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            opset_version=opset,
            dynamic_shapes=({0: BATCH},) if dynamic else None,
            dynamo=True,
            verbose=False,
        )
    except Exception as error:
        raise ExportError(
            f"torch.onnx cannot express {name} ({_cause(error)}). Its torch.export program, which "
            "to_torch gives, can be run all the same."
        ) from error


def _runtime(path: Path) -> Run:
    """The file in onnxruntime, on the CPU, from and to tensors."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            path, sess_options=options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise ExportError(f"onnxruntime refuses the file ({first_line(error)}).") from error

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        try:
            outputs = session.run(list(OUTPUTS), {INPUT: images.cpu().numpy()})
        except Exception as error:
            raise ExportError(
                f"onnxruntime cannot run the file on {len(images)} images ({first_line(error)}). "
                "If its batch is what cannot vary, export with dynamic_batch=False."
            ) from error
        logits, values = (torch.from_numpy(output).to(images.device) for output in outputs)
        return logits, values

    return run


def _cause(error: BaseException) -> str:
    """The first line of what went wrong at the bottom."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _need(*packages: str) -> None:
    """Raise unless the packages are there."""
    for package in packages:
        try:
            __import__(package)
        except ImportError as error:
            raise MissingDependencyError(
                f"to_onnx needs {package}, which is not installed: pip install 'shapwrap[export]'."
            ) from error
