"""A layer that is placed in float computes in float, although ONNX Runtime takes it for a forgotten one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from onnxprune.contracts import CanonicalModel, Placement
from onnxprune.targets.qdq import spell
from tests.builders import canonical, proto_of
from tests.quantization import kernels, normal_batches, plan_for, run

RNG = np.random.default_rng(5)


def weights(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) * 0.3).astype(np.float32)


def three_convolutions(*, dims: list[object] | None = None) -> CanonicalModel:
    """x -> conv1 -> conv2 -> Relu -> conv3 -> y on 4 channels."""
    return canonical(
        proto_of(
            [
                helper.make_node("Conv", ["x", "w1", "b"], ["a"], name="conv1"),
                helper.make_node("Conv", ["a", "w2", "b"], ["c"], name="conv2"),
                helper.make_node("Relu", ["c"], ["d"], name="relu"),
                helper.make_node("Conv", ["d", "w3", "b"], ["y"], name="conv3"),
            ],
            inputs={"x": dims or [1, 4, 8, 8]},
            outputs={"y": [None] * 4},
            weights={"w1": weights(4, 4, 3, 3), "w2": weights(4, 4, 3, 3), "w3": weights(4, 4, 3, 3), "b": weights(4)},
        )
    )


def placed(*integer: str, model: CanonicalModel) -> Placement:
    others = {node.name or "": "told so" for node in model.graph if node.name not in integer}
    return Placement(target="onnxruntime-x86-vnni", integer_nodes=integer, float_nodes=others)


def test_float_convolution_between_integer_ones_keeps_its_float_kernel_and_weights(tmp_path: Path) -> None:
    model = three_convolutions()
    plan = plan_for(model, normal_batches((1, 4, 8, 8)))

    spelled = spell(model, plan, placed("conv1", "conv3", model=model), "x86-vnni")

    found = kernels(spelled, tmp_path)
    assert found["QLinearConv"] == 2
    assert found["Conv"] + found["FusedConv"] == 1
    assert "w2" in spelled.graph.initializers


def test_shielded_input_has_the_numbers_of_the_tensor(tmp_path: Path) -> None:
    model = three_convolutions()
    plan = plan_for(model, normal_batches((1, 4, 8, 8)))
    feeds = {"x": RNG.standard_normal((1, 4, 8, 8)).astype(np.float32)}

    spelled = spell(model, plan, placed("conv1", model=model), "x86-vnni")

    (literal,), (optimized,) = run(spelled, feeds, optimized=False), run(spelled, feeds)
    # One convolution in integers, the others in float: what is left are roundings of float32.
    np.testing.assert_allclose(optimized, literal, rtol=0, atol=1e-5 * np.abs(literal).max())
    (shielded,) = (node for node in spelled.graph if node.name == "conv2")
    dequantize = shielded.inputs[0].producer()  # type: ignore[union-attr]
    assert dequantize is not None
    scale = dequantize.inputs[1].const_value.numpy()  # type: ignore[union-attr]
    assert scale.shape == (4,)
    assert len(set(scale.tolist())) == 1


@pytest.mark.parametrize("op_type", ["Gemm", "MatMul"])
def test_float_matrix_products_behind_integers_are_shielded_too(op_type: str, tmp_path: Path) -> None:
    inputs = ["a", "w2", "b"] if op_type == "Gemm" else ["a", "w2"]
    model = canonical(
        proto_of(
            [
                helper.make_node("Gemm", ["x", "w1"], ["a"], name="first"),
                helper.make_node(op_type, inputs, ["c"], name="second"),
                helper.make_node("Add", ["c", "b"], ["y"], name="add"),
            ],
            inputs={"x": [2, 8]},
            outputs={"y": [2, 8]},
            weights={"w1": weights(8, 8), "w2": weights(8, 8), "b": weights(8)},
        )
    )
    plan = plan_for(model, normal_batches((2, 8)))
    feeds = {"x": RNG.standard_normal((2, 8)).astype(np.float32)}

    spelled = spell(model, plan, placed("first", model=model), "x86-vnni")

    (literal,), (optimized,) = run(spelled, feeds, optimized=False), run(spelled, feeds)
    # Weights rounded to int8 with one scale would be off by 1e-2.
    np.testing.assert_allclose(optimized, literal, rtol=0, atol=1e-5 * np.abs(literal).max())


def test_float_layer_behind_a_tensor_without_known_sizes_reads_it_through_max(tmp_path: Path) -> None:
    model = three_convolutions(dims=["N", 4, "H", "W"])
    for node in model.graph:
        for value in node.outputs:
            value.shape = None
    plan = plan_for(model, normal_batches((1, 4, 8, 8)))

    spelled = spell(model, plan, placed("conv1", "conv3", model=model), "x86-vnni")

    (conv,) = (node for node in spelled.graph if node.name == "conv2")
    assert conv.inputs[0].producer().op_type == "Max"  # type: ignore[union-attr]
    assert kernels(spelled, tmp_path)["QLinearConv"] == 2


def test_float_layer_beside_float_layers_is_left_as_it_is() -> None:
    model = three_convolutions()
    plan = plan_for(model, normal_batches((1, 4, 8, 8)))

    spelled = spell(model, plan, placed("conv3", model=model), "x86-vnni")

    assert all("shielded" not in (value.name or "") for node in spelled.graph for value in node.outputs)
