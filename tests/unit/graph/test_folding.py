"""Constants are computed ahead, exactly and within bounds."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import numpy_helper
from onnx.backend.test.case.node import collect_testcases

from onnxprune.graph import folding
from onnxprune.graph.canonical import canonicalize
from onnxprune.graph.folding import FoldingBudget
from onnxprune.graph.io import load_model, model_bytes, model_from_proto
from onnxprune.ops.shapes import SHAPES


def canonical(text: str, **weights: np.ndarray) -> ir.Model:
    proto = onnx.parser.parse_model('<ir_version: 10, opset_import: ["": 20]>' + text)
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return canonicalize(model_from_proto(proto, Path("model.onnx")), shape_rules=SHAPES)


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def the_constant(model: ir.Model) -> np.ndarray:
    (value,) = model.graph.initializers.values()
    assert value.const_value is not None
    return value.const_value.numpy()


def test_chain_on_a_weight_becomes_one_initializer_under_the_last_name() -> None:
    w = np.arange(6, dtype=np.int32).reshape(2, 3)
    model = canonical(
        "g (float[N,3] x) => (y) { t = Transpose(w) r = Reshape(t, s) c = Cast<to = 1>(r) y = MatMul(x, c) }",
        w=w,
        s=np.array([3, 2]),
    )
    assert ops(model) == ["MatMul"]
    assert list(model.graph.initializers) == ["c"]
    np.testing.assert_array_equal(the_constant(model), w.T.astype(np.float32))


def test_shape_arithmetic_on_static_dimensions_is_folded_although_the_batch_is_dynamic() -> None:
    text = """g (float[N,6,8] x) => (y) {
        s = Shape(x)
        h = Gather(s, one)
        w = Slice(s, two, three)
        area = Mul(h, w)
        batch = Slice(s, zero, onee)
        target = Concat<axis = 0>(batch, area)
        y = Reshape(x, target)
    }"""
    weights = {"one": np.array(1), "two": np.array([2]), "three": np.array([3]), "zero": np.array([0])}
    model = canonical(text, **weights, onee=np.array([1]))
    # The batch is asked for at run time, the area is known.
    assert ops(model) == ["Shape", "Slice", "Concat", "Reshape"]
    assert str(model.graph.outputs[0].shape) == "[N,48]"


@pytest.mark.parametrize(("megabytes", "folded"), [(0.9, True), (1.5, False)])
def test_result_may_grow_by_one_mebibyte_and_no_more(megabytes: float, folded: bool) -> None:
    length = int(megabytes * 2**20 / 4)
    model = canonical(
        "g (float[N] x) => (y) { c = Expand(one, size) y = Add(x, c) }".replace("float[N]", "float[1]"),
        one=np.ones(1, np.float32),
        size=np.array([length]),
    )
    assert ops(model) == (["Add"] if folded else ["Expand", "Add"])


def test_result_may_be_as_large_as_the_weight_that_goes() -> None:
    model = canonical("g (float[1] x) => (y) { c = Neg(w) y = Add(x, c) }", w=np.ones(3_000_000, np.float32))
    assert ops(model) == ["Add"]
    # The weight has another user, so nothing goes.
    model = canonical(
        "g (float[1] x) => (y, z) { c = Neg(w) y = Add(x, c) z = Mul(x, w) }", w=np.ones(3_000_000, np.float32)
    )
    assert ops(model) == ["Neg", "Add", "Mul"]


def test_all_results_together_are_bounded() -> None:
    budget = FoldingBudget(100_000)
    assert [budget.allows(36_000) for _ in range(4)] == [True, True, False, False]
    assert budget.allows(28_000)
    assert budget.allows(-5)
    assert not budget.allows(1)
    assert not FoldingBudget(10**9).allows(2**20 + 1)


def test_integer_division_rounds_toward_zero_as_runtimes_do() -> None:
    # The reference implementation that evaluates constants rounds down.
    a, b = np.array([7, -7, 7, -7, 6], np.int64), np.array([2, 2, -2, -2, -3], np.int64)
    model = canonical("g (int64[5] x) => (y) { q = Div(a, b) y = Add(x, q) }", a=a, b=b)
    np.testing.assert_array_equal(the_constant(model), [3, -3, -3, 3, -2])


@pytest.mark.parametrize(
    ("node", "weights"),
    [
        ("Cast<to = 6>(a)", {"a": np.array([np.nan, 1.0], np.float32)}),
        ("Cast<to = 2>(a)", {"a": np.array([-3.0, 300.0], np.float32)}),
        ("Div(a, b)", {"a": np.array([1, 2]), "b": np.array([0, 1])}),
    ],
    ids=["NaN to integer", "out of range", "division by zero"],
)
def test_undefined_results_are_left_to_the_runtime(node: str, weights: dict[str, np.ndarray]) -> None:
    model = canonical(f"g (float[2] x) => (y, c) {{ c = {node} y = Neg(x) }}", **weights)
    assert len(ops(model)) == 2


def test_quantized_weights_random_nodes_and_control_flow_are_left_alone() -> None:
    text = """g (float[2] x) => (y, r, z) {
        d = DequantizeLinear(q, scale)
        y = Add(x, d)
        r = RandomNormal<shape = [2]>()
        z = If(c) <
            then_branch = t () => (float[2] p) { p = Neg(k) },
            else_branch = e () => (float[2] n) { n = Abs(k) }
        >
    }"""
    weights = {"q": np.array([1, 2], np.int8), "scale": np.array(0.5, np.float32), "c": np.array(True)}
    model = canonical(text, **weights, k=np.ones(2, np.float32))
    assert ops(model) == ["DequantizeLinear", "Add", "RandomNormal", "If"]


def test_half_precision_arithmetic_is_left_to_the_runtime_but_moves_are_folded() -> None:
    w = np.ones((2, 3), np.float16)
    model = canonical("g (float16[2] x) => (y) { s = Mul(w, w) t = Transpose(s) y = MatMul(t, x) }", w=w)
    assert "Mul" in ops(model)
    model = canonical("g (float16[2] x) => (y) { t = Transpose(w) y = MatMul(t, x) }", w=w)
    assert ops(model) == ["MatMul"]


def test_weight_stored_in_half_precision_is_not_widened_in_the_file() -> None:
    model = canonical("g (float[2] x) => (y) { t = Cast<to = 1>(w) y = Mul(t, x) }", w=np.ones(2, np.float16))
    assert ops(model) == ["Cast", "Mul"]


def test_folded_output_of_the_graph_keeps_its_name() -> None:
    model = canonical(
        "g (float[2] x) => (float[2] y, float[2] anchors) { y = Neg(x) anchors = Add(a, a) }", a=np.ones(2, np.float32)
    )
    assert [value.name for value in model.graph.outputs] == ["y", "anchors"]
    assert ops(model) == ["Neg"]
    session = onnxruntime.InferenceSession(model_bytes(model), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(["anchors"], {"x": np.zeros(2, np.float32)})[0], [2, 2])


def test_nodes_inside_a_branch_are_folded_there() -> None:
    text = """g (float[2] x, bool c) => (float[2] y) {
        y = If(c) <
            then_branch = t () => (float[2] p) { k = Neg(w) p = Add(x, k) },
            else_branch = e () => (float[2] n) { n = Abs(x) }
        >
    }"""
    model = canonical(text, w=np.ones(2, np.float32))
    assert [[node.op_type for node in graph] for graph in model.graph.subgraphs()] == [["Add"], ["Abs"]]


def test_large_weight_on_disk_is_transposed_when_it_is_read(tmp_path: Path) -> None:
    w = np.random.default_rng(0).random((700, 900), np.float32)
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[N,900] x) => (y) { t = Transpose(w) y = MatMul(x, t) }'
    )
    proto.graph.initializer.append(numpy_helper.from_array(w, "w"))
    onnx.save(proto, tmp_path / "model.onnx", save_as_external_data=True, location="model.data")
    model = canonicalize(load_model(tmp_path / "model.onnx"), shape_rules=SHAPES)
    (value,) = model.graph.initializers.values()
    assert isinstance(value.const_value, ir.LazyTensor)
    np.testing.assert_array_equal(value.const_value.numpy(), w.T)


def test_folded_nodes_give_what_onnx_runtime_gives() -> None:
    """The official one-node cases with all inputs made constants: whatever is folded must be right."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    num_folded = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the cases' own reference code
        cases = collect_testcases(None)
    known = folding._MOVES | folding._ARITHMETIC
    wrong = []
    for case in cases:
        if case.model is None or len(case.model.graph.node) != 1 or case.model.graph.node[0].op_type not in known:
            continue
        proto = onnx.ModelProto.FromString(case.model.SerializeToString())
        schema = onnx.defs.get_schema(proto.graph.node[0].op_type, 24, "")
        arrays, expected = case.data_sets[0]
        names = [value.name for value in proto.graph.input]
        numeric = all(isinstance(array, np.ndarray) and array.dtype != object for array in (*arrays, *expected))
        if schema.since_version > 24 or len(arrays) != len(names) or not numeric:
            continue
        proto.opset_import[0].version, proto.ir_version = 24, 10
        proto.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in zip(names, arrays, strict=True))
        del proto.graph.input[:]
        try:
            session = onnxruntime.InferenceSession(
                proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            reference = session.run(None, {})
        except Exception:  # noqa: BLE001 - no kernel for that type, in one of its many exceptions
            continue
        model = canonicalize(model_from_proto(proto, Path("model.onnx")), shape_rules=SHAPES)
        if len(model.graph):
            continue
        num_folded += 1
        for value, array in zip(model.graph.outputs, reference, strict=True):
            assert value.const_value is not None
            found = value.const_value.numpy()
            # Transcendental functions and sums differ in the last bits between NumPy and ONNX Runtime.
            largest = np.nan_to_num(array, posinf=0.0, neginf=0.0) if array.dtype == np.float32 else np.zeros(1)
            atol = 2e-7 * max(1.0, float(np.abs(largest).max(initial=0.0)))
            if found.shape != array.shape or not np.allclose(found, array, rtol=1e-6, atol=atol, equal_nan=True):
                wrong.append(case.name)
    assert wrong == []
    assert num_folded > 200
