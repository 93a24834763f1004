"""int8 without calibration data: what is integer, what ONNX Runtime makes of it, and what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from onnxprune.contracts import CanonicalModel, ModelState, PassContext, Placement, QuantizationPlan
from onnxprune.errors import TargetError
from onnxprune.graph.metadata import MODULE_PATH_KEY
from onnxprune.graph.weights import constant_array
from onnxprune.passes.quant import QuantConfig, QuantPass
from onnxprune.targets.qdq import SpellingName
from onnxprune.targets.qdq.data_free import place_data_free, spell_data_free
from onnxprune.targets.qdq.data_free_costs import MatrixProduct, block_wise_pays, dynamic_pays
from onnxprune.targets.qdq.stored import StorageForm
from tests.builders import canonical, conv_net, proto_of
from tests.quantization import kernels, run, signal_to_noise_db
from tests.recurrent import embedding_lstm_head


def weights(*shape: int) -> np.ndarray:
    return (np.random.default_rng(5).standard_normal(shape) * 0.1).astype(np.float32)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(6).standard_normal(shape).astype(np.float32)


def planned(model: CanonicalModel, mode: str, **config: Any) -> QuantizationPlan:
    pass_ = QuantPass(QuantConfig.model_validate({"mode": mode, **config}))
    return pass_.plan(ModelState(model=model), PassContext())


def placed(
    model: CanonicalModel, mode: str, spelling: SpellingName = "x86-vnni", form: StorageForm = "folded", **config: Any
) -> tuple[Placement, ir.Model]:
    """Placement and spelled graph, which must be valid ONNX as far as ONNX knows its operators."""
    plan = planned(model, mode, **config)
    placement = place_data_free(model, plan, spelling, form=form)
    spelled = spell_data_free(model, plan, placement, spelling, form=form)
    onnx.checker.check_model(ir.to_proto(spelled))
    return placement, spelled


def products(*, rows: int = 64, shared: int = 3) -> CanonicalModel:
    """`shared` matrix products with biases that read one tensor, summed up."""
    nodes, constants = [], {}
    for index in range(shared):
        nodes += [
            helper.make_node("MatMul", ["x", f"w{index}"], [f"m{index}"], name=f"product{index}"),
            helper.make_node("Add", [f"m{index}", f"b{index}"], [f"a{index}"], name=f"bias{index}"),
        ]
        constants |= {f"w{index}": weights(256, 512) * (index + 1), f"b{index}": weights(512)}
    nodes.append(helper.make_node("Sum", [f"a{index}" for index in range(shared)], ["y"], name="sum"))
    return canonical(
        proto_of(nodes, inputs={"x": (1, rows, 256)}, outputs={"y": (1, rows, 512)}, weights=constants, opset=20)
    )


def one_layer(op_type: str, data: tuple[int, ...], *constants: np.ndarray, **attributes: Any) -> CanonicalModel:
    names = [f"c{index}" for index in range(len(constants))]
    node = helper.make_node(op_type, ["x", *names], ["y"], name="layer", **attributes)
    rank = len(data)
    proto = proto_of(
        [node],
        inputs={"x": data},
        outputs={"y": [None] * rank},
        weights=dict(zip(names, constants, strict=True)),
        opset=20,
    )
    return canonical(proto)


# --- dynamic ------------------------------------------------------------------------------------------------------


def test_products_that_read_one_tensor_share_its_range_and_are_fused(tmp_path: Path) -> None:
    model = products(shared=3)

    placement, spelled = placed(model, "dynamic")

    assert placement.integer_nodes == ("product0", "product1", "product2")
    found = kernels(spelled, tmp_path)
    assert (found["DynamicQuantizeLinear"], found["MatMulIntegerToFloat"]) == (1, 3), found
    assert found["MatMul"] == found["MatMulInteger"] == 0
    feeds = {"x": normal(1, 64, 256)}
    # One rounding of weights and one of activations to 8 bits.
    assert signal_to_noise_db(run(model, feeds)[0], run(spelled, feeds)[0]) > 38


def test_lone_product_becomes_one_operator(tmp_path: Path) -> None:
    _, spelled = placed(products(shared=1), "dynamic")

    assert kernels(spelled, tmp_path)["DynamicQuantizeMatMul"] == 1


def test_names_of_nodes_and_tensors_stay_and_the_given_model_too() -> None:
    model = products(shared=2)
    before = ir.to_proto(model).SerializeToString()

    _, spelled = placed(model, "dynamic")

    operators = {node.name: node.op_type for node in spelled.graph}
    assert operators["product0"] == "MatMulInteger"
    assert {"m0", "a0", "m1"} <= {value.name for node in spelled.graph for value in node.outputs}
    assert not {"w0", "w1"} & set(spelled.graph.initializers)
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize(("spelling", "largest"), [("x86-vnni", 127), ("arm64", 127), ("x86", 63)])
def test_weights_are_signed_and_have_seven_bits_without_vnni(spelling: SpellingName, largest: int) -> None:
    _, spelled = placed(products(shared=1), "dynamic", spelling)

    integers = constant_array(spelled.graph.initializers["w0_quantized"])
    assert integers is not None
    assert integers.dtype == np.int8
    assert np.abs(integers.astype(np.int32)).max(axis=0).tolist() == [largest] * 512


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_keeps_its_bias_and_may_have_a_transposed_weight(transposed: int) -> None:
    weight = weights(256, 512)
    model = one_layer("Gemm", (64, 256), weight.T.copy() if transposed else weight, weights(512), transB=transposed)

    placement, spelled = placed(model, "dynamic")

    assert placement.integer_nodes == ("layer",)
    feeds = {"x": normal(64, 256)}
    assert signal_to_noise_db(run(model, feeds)[0], run(spelled, feeds)[0]) > 38


@pytest.mark.parametrize(
    ("constants", "attributes", "reason"),
    [
        ((weights(256, 512), weights(64, 512)), {}, "its bias differs from row to row"),
        ((weights(256, 512),), {"alpha": 0.5}, "its alpha is not 1"),
        ((weights(256, 512), weights(512)), {"beta": 2.0}, "its beta is not 1"),
    ],
)
def test_gemm_that_is_more_than_a_product_with_bias_is_only_stored(
    constants: tuple[np.ndarray, ...], attributes: dict[str, float], reason: str
) -> None:
    model = one_layer("Gemm", (64, 256), *constants, **attributes)

    placement, spelled = placed(model, "dynamic")

    assert placement.float_nodes["layer"] == f"its weight is stored as int8 and computed with in float: {reason}"
    feeds = {"x": normal(64, 256)}
    assert signal_to_noise_db(run(model, feeds)[0], run(spelled, feeds)[0]) > 40


def test_convolution_along_one_axis_is_integer_where_that_was_measured_to_pay(tmp_path: Path) -> None:
    model = one_layer(
        "Conv", (1, 256, 100), weights(128, 256, 3), weights(128), kernel_shape=[3], strides=[2], pads=[1, 1]
    )

    placement, spelled = placed(model, "dynamic")

    assert placement.integer_nodes == ("layer",)
    assert kernels(spelled, tmp_path)["ConvInteger"] == 1
    feeds = {"x": normal(1, 256, 100) + 1}
    assert signal_to_noise_db(run(model, feeds)[0], run(spelled, feeds)[0]) > 35
    assert placed(model, "dynamic", "arm64")[0].integer_nodes == ()


def test_convolution_of_pictures_computes_in_float_from_stored_integers(tmp_path: Path) -> None:
    model = one_layer("Conv", (1, 64, 14, 14), weights(64, 64, 3, 3), weights(64), kernel_shape=[3, 3])

    placement, spelled = placed(model, "dynamic")

    assert "slower than the float one" in placement.float_nodes["layer"]
    found = kernels(spelled, tmp_path)
    assert found["Conv"] == 1
    # Folded when the model is loaded.
    assert found["Cast"] == found["Mul"] == 0, found
    feeds = {"x": normal(1, 64, 14, 14)}
    assert signal_to_noise_db(run(model, feeds)[0], run(spelled, feeds)[0]) > 40


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_lstm_is_integer_and_its_embeddings_are_picked_as_integers(
    direction: str, per_channel: bool, tmp_path: Path
) -> None:
    model = embedding_lstm_head(direction=direction)

    placement, spelled = placed(model, "dynamic", per_channel=per_channel)

    assert "lstm" in placement.integer_nodes
    found = kernels(spelled, tmp_path)
    assert found["DynamicQuantizeLSTM"] == 1
    assert found["LSTM"] == 0
    table = spelled.graph.initializers["table_quantized"]
    assert (table.dtype, [node.op_type for node in table.consumers()]) == (ir.DataType.INT8, ["Gather"])
    feeds = {"ids": np.arange(0, 180, 15, dtype=np.int64).reshape(12, 1)}
    for exact, actual in zip(run(model, feeds), run(spelled, feeds), strict=True):
        # Weights with one scale for rows of very different magnitudes lose more.
        assert signal_to_noise_db(exact, actual) > (28 if per_channel else 14)


def test_batch_first_lstm_and_gru_are_only_stored() -> None:
    lstm = one_layer("LSTM", (1, 12, 48), weights(1, 128, 48), weights(1, 128, 32), hidden_size=32, layout=1)
    gru = one_layer("GRU", (12, 1, 48), weights(1, 96, 48), weights(1, 96, 32), hidden_size=32)

    assert placed(lstm, "dynamic")[0].float_nodes["layer"].endswith("its layout is batch-first")
    placement, spelled = placed(gru, "dynamic")
    assert "no GRU that quantizes its input" in placement.float_nodes["layer"]
    feeds = {"x": normal(12, 1, 48)}
    assert signal_to_noise_db(run(gru, feeds)[0], run(spelled, feeds)[0]) > 35


def test_products_too_small_to_pay_compute_in_float() -> None:
    model = one_layer("MatMul", (1, 1, 64), weights(64, 32))

    placement, _ = placed(model, "dynamic")

    assert placement.float_nodes["layer"].endswith("finding the range in each run would cost more than integers save")


@pytest.mark.parametrize(
    ("size", "pays"),
    [
        ((1, 128, 128), False),
        ((16, 64, 64), False),
        ((196, 768, 16), False),
        ((49, 3, 96), False),
        ((1, 256, 256), True),
        ((128, 128, 128), True),
        ((196, 32, 768), True),
        ((128, 768, 768), True),
    ],
)
def test_costs_predict_what_was_measured(size: tuple[int, int, int], pays: bool) -> None:
    rows, summed, columns = size
    assert dynamic_pays(MatrixProduct(rows=rows, summed=summed, columns=columns), "x86-vnni") is pays


# --- weight-only --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("summed", [256, 300])
def test_large_products_are_block_wise_with_a_padded_last_block(summed: int, tmp_path: Path) -> None:
    model = one_layer("Gemm", (4, summed), weights(600, summed), weights(600), transB=1)

    placement, spelled = placed(model, "weight-only")

    assert placement.integer_nodes == ("layer",)
    assert kernels(spelled, tmp_path)["MatMulNBits"] == 1
    feeds = {"x": normal(4, summed)}
    assert signal_to_noise_db(run(model, feeds)[0], run(spelled, feeds)[0]) > 38


@pytest.mark.parametrize("spelling", ["x86", "arm64"])
def test_block_wise_products_are_written_only_where_they_were_measured(spelling: SpellingName, tmp_path: Path) -> None:
    model = one_layer("MatMul", (4, 256), weights(256, 600))

    placement, spelled = placed(model, "weight-only", spelling)

    assert "was not measured" in placement.float_nodes["layer"]
    assert kernels(spelled, tmp_path)["MatMulNBits"] == 0
    assert not block_wise_pays(summed=768, columns=768, spelling=spelling)


def test_stored_weights_are_the_numbers_of_the_plan_exactly() -> None:
    model = conv_net(batch=1)
    plan = planned(model, "weight-only", weight_bits=5)
    placement = place_data_free(model, plan, "x86", form="folded")
    forms = [spell_data_free(model, plan, placement, "x86", form=form) for form in ("folded", "kept")]

    feeds = {"x": normal(1, 3, 8, 8)}
    one, other = (run(form, feeds, optimized=False)[0] for form in forms)
    # Dequantized by Cast and Mul, or by DequantizeLinear.
    np.testing.assert_array_equal(one, other)
    (name,) = plan.weights
    integers = constant_array(forms[0].graph.initializers[f"{name}_quantized"])
    assert integers is not None
    assert np.abs(integers.astype(np.int32)).max() == 15


def test_kept_form_has_no_cast_that_could_be_folded() -> None:
    model = one_layer("Conv", (1, 64, 14, 14), weights(64, 64, 3, 3), kernel_shape=[3, 3])

    _, spelled = placed(model, "weight-only", form="kept")

    assert [node.op_type for node in spelled.graph] == ["DequantizeLinear", "Conv"]


def test_dynamic_mode_converts_nothing_in_each_run() -> None:
    model = one_layer("Conv", (1, 64, 14, 14), weights(64, 64, 3, 3), kernel_shape=[3, 3])

    placement, spelled = placed(model, "dynamic", form="kept")

    assert placement.float_nodes["layer"].startswith("its weight stays float32")
    assert [node.op_type for node in spelled.graph] == ["Conv"]


def test_grouped_transposed_convolution_and_stack_of_matrices_are_stored() -> None:
    transposed = one_layer("ConvTranspose", (1, 32, 7, 7), weights(32, 8, 4, 4), group=4, kernel_shape=[4, 4])
    stack = one_layer("MatMul", (4, 8, 32), weights(4, 32, 32))

    for model, shape in ((transposed, (1, 32, 7, 7)), (stack, (4, 8, 32))):
        placement, spelled = placed(model, "weight-only")
        assert placement.integer_nodes == ()
        feeds = {"x": normal(*shape)}
        assert signal_to_noise_db(run(model, feeds)[0], run(spelled, feeds)[0]) > 40


# --- both ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["dynamic", "weight-only"])
def test_file_is_about_a_quarter_and_the_same_plan_gives_the_same_bytes(mode: str) -> None:
    model = products(shared=3)

    one, other = (ir.to_proto(placed(model, mode)[1]).SerializeToString(deterministic=True) for _ in range(2))

    assert one == other
    assert len(one) < 0.27 * len(ir.to_proto(model).SerializeToString())


def test_only_the_module_of_an_exporters_metadata_is_copied() -> None:
    model = products(shared=1)
    for node in model.graph:
        node.metadata_props.update({MODULE_PATH_KEY: f"net.{node.name}", "stack_trace": "x" * 3000})

    _, spelled = placed(model, "dynamic")

    found = {node.op_type: dict(node.metadata_props) for node in spelled.graph}
    assert found["DynamicQuantizeLinear"] == {MODULE_PATH_KEY: "net.product0"}
    # What took the layer's place and name has all of it.
    assert set(found["MatMulInteger"]) == {MODULE_PATH_KEY, "stack_trace"}


def test_weight_inside_a_body_stays_float_with_the_reason() -> None:
    body = helper.make_graph(
        [helper.make_node("MatMul", ["x", "inner"], ["t"], name="inside")],
        "then",
        [],
        [helper.make_tensor_value_info("t", 1, None)],
        [onnx.numpy_helper.from_array(weights(256, 256), "inner")],
    )
    other = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["e"], name="otherwise")],
        "else",
        [],
        [helper.make_tensor_value_info("e", 1, None)],
    )
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["peak"], name="peak", keepdims=0),
        helper.make_node("Cast", ["peak"], ["flag"], to=9),
        helper.make_node("If", ["flag"], ["i"], name="if", then_branch=body, else_branch=other),
        helper.make_node("MatMul", ["i", "w"], ["y"], name="outside"),
    ]
    proto = proto_of(
        nodes, inputs={"x": (64, 256)}, outputs={"y": [None, None]}, weights={"w": weights(256, 256)}, opset=20
    )
    model = canonical(proto)

    placement, spelled = placed(model, "dynamic")

    assert placement.integer_nodes == ("outside",)
    assert placement.float_nodes["inside"] == "it stands inside the body of an If, Loop or Scan"
    feeds = {"x": normal(64, 256)}
    assert signal_to_noise_db(run(model, feeds)[0], run(spelled, feeds)[0]) > 38


def test_plan_or_placement_of_another_model_is_refused() -> None:
    model, other = products(shared=1), conv_net(batch=1)
    plan = planned(model, "dynamic")
    placement = place_data_free(model, plan, "x86", form="folded")

    with pytest.raises(TargetError, match="placement was made for another model"):
        spell_data_free(other, plan, placement, "x86", form="folded")
    empty = Placement(target=placement.target, integer_nodes=(), float_nodes={})
    with pytest.raises(TargetError, match="plan was made for another model"):
        spell_data_free(other, plan, empty, "x86", form="folded")
