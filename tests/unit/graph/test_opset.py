"""Every upgrade rule against ONNX Runtime: the old model and the raised one compute the same."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxprune.errors import ModelError
from onnxprune.graph.canonical import canonicalize
from onnxprune.graph.io import model_bytes, model_from_proto
from onnxprune.graph.names import give_unique_names
from onnxprune.graph.opset import raise_opset
from onnxprune.graph.opset_rules import RULES
from onnxprune.graph.shapes import infer_source_shapes
from onnxprune.ops.shapes import SHAPES

Array = npt.NDArray[Any]
RNG = np.random.default_rng(0)


def noise(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One node of opset `old`; the first input is fed, the others are weights ("" where None)."""

    op_type: str
    old: int
    inputs: Sequence[Array | None]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    outputs: int = 1
    new: int = 18
    label: str = ""
    dynamic: bool = False
    tolerance: float = 1e-6
    """Relative; the arithmetic is the same, but kernels of two opsets may sum in another order."""

    @property
    def id(self) -> str:
        return f"{self.op_type}-{self.old}{self.label and '-'}{self.label}"

    def proto(self) -> onnx.ModelProto:
        names = ["" if array is None else f"i{index}" for index, array in enumerate(self.inputs)]
        outputs = [f"o{index}" for index in range(self.outputs)]
        node = helper.make_node(self.op_type, names, outputs, name="the_node", **self.attributes)
        entry = node.metadata_props.add()
        entry.key, entry.value = "pkg.torch.onnx.name_scopes", "['', 'backbone.stage', 'op']"
        first = self.inputs[0]
        assert first is not None
        shape = [f"d{axis}" for axis in range(first.ndim)] if self.dynamic else first.shape
        kind = helper.np_dtype_to_tensor_dtype(first.dtype)
        graph = helper.make_graph(
            [node],
            "case",
            [helper.make_tensor_value_info("i0", kind, shape)],
            [onnx.ValueInfoProto(name=name) for name in outputs],
            [numpy_helper.from_array(a, f"i{n}") for n, a in enumerate(self.inputs) if n and a is not None],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.old)], ir_version=8)


IMAGE = noise(2, 3, 6, 8)
SHRINKING = np.array([1, 1, 0.5, 0.5], np.float32)
GROWING = np.array([1, 1, 2, 3], np.float32)
BOTH = np.array([1, 1, 2, 0.5], np.float32)
CHANNEL = [np.abs(noise(3)) + 0.1 for _ in range(4)]
POSITION = [np.abs(noise(3, 6, 8)) + 0.1 for _ in range(4)]

