"""LiteRT's runner: what it declares, takes, gives and refuses."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxprune.contracts import Runner, TensorSpec
from onnxprune.errors import BadDataError, MissingExtraError, ModelError, OutputError, UsageError
from onnxprune.runtime import litert_foreign
from onnxprune.runtime.child import ChildFailure
from onnxprune.runtime.feeds import working_feeds
from onnxprune.runtime.litert import LitertRunner, litert_runner_from_path
from onnxprune.runtime.litert_foreign import check_foreign_file
from onnxprune.runtime.sessions import ort_runner_from_model
from tests.tflite_files import TRAINED, Node, Tensor, packed, tflite_file, unpacked
from tests.tflite_twins import onnx_twin, tflite_twin

F32 = np.float32


@pytest.fixture
def twin(tmp_path: Path) -> Path:
    path = tmp_path / "twin.tflite"
    path.write_bytes(tflite_twin(provenance='{"made": "here"}'))
    return path


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((2, 3, 8, 8), dtype=np.float32)


def saved(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "net.tflite"
    path.write_bytes(content)
    return path


def one_operator(name: str, *, x: Tensor, y: Tensor, **options: str) -> bytes:
    return tflite_file(
        tensors={"x": x, "y": y},
        operators=[Node(name=name, inputs=["x"], outputs=["y"], **options)],  # type: ignore[arg-type]
        inputs=["x"],
        outputs=["y"],
    )


def test_runner_shows_what_the_onnx_model_takes_and_computes_it(twin: Path, image: np.ndarray) -> None:
    runner = litert_runner_from_path(twin)
    assert isinstance(runner, Runner)
    assert runner.inputs == (TensorSpec(name="x", dtype="float32", shape=(None, 3, 8, 8)),)
    assert runner.outputs == (TensorSpec(name="y", dtype="float32", shape=(None, 5)),)
    assert runner.threads == 1
    expected = ort_runner_from_model(ir.from_proto(onnx_twin())).run({"x": image})
    # Sums of 27 and 36 products in another order.
    np.testing.assert_allclose(runner.run({"x": image})["y"], expected["y"], rtol=1e-5, atol=1e-5)


def test_stored_layout_is_given_where_it_is_asked_for(twin: Path, image: np.ndarray) -> None:
    stored = litert_runner_from_path(twin, layout="stored")
    assert stored.inputs[0].shape == (None, 8, 8, 3)
    found = stored.run({"x": image.transpose(0, 2, 3, 1)})
    np.testing.assert_array_equal(found["y"], litert_runner_from_path(twin).run({"x": image})["y"])
    assert stored.stored_inputs[0].layout == (0, 2, 3, 1)


def test_batches_of_other_sizes_come_in_any_order(twin: Path, image: np.ndarray) -> None:
    runner = litert_runner_from_path(twin)
    alone = [runner.run({"x": image[index : index + 1]})["y"] for index in (0, 1)]
    np.testing.assert_array_equal(runner.run({"x": image})["y"], np.concatenate(alone))
    np.testing.assert_array_equal(runner.run({"x": image[:1]})["y"], alone[0])


def test_results_stay_as_they_are_when_the_runner_runs_again(twin: Path, image: np.ndarray) -> None:
    runner = litert_runner_from_path(twin)
    first = runner.run({"x": image})["y"]
    kept = first.copy()
    runner.run({"x": image + 1})
    np.testing.assert_array_equal(first, kept)


def test_prepared_call_computes_its_own_feeds_also_after_another_run(twin: Path, image: np.ndarray) -> None:
    runner = litert_runner_from_path(twin)
    expected = runner.run({"x": image})["y"]
    call = runner.prepare({"x": image})
    runner.run({"x": image[:1] * 3})
    for _ in range(2):
        (found,) = call()  # type: ignore[misc]
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kernels", ["default", "without-delegate", "reference"])
def test_all_kernels_compute_the_network(twin: Path, image: np.ndarray, kernels: str) -> None:
    found = litert_runner_from_path(twin, kernels=kernels).run({"x": image})["y"]  # type: ignore[arg-type]
    expected = litert_runner_from_path(twin).run({"x": image})["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)  # sums in another order


def test_kernels_can_be_chosen(twin: Path) -> None:
    assert litert_runner_from_path(twin).delegated_parts() == ((0, 1, 2, 3, 4),)
    assert litert_runner_from_path(twin, kernels="without-delegate").delegated_parts() == ()


def test_metadata_holds_what_is_text(tmp_path: Path) -> None:
    content = tflite_file(
        tensors={"x": Tensor(shape=(2,), dtype=F32), "y": Tensor(shape=(2,), dtype=F32)},
        operators=[Node(name="RELU", inputs=["x"], outputs=["y"])],
        inputs=["x"],
        outputs=["y"],
        metadata={"onnxprune": b'{"a": 1}', "picture": b"\xff\xfe\x00", "nothing": b""},
    )
    assert litert_runner_from_path(saved(tmp_path, content)).metadata == {"onnxprune": '{"a": 1}'}


def test_signature_names_inputs_and_outputs_in_the_order_of_the_file(tmp_path: Path) -> None:
    tensors = {name: Tensor(shape=(2,), dtype=F32) for name in ("t_z", "t_a", "t_sum")}
    content = tflite_file(
        tensors=tensors,
        operators=[Node(name="SUB", inputs=["t_z", "t_a"], outputs=["t_sum"], options_type="SubOptions")],
        inputs=["t_z", "t_a"],
        outputs=["t_sum"],
        signatures={"serving_default": {"z": "t_z", "a": "t_a", "out": "t_sum"}},
    )
    runner = litert_runner_from_path(saved(tmp_path, content))
    assert [spec.name for spec in runner.inputs] == ["z", "a"]
    found = runner.run({"a": np.array([1, 2], F32), "z": np.array([10, 20], F32)})
    np.testing.assert_array_equal(found["out"], [9, 18])


def test_without_a_signature_the_tensors_own_names_count(tmp_path: Path) -> None:
    tensor = Tensor(shape=(2,), dtype=F32)
    runner = litert_runner_from_path(saved(tmp_path, one_operator("RELU", x=tensor, y=tensor)))
    assert (runner.inputs[0].name, runner.outputs[0].name) == ("x", "y")


def quantized(dtype: type[np.generic], zero_point: int) -> bytes:
    tensor = Tensor(shape=(4,), dtype=dtype, scales=(0.5,), zero_point=zero_point)
    return one_operator("RELU", x=tensor, y=tensor, options_type="")


@pytest.mark.parametrize(("dtype", "zero_point"), [(np.int8, -3), (np.uint8, 120), (np.int16, 0)])
def test_integers_with_a_scale_are_floats_to_who_feeds_and_reads(
    tmp_path: Path, dtype: type[np.generic], zero_point: int
) -> None:
    path = saved(tmp_path, quantized(dtype, zero_point))
    x = np.array([-1.0, 0.26, 1.24, 7.0], F32)
    runner = litert_runner_from_path(path)
    assert runner.inputs[0].dtype == runner.outputs[0].dtype == "float32"
    np.testing.assert_array_equal(runner.run({"x": x})["y"], np.array([0.0, 0.5, 1.0, 7.0], F32))
    assert (runner.stored_inputs[0].dtype, runner.stored_inputs[0].scales) == (np.dtype(dtype).name, (0.5,))
    assert runner.stored_outputs[0].zero_points == (zero_point,)

    raw = litert_runner_from_path(path, quantized_io="raw")
    assert raw.inputs[0].dtype == np.dtype(dtype).name
    stored = np.array([-2, 1, 2, 14]) + zero_point
    np.testing.assert_array_equal(
        raw.run({"x": stored.astype(dtype)})["y"], (np.array([0, 1, 2, 14]) + zero_point).astype(dtype)
    )


def test_nan_for_an_integer_input_is_refused(tmp_path: Path) -> None:
    runner = litert_runner_from_path(saved(tmp_path, quantized(np.int8, 0)))
    with pytest.raises(BadDataError, match="Input 'x' is stored as int8, and the data hold NaN"):
        runner.run({"x": np.array([0, np.nan, 1, 2], F32)})


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "The data lack 'x': the model's inputs are 'x', the data have nothing"),
        (
            {"x": np.zeros((1, 3, 8, 8), np.float32), "mask": np.zeros(1)},
            "The data have 'mask', which the model has no",
        ),
        ({"x": np.zeros((1, 8, 8, 3), np.float32)}, r"Input 'x' takes the shape \?x3x8x8, but the data have 1x8x8x3"),
        ({"x": np.zeros((1, 3, 8, 8))}, "Input 'x' takes float32, but the data are float64"),
    ],
    ids=["nothing", "unknown name", "wrong size", "wrong type"],
)
def test_feeds_that_do_not_fit_are_refused_in_the_words_of_every_runtime(
    twin: Path, feeds: dict[str, np.ndarray], message: str
) -> None:
    runner = litert_runner_from_path(twin)
    with pytest.raises(BadDataError, match=message):
        runner.run(feeds)
    with pytest.raises(BadDataError, match=message):
        runner.prepare(feeds)


def fed_size_fails(tmp_path: Path) -> LitertRunner:
    """Adds a constant of 3 numbers to an input of any size."""
    content = tflite_file(
        tensors={
            "x": Tensor(shape=(3,), open_shape=(-1,), dtype=F32),
            "k": Tensor(shape=(3,), dtype=F32, data=np.ones(3)),
            "y": Tensor(shape=(3,), open_shape=(-1,), dtype=F32),
        },
        operators=[Node(name="ADD", inputs=["x", "k"], outputs=["y"], options_type="AddOptions")],
        inputs=["x"],
        outputs=["y"],
    )
    return litert_runner_from_path(saved(tmp_path, content))


def test_size_that_the_graph_can_not_take_is_an_error_and_the_runner_lives_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runner = fed_size_fails(tmp_path)
    for call in (runner.run, runner.prepare):
        with pytest.raises(ModelError, match=r"'net.tflite' can't be run by LiteRT: ") as caught:
            call({"x": np.zeros(4, F32)})
        assert ".cc:" not in caught.value.message
    np.testing.assert_array_equal(runner.run({"x": np.zeros(3, F32)})["y"], np.ones(3))
    assert capfd.readouterr() == ("", "")


def test_state_of_recurrent_cells_does_not_pass_from_batch_to_batch(tmp_path: Path) -> None:
    width, weight = 3, np.eye(3)
    content = tflite_file(
        tensors={
            "x": Tensor(shape=(1, width), dtype=F32),
            "w": Tensor(shape=(width, width), dtype=F32, data=weight),
            "u": Tensor(shape=(width, width), dtype=F32, data=weight),
            "b": Tensor(shape=(width,), dtype=F32, data=np.zeros(width)),
            "state": Tensor(shape=(1, width), dtype=F32, is_variable=True),
            "y": Tensor(shape=(1, width), dtype=F32),
        },
        operators=[
            Node(name="RNN", inputs=["x", "w", "u", "b", "state"], outputs=["y"], options_type="RNNOptions"),
        ],
        inputs=["x"],
        outputs=["y"],
    )
    runner = litert_runner_from_path(saved(tmp_path, content))
    x = {"x": np.ones((1, width), F32)}
    np.testing.assert_array_equal(runner.run(x)["y"], runner.run(x)["y"])


def test_missing_file_and_no_threads_are_refused(tmp_path: Path, twin: Path) -> None:
    for function in (litert_runner_from_path, check_foreign_file):
        with pytest.raises(OutputError, match=r"There is no model file '.*gone\.tflite'"):
            function(tmp_path / "gone.tflite")  # type: ignore[operator]
    with pytest.raises(UsageError, match="at least 1, not 0"):
        litert_runner_from_path(twin, threads=0)


def test_missing_package_is_named_with_the_extra(twin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "ai_edge_litert" else find(name))
    with pytest.raises(MissingExtraError, match=r"'ai-edge-litert'.*pip install 'onnxprune\[tflite\]'"):
        litert_runner_from_path(twin)
    with pytest.raises(MissingExtraError, match=r"Running 'twin\.tflite' needs"):
        check_foreign_file(twin)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize("damage", [lambda _: b"", lambda _: b"not a model", cut], ids=["empty", "text", "cut"])
def test_damaged_file_is_named_without_native_noise(
    twin: Path, capfd: pytest.CaptureFixture[str], damage: Callable[[bytes], bytes]
) -> None:
    twin.write_bytes(damage(twin.read_bytes()))
    with pytest.raises(ModelError, match=r"'twin\.tflite' can't be loaded by LiteRT: ") as caught:
        litert_runner_from_path(twin)
    assert str(twin.parent) not in caught.value.message
    assert capfd.readouterr() == ("", "")


def test_loading_and_running_print_nothing(twin: Path, image: np.ndarray, capfd: pytest.CaptureFixture[str]) -> None:
    runner = litert_runner_from_path(twin, extra_outputs=["c"])
    runner.run({"x": image})
    assert capfd.readouterr() == ("", "")


def test_custom_operator_is_refused_with_the_way_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tensor = Tensor(shape=(2,), dtype=F32)
    with pytest.raises(ModelError, match=r"MyOwn.*built-in operators only"):
        litert_runner_from_path(saved(tmp_path, one_operator("MyOwn", x=tensor, y=tensor)))
    assert capfd.readouterr() == ("", "")


def test_operator_of_a_later_version_asks_for_a_newer_litert(tmp_path: Path) -> None:
    tensor = Tensor(shape=(2,), dtype=F32)
    content = tflite_file(
        tensors={"x": tensor, "y": tensor},
        operators=[Node(name="RELU", inputs=["x"], outputs=["y"], version=99)],
        inputs=["x"],
        outputs=["y"],
    )
    with pytest.raises(ModelError, match=r"'RELU' version '99'.*install a newer one"):
        litert_runner_from_path(saved(tmp_path, content))


def test_string_output_is_refused_by_name(tmp_path: Path) -> None:
    content = one_operator("CAST", x=Tensor(shape=(2,), dtype=F32), y=Tensor(shape=(2,), dtype=np.str_))
    with pytest.raises(ModelError, match="'y' of type STRING among its outputs"):
        litert_runner_from_path(saved(tmp_path, content))


@pytest.mark.parametrize(
    "layouts",
    [b"[1, 2]", b"nothing", b'{"x": [0, 0, 1, 2]}', b'{"x": [0, 2, 1]}', b'{"x": "abc"}', b'{"x": 3}'],
    ids=["no object", "no JSON", "no permutation", "other rank", "letters", "number"],
)
def test_layouts_that_make_no_sense_are_refused_instead_of_guessed(tmp_path: Path, layouts: bytes) -> None:
    tensor = Tensor(shape=(1, 2, 2, 1), dtype=F32)
    content = tflite_file(
        tensors={"x": tensor, "y": tensor},
        operators=[Node(name="RELU", inputs=["x"], outputs=["y"])],
        inputs=["x"],
        outputs=["y"],
        metadata={"onnxprune.layouts": layouts},
    )
    with pytest.raises(ModelError, match=r"'net.tflite' is damaged: its metadata 'onnxprune.layouts'"):
        litert_runner_from_path(saved(tmp_path, content))


def test_two_inputs_of_one_name_are_refused(tmp_path: Path) -> None:
    tensors = {name: Tensor(shape=(2,), dtype=F32) for name in ("a", "b", "y")}
    path = saved(
        tmp_path,
        tflite_file(
            tensors=tensors,
            operators=[Node(name="ADD", inputs=["a", "b"], outputs=["y"], options_type="AddOptions")],
            inputs=["a", "b"],
            outputs=["y"],
        ),
    )
    model = unpacked(path)
    model.subgraphs[0].tensors[1].name = b"a"
    path.write_bytes(packed(model))
    with pytest.raises(ModelError, match="several of its inputs are called 'a'"):
        litert_runner_from_path(path)


def test_file_that_crashes_litert_is_refused_by_a_look_in_another_process(
    twin: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    check_foreign_file(twin)
    model = unpacked(twin)
    model.subgraphs[0].operators[1].inputs = [-1]
    twin.write_bytes(packed(model))
    # A RELU of nothing: XNNPACK's delegate reads what lies before its tensors, which crashes unless that happens to be
    # harmless; then the operator itself refuses.
    with pytest.raises(ModelError, match=r"'twin\.tflite' can't be (run|loaded) by LiteRT: "):
        check_foreign_file(twin)
    assert capfd.readouterr() == ("", "")


def test_crash_of_that_process_is_said_with_its_signal(twin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object, **__: object) -> None:
        raise ChildFailure("crashed in native code (SIGSEGV)")

    monkeypatch.setattr(litert_foreign, "call_in_child", crash)
    with pytest.raises(ModelError, match=r"the process that tried crashed in native code \(SIGSEGV\)\. The file is"):
        check_foreign_file(twin)


@pytest.mark.parametrize("name", TRAINED)
def test_trained_files_give_the_same_for_a_batch_as_for_each_sample(shared_data: Path, name: str) -> None:
    runner = litert_runner_from_path(shared_data / "mlperf_tiny_models" / f"{name}.tflite")
    feeds = working_feeds(runner, seed=3, batch=3)
    together = runner.run(feeds)
    for index in range(3):
        alone = runner.run({key: array[index : index + 1] for key, array in feeds.items()})
        for key, array in alone.items():
            np.testing.assert_array_equal(together[key][index], array[0])


def test_metadata_of_an_artifact_is_its_provenance(twin: Path) -> None:
    assert json.loads(litert_runner_from_path(twin).metadata["onnxprune"]) == {"made": "here"}
