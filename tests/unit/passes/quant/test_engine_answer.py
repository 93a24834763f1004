"""Reading an engine's QDQ model beside the float one, and making a plan of its numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnxprune.contracts import CanonicalModel, QuantizationPlan
from onnxprune.errors import PassError, PreconditionError
from onnxprune.graph.io import load_model
from onnxprune.passes.quant.engine_answer import EngineNumbers, TensorNumbers, read_answer
from onnxprune.passes.quant.engine_copy import write_copy
from onnxprune.passes.quant.engine_plan import Provenance, plan_from_engine
from onnxprune.passes.quant.weights import LARGEST_BIAS_INTEGER
from onnxprune.runtime.sessions import ort_runner_from_model, ort_runner_from_path
from tests.builders import canonical, conv_net, proto_of
from tests.fake_engine import qdq_of

FROM_ENGINE = Provenance(engine="engine", method="engine 1 minmax", calibration_hash="hash", num_samples=8)


def net(*nodes: helper.NodeProto, opset: int = 20, outputs: int = 4, **weights: np.ndarray) -> CanonicalModel:
    return canonical(
        proto_of(list(nodes), inputs={"x": [1, 4, 8, 8]}, outputs={"y": [None] * outputs}, weights=weights, opset=opset)
    )


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).standard_normal(shape).astype(np.float32)


def copy_of(model: CanonicalModel, folder: Path) -> onnx.ModelProto:
    return onnx.load(write_copy(model, folder / "model.onnx", max_opset=24, max_ir_version=11).path)


def read(model: CanonicalModel, answer: onnx.ModelProto, folder: Path) -> EngineNumbers:
    onnx.save(answer, folder / "quantized.onnx")
    return read_answer(model, load_model(folder / "quantized.onnx"), engine="engine")


def plan_of(model: CanonicalModel, folder: Path, **options: object) -> QuantizationPlan:
    numbers = read(model, qdq_of(copy_of(model, folder), **options), folder)
    return plan_from_engine(model, numbers, FROM_ENGINE)


def test_relu_that_is_gone_passes_its_scale_on(tmp_path: Path) -> None:
    numbers = read(conv_net(batch=1), qdq_of(copy_of(conv_net(batch=1), tmp_path)), tmp_path)

    assert numbers.activations["r1"] == numbers.activations["c1"]
    assert numbers.activations["x"] == TensorNumbers(scale=float(np.float32(0.05)), zero_point=0)
    assert not numbers.float_nodes


def test_node_without_integers_stays_float_with_the_engines_reason(tmp_path: Path) -> None:
    plan = plan_of(conv_net(batch=1), tmp_path, op_types=("Conv",), removed=())

    assert plan.excluded_nodes["block/add"] == "engine left it in float: 'r1' has no scale"
    # It stands between DequantizeLinear and QuantizeLinear of its neighbours: it has all scales it needs.
    assert "stem/relu" not in plan.excluded_nodes
    assert set(plan.weights) == {"stem.weight", "block.weight"}


def test_model_of_which_the_engine_quantized_no_layer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PassError, match="engine quantized no Conv, Gemm or MatMul"):
        plan_of(conv_net(batch=1), tmp_path, op_types=("Add",))


def test_engines_weight_scales_are_taken_over_exactly(tmp_path: Path) -> None:
    plan = plan_of(net(helper.make_node("Conv", ["x", "w"], ["y"], name="conv"), w=normal(6, 4, 3, 3)), tmp_path)

    largest = np.abs(normal(6, 4, 3, 3)).max(axis=(1, 2, 3))
    np.testing.assert_array_equal(np.array(plan.weights["w"].scales, np.float32), (largest / 127).astype(np.float32))
    assert plan.adjusted == {}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"weight_type": np.uint8}, "not symmetric int8"),
        ({"weight_axis": 1}, "axis 1, which are not its output channels"),
    ],
)
def test_weight_scales_that_do_not_fit_are_made_anew_with_the_reason(
    options: dict, reason: str, tmp_path: Path
) -> None:
    model = net(helper.make_node("Conv", ["x", "w"], ["y"], name="conv"), w=normal(6, 4, 3, 3))

    plan = plan_of(model, tmp_path, **options)

    assert reason in plan.adjusted["w"]
    assert (plan.weights["w"].axis, len(plan.weights["w"].scales)) == (0, 6)


def test_one_scale_for_the_whole_weight_stays_one(tmp_path: Path) -> None:
    model = net(helper.make_node("Conv", ["x", "w"], ["y"], name="conv"), w=normal(6, 4, 3, 3))
    assert plan_of(model, tmp_path, weight_axis=None).weights["w"].axis is None


def test_channels_without_weights_and_large_biases_get_scales_that_hold_the_bias(tmp_path: Path) -> None:
    weight, bias = normal(6, 4, 3, 3), np.full(6, 2.0, dtype=np.float32)
    weight[1], weight[3] = 0.0, weight[3] * 1e-9
    model = net(helper.make_node("Conv", ["x", "w", "b"], ["y"], name="conv"), w=weight, b=bias)

    plan = plan_of(model, tmp_path)

    steps = bias / (plan.activations["x"].scale * np.array(plan.weights["w"].scales))
    assert steps.max() <= LARGEST_BIAS_INTEGER * 1.0001
    assert steps[1] == pytest.approx(LARGEST_BIAS_INTEGER, rel=1e-3)
    assert "1 channels of zeros" in plan.adjusted["w"]
    assert "1 scales were widened" in plan.adjusted["w"]


def test_pooling_shares_its_inputs_scale_and_says_so(tmp_path: Path) -> None:
    model = net(
        helper.make_node("Conv", ["x", "w"], ["a"], name="conv"),
        helper.make_node("MaxPool", ["a"], ["m"], name="pool", kernel_shape=[2, 2]),
        helper.make_node("Conv", ["m", "v"], ["y"], name="last"),
        w=normal(4, 4, 3, 3),
        v=normal(4, 4, 1, 1),
    )
    numbers = read(model, qdq_of(copy_of(model, tmp_path)), tmp_path)
    numbers.activations["m"] = TensorNumbers(scale=0.02, zero_point=3)

    plan = plan_from_engine(model, numbers, FROM_ENGINE)

    assert plan.activations["m"] == plan.activations["a"]
    assert "'pool' (MaxPool) ties its tensors to one scale" in plan.adjusted["m"]


def test_constant_operand_that_the_engine_rounds_to_zero_keeps_its_own_scale(tmp_path: Path) -> None:
    model = net(
        helper.make_node("Mul", ["x", "half"], ["a"], name="scale"),
        helper.make_node("Conv", ["a", "w"], ["y"], name="conv"),
        half=np.array([[0.5]], dtype=np.float32),
        w=normal(4, 4, 3, 3),
    )
    answer = qdq_of(copy_of(model, tmp_path), op_types=("Mul", "Conv"))
    stored = next(t for t in answer.graph.initializer if t.name.endswith("_stored") and t.dims == [1, 1])
    stored.CopyFrom(numpy_helper.from_array(np.zeros((1, 1), np.int8), stored.name))

    plan = plan_from_engine(model, read(model, answer, tmp_path), FROM_ENGINE)

    assert plan.activations["half"].scale == pytest.approx(0.5 / 255, rel=1e-6)


def test_decode_tail_stays_float_whatever_the_engine_does(tmp_path: Path) -> None:
    model = net(
        helper.make_node("Conv", ["x", "w"], ["a"], name="conv"),
        helper.make_node("Add", ["a", "a"], ["y"], name="decode"),
        w=normal(4, 4, 3, 3),
    )
    assert "decode arithmetic" in plan_of(model, tmp_path).excluded_nodes["decode"]


# --- graphs that are no longer the model's --------------------------------------------------------------------


def _insert_mul(answer: onnx.ModelProto) -> None:
    position, reader = next((i, node) for i, node in enumerate(answer.graph.node) if node.op_type == "Conv")
    answer.graph.initializer.append(numpy_helper.from_array(np.ones((), np.float32), "smooth"))
    answer.graph.node.insert(position, helper.make_node("Mul", [reader.input[0], "smooth"], ["smoothed"], name="mul"))
    answer.graph.node[position + 1].input[0] = "smoothed"


def _change_weight(answer: onnx.ModelProto) -> None:
    stored = next(tensor for tensor in answer.graph.initializer if tensor.name.endswith("_stored"))
    array = numpy_helper.to_array(stored).copy()
    array.reshape(-1)[0] = -array.reshape(-1)[0] + 5
    stored.CopyFrom(numpy_helper.from_array(array, stored.name))


def _change_bias(answer: onnx.ModelProto) -> None:
    conv = next(node for node in answer.graph.node if node.op_type == "Conv")
    bias = next(tensor for tensor in answer.graph.initializer if tensor.name == conv.input[2])
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) * 2, bias.name))


def _drop_conv(answer: onnx.ModelProto) -> None:
    first, second = [node for node in answer.graph.node if node.op_type == "Conv"]
    second.name, first.name = "gone", second.name
    del first


def _swap_operator(answer: onnx.ModelProto) -> None:
    next(node for node in answer.graph.node if node.op_type == "Add").op_type = "Sub"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_insert_mul, r"'stem/conv' \(Conv\) no longer reads 'x'"),
        (_change_weight, "is not the model's weight, rounded"),
        (_change_bias, r"the constant 'stem.bias' of 'stem/conv' \(Conv\) is another one"),
        (_drop_conv, "'stem/conv' .Conv. is gone"),
        (_swap_operator, r"'block/add' \(Add\) became a Sub"),
    ],
)
def test_graph_that_is_not_the_models_any_more_is_refused(change, message: str, tmp_path: Path) -> None:
    answer = qdq_of(copy_of(conv_net(batch=1), tmp_path))
    change(answer)
    with pytest.raises(PassError, match=message):
        read(conv_net(batch=1), answer, tmp_path)


# --- the copy -------------------------------------------------------------------------------------------------


def test_copy_has_plain_names_and_computes_the_same(tmp_path: Path) -> None:
    model = conv_net(batch=1)
    copy = write_copy(model, tmp_path / "model.onnx", max_opset=24, max_ir_version=9)
    proto = onnx.load(copy.path)

    assert [node.name for node in proto.graph.node] == [f"n{position}" for position in range(8)]
    assert copy.inputs == {"x": "v0"}
    assert proto.ir_version == 9
    assert copy.translated("n0: v0_scale of n7_quant, n12") == "stem/conv: x_scale of head/gemm_quant, n12"
    data = np.ones((1, 3, 8, 8), np.float32)
    (wanted,) = ort_runner_from_model(model).run({"x": data}).values()
    (actual,) = ort_runner_from_path(copy.path).run({"v0": data}).values()
    np.testing.assert_array_equal(actual, wanted)
    assert model.graph.initializers["stem.weight"].const_value.name == "stem.weight"


def test_opset_is_lowered_where_the_nodes_are_the_same_in_it(tmp_path: Path) -> None:
    model = net(helper.make_node("Conv", ["x", "w"], ["y"], name="conv"), w=normal(4, 4, 3, 3), opset=22)
    copy = write_copy(model, tmp_path / "model.onnx", max_opset=19, max_ir_version=9)
    assert onnx.load(copy.path).opset_import[0].version == 19


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (
            helper.make_node("GroupNormalization", ["x", "s", "s"], ["y"], name="norm", num_groups=2),
            r"'norm' \(GroupNormalization\) is one of opset 21, and the engine's onnxruntime reads no opset above 19",
        ),
        (helper.make_node("Gelu", ["x"], ["y"], name="gelu"), r"'gelu' \(Gelu\) is newer than opset 19"),
    ],
)
def test_opset_is_not_lowered_where_a_node_means_something_else(node, message: str, tmp_path: Path) -> None:
    model = net(node, opset=22, **({"s": np.ones(4, np.float32)} if "s" in node.input else {}))
    with pytest.raises(PreconditionError, match=message):
        write_copy(model, tmp_path / "model.onnx", max_opset=19, max_ir_version=9)
