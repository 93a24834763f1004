from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper
from pydantic import ValidationError

from onnxprune.contracts import Artifact, ModelState, Placement, TargetContext
from onnxprune.errors import OutputError, PreconditionError, TargetError
from onnxprune.runtime.host import host_isa
from onnxprune.runtime.sessions import ort_runner_from_model
from onnxprune.targets.tflite import target as tflite_target
from onnxprune.targets.tflite.graph import Constant, Model
from onnxprune.targets.tflite.target import TfliteConfig, TfliteTarget
from tests.builders import canonical, conv_net, conv_net_proto, proto_of
from tests.unit.targets.conftest import PROVENANCE

MakeContext = Callable[..., TargetContext]

IMAGES = {"x": np.random.default_rng(5).standard_normal((2, 3, 8, 8), dtype=np.float32)}


def target(**options: object) -> TfliteTarget:
    return TfliteTarget(TfliteConfig.model_validate(options))


@pytest.fixture(scope="module")
def artifact(float_state: ModelState, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("one")
    return target().build(float_state, TargetContext(folder=folder, stem="net", provenance=PROVENANCE))


def test_float_artifact_computes_what_the_graph_computes(float_state: ModelState, artifact: Artifact) -> None:
    expected = ort_runner_from_model(float_state.model).run(IMAGES)["y"]
    found = target().runner(artifact).run(IMAGES)["y"]
    # Kernels of two runtimes add in another order.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert [(spec.name, spec.dtype, spec.shape) for spec in artifact.inputs] == [("x", "float32", (None, 3, 8, 8))]
    assert [(spec.name, spec.dtype, spec.shape) for spec in artifact.outputs] == [("y", "float32", (None, 10))]
    assert artifact.placement is None


def test_artifact_lists_exactly_the_file_in_its_folder_with_its_hash(artifact: Artifact) -> None:
    (file,) = artifact.files
    assert [path.name for path in artifact.folder.iterdir()] == [file.path] == ["net.tflite"]
    content = (artifact.folder / file.path).read_bytes()
    assert (file.sha256, file.size_bytes) == (hashlib.sha256(content).hexdigest(), len(content))


def test_provenance_joins_the_models_own_metadata(float_state: ModelState, artifact: Artifact) -> None:
    metadata = target().runner(artifact).metadata  # type: ignore[attr-defined]
    assert json.loads(metadata["onnxprune"]) == artifact.provenance == PROVENANCE
    assert {key: metadata[key] for key in ("author", "labels")} == {"author": "somebody", "labels": "a,b,c"}


def test_same_model_gives_the_same_bytes_and_no_path(artifact: Artifact, context: MakeContext) -> None:
    again = target().build(ModelState(model=conv_net()), context())
    assert again.files == artifact.files
    assert str(again.folder).encode() not in again.model_path.read_bytes()


def test_batch_of_the_configuration_makes_the_open_dimension_fixed(
    float_state: ModelState, context: MakeContext
) -> None:
    built = target(batch=2).build(float_state, context())
    assert [spec.shape for spec in (*built.inputs, *built.outputs)] == [(2, 3, 8, 8), (2, 10)]
    assert not isinstance(float_state.model.graph.inputs[0].shape[0], int)


def test_batch_is_refused_where_other_dimensions_are_open_too(context: MakeContext) -> None:
    model = canonical(
        proto_of([helper.make_node("Relu", ["x"], ["y"])], inputs={"x": ["N", "M"]}, outputs={"y": ["N", "M"]})
    )
    with pytest.raises(TargetError, match="input 'x' with further open dimensions"):
        target(batch=2).check(ModelState(model=model), will_quantize=False)


@pytest.mark.parametrize("precision", ["int8", "int8-float-io"])
def test_int8_without_a_pass_that_quantizes_is_refused_before_the_first_pass(
    float_state: ModelState, precision: str
) -> None:
    with pytest.raises(PreconditionError, match="no pass quantizes the model"):
        target(precision=precision).check(float_state, will_quantize=False)
    target(precision=precision).check(float_state, will_quantize=True)


def test_int8_of_a_plan_without_activations_is_refused(int8_state: ModelState, context: MakeContext) -> None:
    assert int8_state.quantization is not None
    dynamic = dataclasses.replace(int8_state.quantization, mode="dynamic", activations={})
    state = dataclasses.replace(int8_state, quantization=dynamic)
    with pytest.raises(PreconditionError, match="the plan's mode is 'dynamic'"):
        target(precision="int8").build(state, context())


def test_placement_of_another_platform_is_refused(int8_state: ModelState, context: MakeContext) -> None:
    placement = Placement(target="x86-vnni", integer_nodes=(), float_nodes={})
    with pytest.raises(PreconditionError, match="places integers for 'x86-vnni'"):
        target().build(int8_state, dataclasses.replace(context(), placement=placement))


def test_every_node_that_tflite_cannot_express_is_named_before_anything_is_written(context: MakeContext) -> None:
    model = canonical(
        proto_of(
            [
                helper.make_node("Det", ["x"], ["d"], name="first"),
                helper.make_node("Relu", ["x"], ["r"], name="fine"),
                helper.make_node("Det", ["r"], ["e"], name="second"),
            ],
            inputs={"x": [2, 9, 9]},
            outputs={"d": [2], "e": [2]},
        )
    )
    state, where = ModelState(model=model), context()
    with pytest.raises(TargetError) as refused:
        target().check(state, will_quantize=False)
    assert "2 nodes" in refused.value.message
    assert "Det 'first', 'second': " in refused.value.message
    assert "fine" not in refused.value.message
    with pytest.raises(TargetError):
        target().build(state, where)
    assert list(where.folder.iterdir()) == []


def test_file_that_computes_something_else_is_an_error_and_is_not_left(
    monkeypatch: pytest.MonkeyPatch, float_state: ModelState, context: MakeContext
) -> None:
    honest = tflite_target.with_metadata

    def spoiled(model: Model, *arguments: object) -> Model:
        graph = model.main
        tensors = {
            name: dataclasses.replace(tensor, constant=Constant.of(tensor.constant.array() * np.float32(1.5)))
            if tensor.constant is not None and name == "head.weight"
            else tensor
            for name, tensor in graph.tensors.items()
        }
        return honest(model.with_main(dataclasses.replace(graph, tensors=tensors)), *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tflite_target, "with_metadata", spoiled)
    where = context()
    with pytest.raises(TargetError, match="does not compute what its graph computes: output 'y'"):
        target().build(float_state, where)
    assert list(where.folder.iterdir()) == []


def test_folder_that_cannot_be_written_is_an_output_error(float_state: ModelState) -> None:
    with pytest.raises(OutputError):
        target().build(float_state, TargetContext(folder=Path("/proc"), stem="net"))


def test_latencies_count_only_where_this_machine_is_the_platform() -> None:
    other = "arm64" if host_isa().arch == "x86-64" else "x86-64"
    assert not target(platform=other).is_host
    assert target(platform="auto").is_host


def test_unknown_option_is_an_error() -> None:
    with pytest.raises(ValidationError, match="precison"):
        target(precison="fp16")


def test_int8_artifact_takes_and_gives_integers_and_the_runner_floats(
    int8_state: ModelState, context: MakeContext
) -> None:
    built = target(precision="int8").build(int8_state, context())
    runner = target().runner(built)
    stored = (*runner.stored_inputs, *runner.stored_outputs)  # type: ignore[attr-defined]
    assert [tensor.dtype for tensor in stored] == ["int8", "int8"]
    assert [spec.dtype for spec in (*built.inputs, *built.outputs)] == ["float32", "float32"]
    expected = ort_runner_from_model(int8_state.model).run(IMAGES)["y"]
    error = runner.run(IMAGES)["y"] - expected
    assert 10 * np.log10(np.sum(expected**2) / np.sum(error**2)) > 25
    assert built.placement is not None
    assert set(built.placement.integer_nodes) >= {"stem/conv", "block/conv", "head/gemm"}


def test_int8_with_float_interface_is_the_default_behind_a_static_plan(
    int8_state: ModelState, context: MakeContext
) -> None:
    runner = target().runner(target().build(int8_state, context()))
    stored = (*runner.stored_inputs, *runner.stored_outputs)  # type: ignore[attr-defined]
    assert [tensor.dtype for tensor in stored] == ["float32", "float32"]


def test_channels_last_interface_is_said_and_fed_in_the_models_own_order(
    float_state: ModelState, context: MakeContext
) -> None:
    built = target(input_layout="nhwc").build(float_state, context())
    runner = target().runner(built)
    (stored,) = runner.stored_inputs  # type: ignore[attr-defined]
    assert stored.shape == (None, 8, 8, 3)
    expected = ort_runner_from_model(float_state.model).run(IMAGES)["y"]
    np.testing.assert_allclose(runner.run(IMAGES)["y"], expected, rtol=1e-5, atol=1e-6)
    assert not any(finding.topic == "layout" for finding in built.findings)


def test_qdq_model_from_elsewhere_is_deployed_as_int8(int8_state: ModelState, context: MakeContext) -> None:
    from onnxprune.graph.canonical import canonicalize
    from onnxprune.ops.shapes import SHAPES
    from onnxprune.targets import qdq

    assert int8_state.quantization is not None
    placement = qdq.place(int8_state.model, int8_state.quantization, "x86-vnni")
    foreign = qdq.spell(int8_state.model, int8_state.quantization, placement, "x86-vnni")
    model = canonicalize(ir.from_proto(ir.to_proto(foreign)), shape_rules=SHAPES)
    built = target().build(ModelState(model=model), context())
    kinds = {node.op_type for node in target().runner(built).graph.nodes}  # type: ignore[attr-defined]
    assert "Conv" in kinds or "CONV_2D" in kinds
    expected = ort_runner_from_model(int8_state.model).run(IMAGES)["y"]
    error = target().runner(built).run(IMAGES)["y"] - expected
    assert 10 * np.log10(np.sum(expected**2) / np.sum(error**2)) > 25


def test_static_batch_model_is_written_with_its_batch(context: MakeContext) -> None:
    state = ModelState(model=canonical(conv_net_proto(batch=4)))
    assert target().build(state, context()).inputs[0].shape == (4, 3, 8, 8)


def test_interface_is_the_first_thing_that_is_said(artifact: Artifact) -> None:
    (finding,) = [finding for finding in artifact.findings if finding.topic == "interface"]
    assert finding.text == "fp32; input 'x' float32[?, 3, 8, 8]; output 'y' float32[?, 10]."


def integer_model() -> onnx.ModelProto:
    """A QDQ convolution that is fed and gives int8."""
    rng = np.random.default_rng(3)
    weights = {
        "w": rng.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8),
        "ws": np.float32(0.01),
        "xs": np.float32(0.02),
        "ys": np.float32(0.05),
        "zero": np.int8(0),
        "yz": np.int8(-7),
    }
    return proto_of(
        [
            helper.make_node("DequantizeLinear", ["x", "xs", "zero"], ["xr"]),
            helper.make_node("DequantizeLinear", ["w", "ws", "zero"], ["wr"]),
            helper.make_node("Conv", ["xr", "wr"], ["c"], name="conv"),
            helper.make_node("QuantizeLinear", ["c", "ys", "yz"], ["y"]),
        ],
        inputs={"x": ("N", 3, 8, 8)},
        outputs={"y": ("N", 4, 6, 6)},
        weights=weights,
        input_type=onnx.TensorProto.INT8,
        output_type=onnx.TensorProto.INT8,
    )


