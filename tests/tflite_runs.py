"""Graphs through our TFLite emitter and LiteRT, against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import helper, numpy_helper

from onnxprune.graph.canonical import canonicalize
from onnxprune.ops.shapes import SHAPES
from onnxprune.targets.tflite.emit import emit
from onnxprune.targets.tflite.graph import Model
from onnxprune.targets.tflite.serialize import serialize
from tests.litert import Feeds, run_file


def one_node(
    op_type: str,
    feeds: Feeds,
    *,
    constants: Feeds | None = None,
    inputs: Sequence[str] = (),
    outputs: Sequence[str] = ("y",),
    output_type: int = onnx.TensorProto.FLOAT,
    dynamic: Mapping[str, Sequence[int]] | None = None,
    domain: str = "",
    opset: int = 23,
    **attributes: Any,
) -> onnx.ModelProto:
    """A model of one node.

    `inputs` are its inputs in order, by default those of `feeds` and then of `constants`. `dynamic` names axes of fed
    inputs that are symbolic.
    """
    constants = constants or {}
    names = list(inputs) or [*feeds, *constants]
    node = helper.make_node(op_type, names, list(outputs), name="node", domain=domain, **attributes)
    fed = [
        helper.make_tensor_value_info(
            name,
            helper.np_dtype_to_tensor_dtype(array.dtype),
            [f"d{axis}" if axis in (dynamic or {}).get(name, ()) else dim for axis, dim in enumerate(array.shape)],
        )
        for name, array in feeds.items()
    ]
    graph = helper.make_graph(
        [node],
        "one_node",
        fed,
        [helper.make_tensor_value_info(name, output_type, None) for name in outputs if name],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def emitted(proto: onnx.ModelProto) -> Model:
    """The TFLite graph of `proto`."""
    return emit(canonicalize(ir.from_proto(proto), shape_rules=SHAPES)).model


def kinds(model: Model) -> list[str]:
    """The operators of the main graph, in order."""
    return [operator.kind for operator in model.main.operators]


def litert_outputs(model: Model, feeds: Feeds, *, runs: int = 1) -> dict[str, npt.NDArray[Any]]:
    """What LiteRT computes in the last of `runs` calls with the same feeds, by the names of the outputs."""
    return run_file(serialize(model), feeds, runs=runs)


def assert_same_as_ort(
    proto: onnx.ModelProto, feeds: Feeds, *, relative: float, absolute: float, runs: int = 1
) -> Model:
    """LiteRT and ONNX Runtime agree on all outputs; gives the emitted model."""
    model = emitted(proto)
    actual = litert_outputs(model, feeds, runs=runs)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    for name, expected in zip(names, session.run(names, dict(feeds)), strict=True):
        assert actual[name].dtype == expected.dtype, name
        assert actual[name].shape == expected.shape, name
        np.testing.assert_allclose(actual[name], expected, rtol=relative, atol=absolute, err_msg=name)
    return model
