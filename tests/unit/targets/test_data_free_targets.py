"""Artifacts of plans without calibration data, and of static plans that are placed everywhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from onnxprune.contracts import Artifact, CanonicalModel, ModelState, PassContext, TargetContext
from onnxprune.errors import PreconditionError
from onnxprune.passes.fp16 import Fp16Config, Fp16Pass
from onnxprune.passes.harness import run_pass
from onnxprune.passes.quant import QuantConfig, QuantPass
from onnxprune.targets.building import spell_for
from onnxprune.targets.onnx import OnnxTarget, OnnxTargetConfig
from onnxprune.targets.ort_mobile import OrtMobileConfig, OrtMobileTarget
from tests.builders import canonical, conv_net, proto_of
from tests.quantization import normal_batches, run, signal_to_noise_db
from tests.recurrent import embedding_lstm_head

MakeContext = Callable[[], TargetContext]
IDS = {"ids": np.arange(12, dtype=np.int64).reshape(12, 1)}


def state_of(model: CanonicalModel, mode: str, **config: Any) -> ModelState:
    pass_ = QuantPass(QuantConfig.model_validate({"mode": mode, "threads": 1, **config}))
    calibration = normal_batches((1, 3, 8, 8)) if mode == "static" else None
    return run_pass(pass_, ModelState(model=model), PassContext(calibration=calibration)).state


def onnx_target(**config: Any) -> OnnxTarget:
    return OnnxTarget(OnnxTargetConfig(**{"spelling": "x86-vnni", **config}))


def mobile_target(**config: Any) -> OrtMobileTarget:
    return OrtMobileTarget(OrtMobileConfig(**{"platform": "x86-64-vnni", **config}))


def texts(artifact: Artifact) -> list[str]:
    return [found.text for found in artifact.findings if found.topic == "int8 without calibration data"]


def vision_head() -> CanonicalModel:
    """A convolution that computes in float and a classifier that does not."""
    rng = np.random.default_rng(2)

    def weight(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.1).astype(np.float32)

    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv", kernel_shape=[3, 3]),
        helper.make_node("Flatten", ["c"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "v", "b"], ["y"], name="head", transB=1),
    ]
    constants = {"w": weight(64, 3, 3, 3), "v": weight(300, 2304), "b": weight(300)}
    return canonical(proto_of(nodes, inputs={"x": (1, 3, 8, 8)}, outputs={"y": (1, 300)}, weights=constants, opset=20))


@pytest.mark.parametrize("mode", ["dynamic", "weight-only"])
def test_onnx_artifact_is_a_quarter_and_computes_what_the_model_computes(mode: str, context: MakeContext) -> None:
    model = vision_head()
    float_artifact = onnx_target().build(ModelState(model=model), context())
    artifact = onnx_target().build(state_of(model, mode), context())

    assert artifact.size_bytes < 0.27 * float_artifact.size_bytes
    assert artifact.placement is not None
    assert artifact.placement.integer_nodes == ("head",)
    feeds = {"x": np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype(np.float32)}
    runners = [onnx_target().runner(found) for found in (float_artifact, artifact)]
    exact, actual = (runner.run(feeds)["y"] for runner in runners)
    assert signal_to_noise_db(exact, actual) > 35
    assert any("latency and memory in use are those of float" in text for text in texts(artifact))


def test_ort_file_of_mode_dynamic_converts_nothing_in_each_run_and_of_weight_only_says_what_it_costs(
    context: MakeContext,
) -> None:
    dynamic = mobile_target().build(state_of(vision_head(), "dynamic"), context())
    stored = mobile_target().build(state_of(vision_head(), "weight-only"), context())

    assert dynamic.placement is not None
    assert dynamic.placement.float_nodes["conv"].startswith("its weight stays float32")
    assert not any("each run, because" in text for text in texts(dynamic))
    (finding,) = (text for text in texts(stored) if "each run, because" in text)
    assert "slower than in float" in finding


def test_ort_file_keeps_the_integers_of_stored_weights(context: MakeContext) -> None:
    model = vision_head()
    float_artifact = mobile_target().build(ModelState(model=model), context())
    for platform in ("arm64", "x86-64-vnni"):
        stored = mobile_target(platform=platform).build(state_of(model, "weight-only"), context())
        assert stored.size_bytes < 0.3 * float_artifact.size_bytes


def test_lstm_becomes_a_dynamic_one_in_both_formats(context: MakeContext) -> None:
    model = embedding_lstm_head()
    reference = onnx_target().build(ModelState(model=model), context())
    exact = onnx_target().runner(reference).run(IDS)["y"]
    for target in (onnx_target(), mobile_target()):
        artifact = target.build(state_of(model, "dynamic"), context())
        assert signal_to_noise_db(exact, target.runner(artifact).run(IDS)["y"]) > 25


def test_placement_of_an_earlier_run_is_kept_without_data_too(context: MakeContext) -> None:
    state = state_of(vision_head(), "dynamic")
    first = onnx_target().build(state, context())
    assert first.placement is not None
    fewer = dataclasses.replace(
        first.placement, integer_nodes=(), float_nodes={**first.placement.float_nodes, "head": "because I say so"}
    )
    second = onnx_target().build(state, dataclasses.replace(context(), placement=fewer))

    assert second.placement == fewer
    operators = {node.op_type for node in onnx.load(second.model_path).graph.node}
    assert "MatMulInteger" not in operators


@pytest.mark.parametrize("mode", ["static", "dynamic", "weight-only"])
@pytest.mark.parametrize("half", ["weights", "full"])
def test_half_precision_and_integers_share_a_model(half: str, mode: str, context: MakeContext) -> None:
    model = vision_head()
    config = Fp16Config.model_validate({"mode": half, "skip": ("head",)})
    state = run_pass(Fp16Pass(config), ModelState(model=model), PassContext()).state
    calibration = normal_batches((1, 3, 8, 8))
    pass_ = QuantPass(QuantConfig.model_validate({"mode": mode}))
    state = run_pass(pass_, state, PassContext(calibration=calibration)).state

    spelled = spell_for(state, context(), "x86-vnni", choice="table")

    assert spelled.placement is not None
    assert spelled.placement.integer_nodes == ("head",)
    weight = spelled.model.graph.initializers["w"]
    assert weight.dtype is ir.DataType.FLOAT16
    feeds = calibration.batches[0]
    assert signal_to_noise_db(run(model, feeds)[0], run(spelled.model, feeds)[0]) > 32


def test_model_without_a_layer_that_gains_says_so(context: MakeContext) -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], name="conv", kernel_shape=[3, 3])]
    weight = np.random.default_rng(2).standard_normal((64, 3, 3, 3)).astype(np.float32)
    model = canonical(
        proto_of(nodes, inputs={"x": (1, 3, 8, 8)}, outputs={"y": [None] * 4}, weights={"w": weight}, opset=20)
    )

    artifact = onnx_target().build(state_of(model, "dynamic"), context())

    assert any("No layer is faster with ranges of each run" in text for text in texts(artifact))


@pytest.mark.parametrize(("bits", "expected"), [(8, ir.DataType.UINT8), (16, ir.DataType.UINT16)])
@pytest.mark.parametrize("make_target", [onnx_target, mobile_target], ids=["onnx", "ort-mobile"])
def test_static_plans_are_placed_everywhere_where_that_is_wanted(
    make_target: Callable[..., Any], bits: int, expected: ir.DataType, context: MakeContext, tmp_path: Path
) -> None:
    state = state_of(conv_net(batch=1), "static", activation_bits=bits)
    target = make_target(placement="everywhere")

    artifact = target.build(state, context())

    assert artifact.placement.target == "everywhere-x86-vnni"
    assert not artifact.placement.float_nodes
    feeds = normal_batches((1, 3, 8, 8)).batches[0]
    reference = onnx_target().build(ModelState(model=conv_net(batch=1)), context())
    exact = onnx_target().runner(reference).run(feeds)["y"]
    assert signal_to_noise_db(exact, target.runner(artifact).run(feeds)["y"]) > (35 if bits == 8 else 45)
    if artifact.model_path.suffix == ".onnx":
        graph = ir.load(artifact.model_path).graph
        kinds = {node.inputs[2].dtype for node in graph if node.op_type == "QuantizeLinear" and node.inputs[2]}
        assert kinds == {expected}


def test_placement_made_for_the_table_is_refused_everywhere(context: MakeContext) -> None:
    state = state_of(conv_net(batch=1), "static")
    artifact = onnx_target().build(state, context())

    with pytest.raises(PreconditionError, match="'onnxruntime-x86-vnni', and this build is for 'everywhere-x86-vnni'"):
        onnx_target(placement="everywhere").build(state, dataclasses.replace(context(), placement=artifact.placement))


def test_sixteen_bits_placed_by_the_table_leave_the_float_model(context: MakeContext) -> None:
    state = state_of(conv_net(batch=1), "static", activation_bits=16)

    artifact = onnx_target().build(state, context())

    assert artifact.placement is not None
    assert artifact.placement.integer_nodes == ()
    assert "QuantizeLinear" not in {node.op_type for node in onnx.load(artifact.model_path).graph.node}
