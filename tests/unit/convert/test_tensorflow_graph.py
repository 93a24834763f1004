"""What is done to tf2onnx's models; nothing here needs TensorFlow."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxprune.convert.tensorflow_graph import run_tf2onnx, tidy_interface
from onnxprune.errors import ModelError


def _model(*, conv: int, bias: int, scale: int, swapped: bool = False) -> onnx.ModelProto:
    """A model as tf2onnx writes it, with counters that depend on the process."""
    constants = [
        numpy_helper.from_array(numpy_helper.to_array(helper.make_tensor("", TensorProto.FLOAT, [1], [value])), name)
        for value, name in ((2.0, f"const_fold_opt__{scale}"), (1.0, f"const_fold_opt__{bias}"))
    ]
    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["x", f"const_fold_opt__{scale}"], [f"net/mul__{conv}:0"], name=f"net/mul__{conv}"),
            helper.make_node("Add", [f"net/mul__{conv}:0", f"const_fold_opt__{bias}"], ["zebra"], name="net/add"),
            helper.make_node("Relu", [f"net/mul__{conv}:0"], ["ant__7"], name="net/relu"),
        ],
        "tf2onnx",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [f"unk__{conv}", f"unk__{bias}"])],
        [
            helper.make_tensor_value_info("ant__7", TensorProto.FLOAT, [f"unk__{scale}", 3]),
            helper.make_tensor_value_info("zebra", TensorProto.FLOAT, [f"unk__{scale}", 3]),
        ],
        constants[::-1] if swapped else constants,
        doc_string="converted from b'__inference_call_123'",
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def test_counters_of_the_process_leave_no_trace() -> None:
    first, second = _model(conv=12, bias=90, scale=91), _model(conv=45, bias=7, scale=3, swapped=True)

    tidy_interface(first, ["zebra", "ant__7"])
    tidy_interface(second, ["zebra", "ant__7"])

    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)
    onnx.checker.check_model(first)


def test_interface_keeps_its_names_and_gets_the_source_s_order() -> None:
    model = _model(conv=12, bias=90, scale=91)

    tidy_interface(model, ["zebra", "ant__7"])

    assert [value.name for value in model.graph.output] == ["zebra", "ant__7"]
    (x,) = model.graph.input
    assert [dim.dim_param for dim in x.type.tensor_type.shape.dim] == ["batch", "x_axis1"]


def test_operators_without_an_onnx_form_are_all_named() -> None:
    pytest.importorskip("tf2onnx", reason="needs tf2onnx: pip install 'onnxprune[tensorflow]'")
    graph = helper.make_graph(
        [
            helper.make_node("FFT2D", ["x"], ["y"]),
            helper.make_node("Betainc", ["y"], ["z"]),
            helper.make_node("Relu", ["z"], ["w"]),
        ],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("w", TensorProto.FLOAT, [1])],
    )

    with pytest.raises(ModelError, match=r"no ONNX form for the operators 'Betainc', 'FFT2D'"):
        run_tf2onnx(lambda: (helper.make_model(graph), None), source="net.pb")


def test_failure_inside_tf2onnx_is_an_error_with_its_reason() -> None:
    pytest.importorskip("tf2onnx", reason="needs tf2onnx: pip install 'onnxprune[tensorflow]'")

    def fail() -> tuple[onnx.ModelProto, None]:
        raise AttributeError("'NoneType' object has no attribute 'shape'")

    with pytest.raises(ModelError, match=r"tf2onnx can't convert 'net.pb': AttributeError: 'NoneType'"):
        run_tf2onnx(fail, source="net.pb")
