from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from onnxprune.contracts import Runner, TensorSpec
from onnxprune.errors import BadDataError, ModelError, OutputError, UsageError
from onnxprune.runtime import sessions
from onnxprune.runtime.host import host_isa
from onnxprune.runtime.sessions import ort_runner_from_model, ort_runner_from_path
from tests.builders import conv_net, proto_of


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((2, 3, 8, 8), dtype=np.float32)


def test_runner_names_inputs_and_outputs_with_types_and_shapes() -> None:
    runner = ort_runner_from_model(conv_net())
    assert isinstance(runner, Runner)
    assert runner.inputs == (TensorSpec(name="x", dtype="float32", shape=("N", 3, 8, 8)),)
    assert runner.outputs == (TensorSpec(name="y", dtype="float32", shape=("N", 10)),)
    assert runner.threads == 1


def test_runner_from_a_file_computes_what_the_runner_from_the_graph_computes(tmp_path: Path, image: np.ndarray) -> None:
    model = conv_net()
    path = tmp_path / "net.onnx"
    onnx.save(ir.to_proto(model), path)
    from_file = ort_runner_from_path(path).run({"x": image})
    from_graph = ort_runner_from_model(model).run({"x": image})
    assert list(from_file) == ["y"]
    np.testing.assert_array_equal(from_file["y"], from_graph["y"])


@pytest.mark.skipif(host_isa().arch != "x86-64", reason="channels in blocks are a layout of x86")
def test_blocked_layout_can_be_left_out_as_ort_files_do(tmp_path: Path, image: np.ndarray) -> None:
    kernels = []
    for blocked_layout in (True, False):
        runner = ort_runner_from_model(
            conv_net(), profile_prefix=tmp_path / str(blocked_layout), blocked_layout=blocked_layout
        )
        runner.run({"x": image})
        kernels.append("nchwc" in runner.end_profiling().read_text())
    assert kernels == [True, False]


def test_model_above_the_memory_limit_goes_through_a_folder_that_is_gone_afterwards(
    tmp_path: Path, image: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ort_runner_from_model(conv_net()).run({"x": image})["y"]
    monkeypatch.setattr(sessions, "_IN_MEMORY_UP_TO_BYTES", 100)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    runner = ort_runner_from_model(conv_net())
    assert list(tmp_path.iterdir()) == []
    np.testing.assert_array_equal(runner.run({"x": image})["y"], expected)


def test_extra_outputs_come_after_the_models_own_and_leave_the_model_as_it_was(image: np.ndarray) -> None:
    model = conv_net()
    runner = ort_runner_from_model(model, extra_outputs=["r1", "c2"])
    found = runner.run({"x": image})
    assert list(found) == ["y", "r1", "c2"]
    assert found["r1"].shape == (2, 16, 8, 8)
    assert found["r1"].min() == 0.0
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_extra_output_that_is_an_output_already_is_returned_once(image: np.ndarray) -> None:
    runner = ort_runner_from_model(conv_net(), extra_outputs=["y", "r1", "r1"])
    assert list(runner.run({"x": image})) == ["y", "r1"]


def test_unknown_extra_output_is_named_with_the_nearest_value() -> None:
    with pytest.raises(UsageError, match=r"computes 'c22'\. Did you mean 'c2'\?"):
        ort_runner_from_model(conv_net(), extra_outputs=["c22"])


def test_change_of_the_model_after_the_runner_was_made_changes_nothing(image: np.ndarray) -> None:
    model = conv_net()
    runner = ort_runner_from_model(model)
    before = runner.run({"x": image})["y"]
    model.graph.initializers["head.bias"].const_value = ir.tensor(np.ones(10, np.float32))
    np.testing.assert_array_equal(runner.run({"x": image})["y"], before)


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "The data lack 'x': the model's inputs are 'x', the data have nothing"),
        ({"X": np.zeros((1, 3, 8, 8), np.float32)}, "The data lack 'x'.*the data have 'X'"),
        (
            {"x": np.zeros((1, 3, 8, 8), np.float32), "mask": np.zeros(1)},
            "The data have 'mask', which the model has no input for",
        ),
        ({"x": np.zeros((1, 3, 8, 9), np.float32)}, "Input 'x' takes the shape Nx3x8x8, but the data have 1x3x8x9"),
        ({"x": np.zeros((3, 8, 8), np.float32)}, "Input 'x' takes the shape Nx3x8x8, but the data have 3x8x8"),
        ({"x": np.zeros((1, 3, 8, 8))}, "Input 'x' takes float32, but the data are float64"),
    ],
    ids=["nothing", "wrong name", "unknown name", "wrong size", "wrong rank", "wrong type"],
)
def test_feeds_that_do_not_fit_are_refused_with_what_was_expected_and_found(
    feeds: dict[str, np.ndarray], message: str
) -> None:
    runner = ort_runner_from_model(conv_net())
    with pytest.raises(BadDataError, match=message):
        runner.run(feeds)
    with pytest.raises(BadDataError, match=message):
        runner.prepare(feeds)


def test_prepared_call_computes_what_run_computes(image: np.ndarray) -> None:
    runner = ort_runner_from_model(conv_net())
    call = runner.prepare({"x": image})
    (found,) = call()  # type: ignore[misc]
    np.testing.assert_array_equal(found, runner.run({"x": image})["y"])