@pytest.mark.parametrize("precision", ["auto", "int8"])
def test_integers_of_the_models_own_interface_stay_integers_for_who_runs_the_file(
    context: MakeContext, precision: str
) -> None:
    model = canonical(integer_model())
    built = target(precision=precision).build(ModelState(model=model), context())
    assert [spec.dtype for spec in (*built.inputs, *built.outputs)] == ["int8", "int8"]
    feeds = {"x": np.random.default_rng(4).integers(-128, 128, (2, 3, 8, 8)).astype(np.int8)}
    expected, found = ort_runner_from_model(model).run(feeds)["y"], target().runner(built).run(feeds)["y"]
    # Kernels round ties in another way.
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_integer_outputs_that_are_wrong_are_found_by_their_scale(
    monkeypatch: pytest.MonkeyPatch, context: MakeContext
) -> None:
    honest = tflite_target.emit

    def of_another_model(_: ir.Model, *arguments: object, **options: object) -> object:
        other = integer_model()
        (weight,) = [one for one in other.graph.initializer if one.name == "w"]
        weight.CopyFrom(numpy_helper.from_array(np.flip(numpy_helper.to_array(weight), 0).copy(), "w"))
        return honest(canonical(other), *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(tflite_target, "emit", of_another_model)
    with pytest.raises(TargetError, match="output 'y' reaches"):
        target().build(ModelState(model=canonical(integer_model())), context())


def test_scalars_are_fed_and_given_as_scalars(context: MakeContext) -> None:
    model = canonical(proto_of([helper.make_node("Exp", ["x"], ["y"])], inputs={"x": []}, outputs={"y": []}))
    built = target().build(ModelState(model=model), context())
    found = target().runner(built).run({"x": np.float32(1.0)})["y"]
    assert found.shape == ()
    np.testing.assert_allclose(found, np.e, rtol=1e-6)


def test_input_without_elements_may_be_there(context: MakeContext) -> None:
    model = canonical(
        proto_of(
            [helper.make_node("Concat", ["x", "e"], ["y"], axis=0)],
            inputs={"x": [2, 4], "e": [0, 4]},
            outputs={"y": [2, 4]},
        )
    )
    built = target().build(ModelState(model=model), context())
    feeds = {"x": np.ones((2, 4), np.float32), "e": np.ones((0, 4), np.float32)}
    np.testing.assert_array_equal(target().runner(built).run(feeds)["y"], feeds["x"])


def test_outputs_that_nobody_computes_are_written(context: MakeContext) -> None:
    model = canonical(
        proto_of(
            [
                helper.make_node("Relu", ["x"], ["y"]),
                helper.make_node("Identity", ["y"], ["twin"]),
                helper.make_node("Identity", ["k"], ["constant"]),
                helper.make_node("Identity", ["x"], ["same"]),
            ],
            inputs={"x": [1, 4]},
            outputs={"y": [1, 4], "twin": [1, 4], "constant": [2], "same": [1, 4]},
            weights={"k": np.float32([1, 2])},
        )
    )
    built = target().build(ModelState(model=model), context())
    x = np.float32([[-1, 2, -3, 4]])
    found = target().runner(built).run({"x": x})
    assert list(found) == ["y", "twin", "constant", "same"]
    np.testing.assert_array_equal(found["twin"], np.maximum(x, 0))
    np.testing.assert_array_equal(found["constant"], [1, 2])
    np.testing.assert_array_equal(found["same"], x)


def test_integers_inside_have_the_names_of_the_source(int8_state: ModelState, context: MakeContext) -> None:
    built = target().build(int8_state, context())
    tensors = target().runner(built).graph.computed  # type: ignore[attr-defined]
    source = {value.name for node in int8_state.model.graph for value in node.outputs}
    # A convolution and its Relu are one operator, and so are Add and Relu.
    assert {"r1", "r2", "y"} <= set(tensors) & source
