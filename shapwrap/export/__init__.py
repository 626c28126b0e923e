"""Wrapped models for runtimes without shapwrap: `torch.export` programs and ONNX files."""

from shapwrap.export.exportable import Exportable, What, exportable
from shapwrap.export.metadata import metadata
from shapwrap.export.onnx_file import OnnxReport, to_onnx
from shapwrap.export.program import to_torch

__all__ = ["Exportable", "OnnxReport", "What", "exportable", "metadata", "to_onnx", "to_torch"]