CASES = [
    *(Case(op_type=op, old=12, inputs=[IMAGE], label="default axis") for op in ("Softmax", "LogSoftmax", "Hardmax")),
    *(
        Case(op_type="Softmax", old=9, inputs=[IMAGE], attributes={"axis": axis}, label=f"axis {axis}")
        for axis in range(4)
    ),
    Case(op_type="Softmax", old=11, inputs=[IMAGE], attributes={"axis": -1}, label="axis -1"),
    Case(op_type="Softmax", old=11, inputs=[IMAGE], attributes={"axis": -2}, label="axis -2"),
    Case(op_type="Softmax", old=9, inputs=[noise(2, 10, 1, 1)], label="trailing ones"),
    Case(op_type="Softmax", old=11, inputs=[IMAGE], attributes={"axis": 2}, dynamic=True, label="dynamic"),
    *(Case(op_type="ReduceSum", old=11, inputs=[IMAGE], attributes=a, label=str(a)) for a in ({}, {"axes": [1, -1]})),
    *(
        Case(
            op_type=op,
            old=13,
            inputs=[np.abs(IMAGE)],
            attributes={"axes": [2, 3], "keepdims": keep},
            label=f"keep {keep}",
        )
        for op in ("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin")
        for keep in (0, 1)
    ),
    Case(op_type="ReduceProd", old=11, inputs=[IMAGE]),
    Case(op_type="ReduceSumSquare", old=11, inputs=[IMAGE], attributes={"axes": [0]}),
    Case(op_type="Squeeze", old=11, inputs=[noise(1, 3, 1)], attributes={"axes": [0, -1]}),
    Case(op_type="Squeeze", old=9, inputs=[noise(1, 3, 1)], label="all"),
    Case(op_type="Unsqueeze", old=9, inputs=[noise(2, 3)], attributes={"axes": [0, 3]}),
    Case(op_type="Split", old=11, inputs=[IMAGE], attributes={"axis": 2, "split": [1, 5]}, outputs=2),
    Case(op_type="Split", old=11, inputs=[IMAGE], attributes={"axis": 3}, outputs=4, label="equal"),
    Case(op_type="Split", old=13, inputs=[IMAGE, np.array([2, 4], np.int64)], attributes={"axis": 2}, outputs=2),
    Case(op_type="Slice", old=9, inputs=[IMAGE], attributes={"starts": [1, -3], "ends": [5, 99], "axes": [2, 3]}),
    Case(op_type="Slice", old=9, inputs=[IMAGE], attributes={"starts": [0, 1], "ends": [1, 3]}, label="leading axes"),
    Case(op_type="TopK", old=9, inputs=[noise(3, 7)], attributes={"k": 3, "axis": 1}, outputs=2),
    Case(op_type="Clip", old=9, inputs=[IMAGE], attributes={"min": -0.5, "max": 6.0}),
    Case(op_type="Clip", old=7, inputs=[IMAGE], attributes={"max": 0.25}, label="max only"),
    Case(op_type="Pad", old=9, inputs=[IMAGE], attributes={"pads": [0, 0, 1, 2, 0, 0, 3, 0], "value": 1.5}),
    Case(
        op_type="Pad",
        old=9,
        inputs=[IMAGE],
        attributes={"pads": [0, 0, 1, 2, 0, 0, 3, 0], "mode": "reflect"},
        label="reflect",
    ),
    Case(op_type="BatchNormalization", old=7, inputs=[IMAGE, *CHANNEL], attributes={"epsilon": 1e-3}),
    Case(op_type="BatchNormalization", old=9, inputs=[IMAGE, *CHANNEL], outputs=1),
    Case(op_type="Dropout", old=7, inputs=[IMAGE], attributes={"ratio": 0.3}),
    Case(op_type="Dropout", old=10, inputs=[IMAGE], attributes={"ratio": 0.3}),
    *(
        Case(op_type="Upsample", old=old, inputs=inputs, attributes={"mode": mode, **attributes}, label=mode)
        for old, inputs, attributes in ((7, [IMAGE], {"scales": GROWING.tolist()}), (9, [IMAGE, GROWING], {}))
        for mode in ("nearest", "linear")
    ),
    *(
        Case(op_type="Resize", old=10, inputs=[IMAGE, scales], attributes={"mode": mode}, label=f"{mode} {name}")
        for mode in ("nearest", "linear")
        for name, scales in (("up", GROWING), ("down", SHRINKING), ("both", BOTH))
    ),
    Case(
        op_type="Resize",
        old=11,
        inputs=[IMAGE, np.zeros(0, np.float32), GROWING],
        attributes={"mode": "linear"},
        label="no roi",
    ),
    Case(
        op_type="Resize",
        old=11,
        inputs=[IMAGE, np.zeros(0, np.float32), np.zeros(0, np.float32), np.array([2, 3, 9, 5], np.int64)],
        attributes={"mode": "nearest"},
        label="sizes",
    ),
    Case(
        op_type="Resize",
        old=11,
        inputs=[IMAGE, np.zeros(0, np.float32), GROWING],
        attributes={"coordinate_transformation_mode": "tf_half_pixel_for_nn", "nearest_mode": "floor"},
        label="tf half pixel",
    ),
    Case(
        op_type="RoiAlign",
        old=10,
        inputs=[IMAGE, np.array([[0, 0, 5, 5], [1, 1, 4, 3]], np.float32), np.array([0, 1], np.int64)],
        attributes={"output_height": 2, "output_width": 2},
    ),
    Case(
        op_type="Scatter",
        old=9,
        inputs=[noise(3, 3), np.array([[1, 0, 2]], np.int64), noise(1, 3)],
        attributes={"axis": 0},
    ),
    Case(
        op_type="GroupNormalization",
        old=18,
        new=21,
        inputs=[noise(2, 6, 4), noise(3), noise(3)],
        attributes={"num_groups": 3},
    ),
    Case(
        op_type="GridSample",
        old=16,
        new=20,
        inputs=[IMAGE, (RNG.random((2, 4, 4, 2)) * 2 - 1).astype(np.float32)],
        attributes={"mode": "bilinear"},
    ),
    Case(op_type="DFT", old=17, new=20, inputs=[noise(2, 8, 5, 1)], attributes={"axis": 2}, tolerance=1e-5),
]


def run(content: bytes, feeds: Mapping[str, Array]) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return list(
        onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"]).run(None, dict(feeds))
    )


def loaded(proto: onnx.ModelProto) -> ir.Model:
    model = model_from_proto(onnx.ModelProto.FromString(proto.SerializeToString()), Path("model.onnx"))
    give_unique_names(model)
    infer_source_shapes(model, SHAPES)
    return model


