"""ONNX files as sources: loaded behind the fences, upgraded where needed, in canonical form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onnxprune.contracts import CanonicalModel
from onnxprune.convert.upgrade import UpgradeReport, compare_upgrade, upgrade_opset
from onnxprune.errors import ModelError
from onnxprune.graph.canonical import canonicalize
from onnxprune.graph.io import load_model
from onnxprune.ops.shapes import SHAPES

__all__ = ["LoadedOnnx", "load_onnx", "load_onnx_with_report"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedOnnx:
    """A canonical model, and what was done to get it: `upgrade` is None where the opset was in range already."""

    model: CanonicalModel
    upgrade: UpgradeReport | None
    notes: tuple[str, ...] = ()


def load_onnx(path: Path, *, custom_op_libraries: Sequence[Path] = ()) -> CanonicalModel:
    """The canonical model of the ONNX file at `path`; see `load_onnx_with_report`."""
    return load_onnx_with_report(path, custom_op_libraries=custom_op_libraries).model


def load_onnx_with_report(path: Path, *, custom_op_libraries: Sequence[Path] = ()) -> LoadedOnnx:
    """Load the ONNX file at `path`, opset 7 to 24, and bring it into canonical form.

    A file below opset 18 is upgraded, and then original and result are run on the same inputs in ONNX Runtime.

    Args:
        path: The model; its external data lie beside it.
        custom_op_libraries: Shared libraries with the model's custom operators, for that comparison. Loading one runs
            its code.

    Raises:
        ModelError: The file is damaged, hostile or unsupported, or the upgraded model computes something else.
    """
    try:
        model = load_model(path)
        from_opset = upgrade_opset(model)
        canonical = canonicalize(model, shape_rules=SHAPES)
    except ModelError as error:
        if path.name in error.message:
            raise
        raise ModelError(f"'{path}': {error.message}", error.hint) from error
    if from_opset == canonical.opset_imports[""]:
        return LoadedOnnx(model=canonical, upgrade=None)
    report = compare_upgrade(path, canonical, from_opset=from_opset, custom_op_libraries=custom_op_libraries)
    note = f"Brought from opset {report.from_opset} to {report.to_opset}"
    if report.difference is None:
        note += f"; not compared with the original, because {report.not_compared_reason}."
    else:
        note += f"; outputs differ from the original's by at most {report.difference.max_abs:.2g}."
    return LoadedOnnx(model=canonical, upgrade=report, notes=(note,))