def test_missing_file_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"There is no model file '.*gone\.onnx'"):
        ort_runner_from_path(tmp_path / "gone.onnx")


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x07\x12"], ids=["empty", "text", "truncated"])
@pytest.mark.parametrize("suffix", [".onnx", ".ort"])
def test_damaged_file_is_named_without_native_noise(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], content: bytes, suffix: str
) -> None:
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=rf"'bad{suffix}' can't be loaded by ONNX Runtime: ") as caught:
        ort_runner_from_path(path)
    assert str(tmp_path) not in caught.value.message
    assert "ONNXRuntimeError" not in caught.value.message
    assert capfd.readouterr() == ("", "")


def test_custom_operator_without_a_library_is_refused_with_the_way_out() -> None:
    proto = proto_of(
        [helper.make_node("Magic", ["x"], ["y"], domain="acme", name="trick")], inputs={"x": [1]}, outputs={"y": [1]}
    )
    proto.opset_import.append(helper.make_opsetid("acme", 1))
    with pytest.raises(ModelError, match=r"acme:Magic.*give its library with --custom-op-library"):
        ort_runner_from_model(ir.from_proto(proto))


def test_missing_custom_operator_library_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no custom operator library '.*none\.so'"):
        ort_runner_from_model(conv_net(), custom_op_libraries=[tmp_path / "none.so"])


def test_failure_inside_the_graph_names_the_node_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    proto = proto_of(
        [helper.make_node("Reshape", ["x", "shape"], ["y"], name="squash")],
        inputs={"x": ["N"]},
        outputs={"y": [None, None]},
        weights={"shape": np.array([2, 3], np.int64)},
    )
    runner = ort_runner_from_model(ir.from_proto(proto))
    with pytest.raises(ModelError, match=r"can't be run by ONNX Runtime: .*Reshape node.*squash") as caught:
        runner.run({"x": np.zeros(5, np.float32)})
    assert "/onnxruntime" not in caught.value.message
    assert capfd.readouterr() == ("", "")


def test_sequence_output_is_refused_by_name() -> None:
    proto = proto_of([helper.make_node("SequenceConstruct", ["x"], ["parts"])], inputs={"x": [2]}, outputs={})
    proto.graph.output.append(helper.make_tensor_sequence_value_info("parts", TensorProto.FLOAT, None))
    with pytest.raises(ModelError, match=r"'parts' of type seq\(tensor\(float\)\)"):
        ort_runner_from_model(ir.from_proto(proto))


def test_scalar_and_unknown_rank_are_told_apart_where_the_graph_says_so() -> None:
    nodes = [helper.make_node("Identity", ["s"], ["t"]), helper.make_node("Identity", ["u"], ["v"])]
    proto = proto_of(nodes, inputs={"s": [], "u": None}, outputs={"t": [], "v": None})
    runner = ort_runner_from_model(ir.from_proto(proto))
    assert [spec.shape for spec in runner.inputs] == [(), None]
    found = runner.run({"s": np.float32(2), "u": np.ones((2, 3), np.float32)})
    assert found["t"] == 2.0
    assert found["v"].shape == (2, 3)


def test_strings_and_booleans_go_in_and_out() -> None:
    nodes = [helper.make_node("StringConcat", ["s", "s"], ["t"])]
    proto = proto_of(
        nodes, inputs={"s": ["N"]}, outputs={"t": ["N"]}, input_type=TensorProto.STRING, output_type=TensorProto.STRING
    )
    runner = ort_runner_from_model(ir.from_proto(proto))
    assert runner.inputs[0].dtype == "object"
    assert runner.run({"s": np.array(["a", "b"])})["t"].tolist() == ["aa", "bb"]
    with pytest.raises(BadDataError, match="Input 's' takes strings, but the data are float64"):
        runner.run({"s": np.zeros(2)})


def test_bfloat16_goes_in_and_out_bit_for_bit() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["wide"], ["y"], to=TensorProto.BFLOAT16),
    ]
    proto = proto_of(
        nodes,
        inputs={"x": ["N"]},
        outputs={"y": ["N"]},
        input_type=TensorProto.BFLOAT16,
        output_type=TensorProto.BFLOAT16,
    )
    runner = ort_runner_from_model(ir.from_proto(proto))
    values = np.array([1.5, -3.0, 1e30], ml_dtypes.bfloat16)
    found = runner.run({"x": values})["y"]
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found, values)
    assert runner.run({"x": values[:0]})["y"].shape == (0,)


def test_model_without_inputs_runs() -> None:
    proto = proto_of(
        [helper.make_node("Identity", ["w"], ["y"])],
        inputs={},
        outputs={"y": [2]},
        weights={"w": np.array([1, 2], np.float32)},
    )
    assert ort_runner_from_model(ir.from_proto(proto)).run({})["y"].tolist() == [1.0, 2.0]


def test_fewer_than_one_thread_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 1, not 0"):
        ort_runner_from_model(conv_net(), threads=0)


def test_optimization_changes_no_result_beyond_rounding(image: np.ndarray) -> None:
    model = conv_net()
    plain = ort_runner_from_model(model, optimization="disabled").run({"x": image})["y"]
    for level in ("basic", "extended", "all"):
        found = ort_runner_from_model(model, optimization=level).run({"x": image})["y"]  # type: ignore[arg-type]
        # float32 sums of 144 products, added in another order.
        np.testing.assert_allclose(found, plain, rtol=0, atol=1e-5)


def test_metadata_of_the_model_can_be_read() -> None:
    assert ort_runner_from_model(conv_net()).metadata == {"author": "somebody", "labels": "a,b,c"}
