"""The official one-node cases of the `onnx` wheel, through our emitter and LiteRT."""

from __future__ import annotations

import functools
import tempfile
import warnings
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from onnxprune.convert.onnx_file import load_onnx
from onnxprune.graph.canonical import CanonicalModel, canonicalize
from onnxprune.ops.shapes import SHAPES
from onnxprune.targets.tflite.emit import emit
from onnxprune.targets.tflite.serialize import serialize
from tests.litert import run_file

OLDEST_OPSET, NEWEST_OPSET = 18, 24

RELATIVE = 1e-4
"""Of each number; and a tenth of it of the largest one, since kernels add in another order."""

CONSTANT_INPUTS: dict[str, tuple[int, ...]] = {
    "AffineGrid": (1,),
    "CenterCropPad": (1,),
    "Col2Im": (1, 2),
    "ConvInteger": (1, 3),
    "DFT": (1, 2),
    "Dropout": (1, 2),
    "MaxUnpool": (2,),
    "MelWeightMatrix": (0, 1, 2, 3, 4),
    "Pad": (1, 3),
    "Resize": (1, 2, 3),
    "STFT": (1, 3),
    "Slice": (3, 4),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
    "Upsample": (1,),
}
"""Inputs that the cases feed, that stand for attributes, and that TFLite can only take as constants, by operator."""

CONSTANT_FEEDS: dict[str, tuple[str, ...]] = {"test_affine_grid_*_expanded": ("size",)}
"""The same for operators that are spelled out, by the case's name: the operator's own input, by its name."""

RANDOM = (
    "test_bernoulli*",
    "test_training_dropout",
    "test_training_dropout_default*",
    "test_training_dropout_mask",
)
"""Cases whose numbers are drawn: no two generators agree on them."""


FOUR_DIGITS = frozenset(
    {"test_averagepool_2d_ceil_last_window_starts_on_pad", "test_roialign_aligned_false", "test_roialign_aligned_true"}
)
"""Cases whose outputs were typed in with four digits behind the point."""


@dataclass(frozen=True)
class OneNodeCase:
    """A case, with the first of its data sets."""

    name: str
    model: onnx.ModelProto
    inputs: list[Any]
    outputs: list[Any]


@functools.cache
def official_cases() -> tuple[OneNodeCase, ...]:
    """Cases whose operators are all in the canonical range, in that range's newest opset."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collected = collect_testcases(None)
    return tuple(
        OneNodeCase(case.name, _in_range(case.model), *case.data_sets[0])
        for case in collected
        if _is_canonical(case.model)
    )


def _is_canonical(model: onnx.ModelProto) -> bool:
    if any(opset.domain not in ("", "ai.onnx") for opset in model.opset_import):
        return False
    version = model.opset_import[0].version
    return all(
        onnx.defs.get_schema(node.op_type, version).since_version <= NEWEST_OPSET
        for node in model.graph.node
        if onnx.defs.has(node.op_type)
    )


def _in_range(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in the newest canonical opset where its operators have not changed since, else upgraded."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    version = model.opset_import[0].version
    since = {
        (_since(node, version), _since(node, NEWEST_OPSET)) for node in model.graph.node if onnx.defs.has(node.op_type)
    }
    changed.ir_version = min(model.ir_version, 10)
    if all(one == other for one, other in since):
        changed.opset_import[0].version = NEWEST_OPSET
    return changed


def _since(node: onnx.NodeProto, version: int) -> int:
    return int(onnx.defs.get_schema(node.op_type, version).since_version)


def run_case(case: OneNodeCase) -> list[npt.NDArray[Any]]:
    """What LiteRT computes of the case's inputs. Inputs in `CONSTANT_INPUTS` become initializers first."""
    model, feeds = _with_constants(case)
    outputs = run_file(serialize(emit(_canonical(model)).model), feeds)
    return [outputs[value.name] for value in model.graph.output]


def _canonical(model: onnx.ModelProto) -> CanonicalModel:
    if model.opset_import[0].version >= OLDEST_OPSET:
        return canonicalize(ir.from_proto(model), shape_rules=SHAPES)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.onnx"
        onnx.save(model, path)
        return load_onnx(path)


def _with_constants(case: OneNodeCase) -> tuple[onnx.ModelProto, dict[str, npt.NDArray[Any]]]:
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    frozen = {
        node.input[position]
        for node in model.graph.node
        for position in CONSTANT_INPUTS.get(node.op_type, ())
        if position < len(node.input)
    }
    frozen.update(
        name for pattern, names in CONSTANT_FEEDS.items() if fnmatchcase(case.name, pattern) for name in names
    )
    feeds: dict[str, Any] = {}
    for value, given in zip(case.model.graph.input, case.inputs, strict=True):
        # Sequences stay lists: no writer takes them.
        array = given if isinstance(given, list) else np.asarray(given)
        if value.name in frozen:
            model.graph.initializer.append(numpy_helper.from_array(array, value.name))
            model.graph.input.remove(next(one for one in model.graph.input if one.name == value.name))
        else:
            feeds[value.name] = array
    return model, feeds


def assert_agrees(case: OneNodeCase, outputs: list[npt.NDArray[Any]]) -> None:
    """The outputs are the case's, to `RELATIVE`; types and shapes are equal. Of random numbers, only these."""
    for value, expected, actual in zip(case.model.graph.output, case.outputs, outputs, strict=True):
        wanted = np.asarray(expected)
        assert actual.dtype == wanted.dtype, f"{value.name}: {actual.dtype} instead of {wanted.dtype}"
        assert actual.shape == wanted.shape, f"{value.name}: {actual.shape} instead of {wanted.shape}"
        if any(fnmatchcase(case.name, pattern) for pattern in RANDOM):
            continue
        if wanted.dtype.kind == "f" or wanted.dtype == ml_dtypes.bfloat16:
            # The reference rounds to a half after every step, and we at the end.
            relative = max(RELATIVE, 2 * float(ml_dtypes.finfo(wanted.dtype).eps))
            wanted, actual = wanted.astype(np.float64), actual.astype(np.float64)
            finite = np.abs(wanted[np.isfinite(wanted)])
            scale = float(finite.max()) if finite.size else 0.0
            absolute = 5.1e-5 if case.name in FOUR_DIGITS else relative / 10 * scale
            np.testing.assert_allclose(actual, wanted, rtol=relative, atol=absolute, err_msg=value.name)
        else:
            np.testing.assert_array_equal(actual, wanted, err_msg=value.name)