def assert_close(actual: Array, expected: Array, tolerance: float) -> None:
    assert actual.dtype == expected.dtype
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * max(1.0, np.abs(expected).max(initial=0)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_raised_node_computes_what_the_old_one_did(case: Case) -> None:
    proto = case.proto()
    feeds = {"i0": case.inputs[0]}
    expected = run(proto.SerializeToString(), feeds)
    model = loaded(proto)
    raise_opset(model, case.new)
    give_unique_names(model)
    assert model.opset_imports[""] == case.new
    for before, after in zip(expected, run(model_bytes(model), feeds), strict=True):
        assert_close(after, before, case.tolerance)
    for before, after in zip(expected, run(model_bytes(canonicalize(model, shape_rules=SHAPES)), feeds), strict=True):
        assert_close(after, before, case.tolerance)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_raised_node_keeps_its_module_path_and_its_output_names(case: Case) -> None:
    model = loaded(case.proto())
    raise_opset(model, case.new)
    computing = [node for node in model.graph if node.op_type != "Constant"]
    assert {node.metadata_props["pkg.torch.onnx.name_scopes"] for node in computing} == {"['', 'backbone.stage', 'op']"}
    assert [value.name for value in model.graph.outputs] == [f"o{index}" for index in range(case.outputs)]


def test_batch_normalization_with_statistics_for_each_position_is_decomposed() -> None:
    # ONNX Runtime has no kernel for spatial = 0 with these shapes any more, so the formula itself is the reference.
    case = Case(
        op_type="BatchNormalization", old=7, inputs=[IMAGE, *POSITION], attributes={"spatial": 0, "epsilon": 1e-3}
    )
    model = loaded(case.proto())
    raise_opset(model, 18)
    give_unique_names(model)
    scale, bias, mean, variance = POSITION
    expected = (IMAGE - mean) / np.sqrt(variance + 1e-3) * scale + bias
    # Float32 in another order than NumPy's.
    np.testing.assert_allclose(run(model_bytes(model), {"i0": IMAGE})[0], expected, rtol=1e-5, atol=1e-5)


def test_rules_reach_nodes_in_subgraphs() -> None:
    branches = [
        helper.make_graph(
            [helper.make_node("Squeeze", ["x"], [name], axes=[axis])],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)],
        )
        for name, axis in (("first", 0), ("last", 2))
    ]
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], then_branch=branches[0], else_branch=branches[1])],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 1]),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=7)
    model = loaded(proto)
    raise_opset(model, 18)
    give_unique_names(model)
    feeds = {"x": noise(1, 3, 1)}
    for flag, shape in ((True, (3, 1)), (False, (1, 3))):
        assert run(model_bytes(model), {**feeds, "c": np.array(flag)})[0].shape == shape


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (Case(op_type="BatchNormalization", old=9, inputs=[IMAGE, *CHANNEL], outputs=5), "training mode"),
        (
            Case(
                op_type="Resize",
                old=11,
                inputs=[IMAGE, np.zeros(0, np.float32), GROWING],
                attributes={"coordinate_transformation_mode": "tf_half_pixel_for_nn", "nearest_mode": "ceil"},
            ),
            "tf_half_pixel_for_nn",
        ),
    ],
    ids=["statistics", "rounding"],
)
def test_node_without_an_equal_is_refused_by_name(case: Case, said: str) -> None:
    model = loaded(case.proto())
    with pytest.raises(ModelError, match=said) as caught:
        raise_opset(model, 18)
    assert "'the_node'" in caught.value.message


def _signature(schema: onnx.defs.OpSchema) -> tuple[Any, ...]:
    attributes = {name: (a.required, a.default_value.SerializeToString()) for name, a in schema.attributes.items()}
    return attributes, [value.name for value in schema.inputs], schema.min_input, schema.min_output, schema.max_output


def _narrows(old: onnx.defs.OpSchema, new: onnx.defs.OpSchema) -> bool:
    """True when an old node may be invalid, or mean something else, under the new schema."""
    old_attributes, _, old_min, *old_outputs = _signature(old)
    new_attributes, _, new_min, *new_outputs = _signature(new)
    lost = [name for name in old_attributes if name not in new_attributes]
    changed = [
        n for n, (_, default) in old_attributes.items() if n in new_attributes and new_attributes[n][1] != default
    ]
    demanded = [name for name, (required, _) in new_attributes.items() if required and name not in old_attributes]
    return bool(lost or changed or demanded or new_min > old_min or new_outputs[1] < old_outputs[1] or new.deprecated)


def test_every_schema_change_that_can_break_a_node_has_a_rule() -> None:
    versions: dict[str, list[onnx.defs.OpSchema]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            versions.setdefault(schema.name, []).append(schema)
    missing = []
    for name, schemas in sorted(versions.items()):
        schemas.sort(key=lambda schema: schema.since_version)
        for old, new in itertools.pairwise(schemas):
            key = (name, new.since_version)
            if 7 < new.since_version <= 24 and _narrows(old, new) and key not in RULES:
                missing.append(key)
    assert missing == []
