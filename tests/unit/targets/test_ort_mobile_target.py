from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from pydantic import ValidationError

from onnxprune.contracts import Artifact, Finding, ModelState, QuantizationPlan, TargetContext
from onnxprune.errors import PreconditionError, TargetError
from onnxprune.runtime.child import ChildFailure
from onnxprune.runtime.host import HostIsa, host_isa
from onnxprune.runtime.model_timing import ModelTimer
from onnxprune.runtime.sessions import ort_runner_from_model, ort_runner_from_path
from onnxprune.targets import building, ort_convert, ort_mobile, proof
from onnxprune.targets.ort_format import read_ort_facts
from onnxprune.targets.ort_mobile import OrtMobileConfig, OrtMobileTarget
from onnxprune.targets.qdq import SpellingName, place
from onnxprune.targets.qdq.measured import MeasuredPlacement
from tests.builders import CanonicalModel, conv_net, proto_of
from tests.unit.targets.conftest import PROVENANCE

MakeContext = Callable[..., TargetContext]

IMAGES = {"x": np.random.default_rng(5).standard_normal((2, 3, 8, 8), dtype=np.float32)}


def target(**options: object) -> OrtMobileTarget:
    return OrtMobileTarget(OrtMobileConfig.model_validate(options))


def ops_of(artifact: Artifact) -> dict[str, int]:
    counts: dict[str, int] = {}
    for use, count in read_ort_facts(artifact.model_path).ops.items():
        name = f"{use.domain}::{use.op_type}" if use.domain else use.op_type
        counts[name] = counts.get(name, 0) + count
    return counts


def config_of(artifact: Artifact) -> str:
    return next((artifact.folder / file.path).read_text() for file in artifact.files if file.role == "config")


def findings_on(artifact: Artifact, topic: str) -> list[Finding]:
    return [finding for finding in artifact.findings if finding.topic == topic]


@pytest.fixture(scope="module")
def artifact(float_state: ModelState, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The float model for arm64, fixed style."""
    folder = tmp_path_factory.mktemp("arm64")
    return target().build(float_state, TargetContext(folder=folder, stem="net", provenance=PROVENANCE))


@pytest.fixture(scope="module")
def runtime_style(float_state: ModelState, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The float model for arm64, runtime style, with type reduction."""
    folder = tmp_path_factory.mktemp("runtime")
    context = TargetContext(folder=folder, stem="net", provenance=PROVENANCE)
    return target(optimization_style="runtime", type_reduction=True).build(float_state, context)


@pytest.fixture(scope="module")
def int8_artifact(int8_state: ModelState, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The int8 model for arm64, with type reduction."""
    folder = tmp_path_factory.mktemp("int8")
    context = TargetContext(folder=folder, stem="net", provenance=PROVENANCE)
    return target(type_reduction=True).build(int8_state, context)


def test_artifact_computes_what_the_graph_computes(float_state: ModelState, artifact: Artifact) -> None:
    expected = ort_runner_from_model(float_state.model).run(IMAGES)["y"]
    found = target().runner(artifact).run(IMAGES)["y"]
    # float32 sums of 144 products, added in another order.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert [(spec.name, spec.shape) for spec in artifact.inputs] == [("x", ("N", 3, 8, 8))]
    assert [(spec.name, spec.shape) for spec in artifact.outputs] == [("y", ("N", 10))]


def test_folder_holds_the_file_and_the_list_of_operators_and_nothing_else(artifact: Artifact) -> None:
    assert [(file.path, file.role) for file in artifact.files] == [
        ("net.ort", "model"),
        ("net.required_operators.config", "config"),
    ]
    assert sorted(path.name for path in artifact.folder.iterdir()) == ["net.ort", "net.required_operators.config"]
    assert artifact.size_bytes == artifact.model_path.stat().st_size


def test_same_model_gives_the_same_bytes_and_no_path(artifact: Artifact, context: MakeContext) -> None:
    again = target().build(ModelState(model=conv_net()), context())
    assert again.files == artifact.files
    for built in (again, artifact):
        for path in built.folder.iterdir():
            content = path.read_bytes()
            assert str(built.folder).encode() not in content
            assert b".partial" not in content
            assert b"/tmp" not in content


def test_runtime_style_gives_the_same_bytes_twice(runtime_style: Artifact, context: MakeContext) -> None:
    made = context()
    again = target(optimization_style="runtime", type_reduction=True).build(ModelState(model=conv_net()), made)
    assert again.files == runtime_style.files


def test_provenance_and_the_models_metadata_are_in_the_file(artifact: Artifact) -> None:
    metadata = ort_runner_from_path(artifact.model_path).metadata
    assert json.loads(metadata.pop("onnxprune")) == PROVENANCE
    assert metadata == {"author": "somebody", "labels": "a,b,c"}


def test_operators_are_listed_without_types_and_without_a_path(artifact: Artifact) -> None:
    assert config_of(artifact) == (
        "# Operators that 'net.ort' needs, for ONNX Runtime's build.py --include_ops_by_config.\n"
        "ai.onnx;1;GlobalAveragePool\n"
        "ai.onnx;13;Flatten,Gemm\n"
        "com.microsoft;1;FusedConv\n"
    )


def test_runtime_style_lists_the_operators_of_both_outcomes_with_their_types(runtime_style: Artifact) -> None:
    assert runtime_style.files[1].path == "net.required_operators_and_types.config"
    config = config_of(runtime_style)
    assert 'Conv{"inputs": {"0": ["float"]}}' in config
    assert "com.microsoft;1;FusedConv" in config
    assert 'Add{"inputs": {"0": ["float"]}},Relu{"inputs": {"0": ["float"]}}' in config


def test_runtime_style_keeps_plain_operators_and_replays_what_it_saved(
    float_state: ModelState, artifact: Artifact, runtime_style: Artifact
) -> None:
    assert ops_of(runtime_style)["Conv"] == 2
    assert "com.microsoft::FusedConv" not in ops_of(runtime_style)
    assert read_ort_facts(runtime_style.model_path).has_runtime_optimizations
    found = target(optimization_style="runtime").runner(runtime_style).run(IMAGES)["y"]
    # Replayed, it is the graph of the fixed style.
    np.testing.assert_allclose(found, target().runner(artifact).run(IMAGES)["y"], rtol=0, atol=1e-5)
    (finding,) = findings_on(runtime_style, "optimization style")
    assert "session.enable_saved_runtime_optimizations" in finding.text
    assert "--minimal_build extended" in findings_on(runtime_style, "reduced build")[0].text


def test_int8_for_arm64_runs_int8_kernels_with_signed_activations(int8_artifact: Artifact) -> None:
    ops = ops_of(int8_artifact)
    assert ops["com.microsoft::QLinearConv"] == 2
    assert ops["com.microsoft::QLinearAdd"] == 1
    assert "Conv" not in ops
    assert 'QLinearConv{"inputs": {"0": ["int8_t"]}}' in config_of(int8_artifact)
    assert int8_artifact.placement is not None
    assert "stem/conv" in int8_artifact.placement.integer_nodes


def test_int8_for_x86_runs_int8_kernels_with_unsigned_activations(int8_state: ModelState, context: MakeContext) -> None:
    artifact = target(platform="x86-64", type_reduction=True).build(int8_state, context())
    assert ops_of(artifact)["com.microsoft::QLinearConv"] == 2
    assert 'QLinearConv{"inputs": {"0": ["uint8_t"]}}' in config_of(artifact)


@pytest.mark.skipif(host_isa().arch == "arm64", reason="this machine is the target")
def test_int8_on_another_machine_is_said_not_to_be_measured(int8_artifact: Artifact) -> None:
    (finding,) = findings_on(int8_artifact, "int8")
    assert finding.severity == "warning"
    assert f"spelled for 'arm64', and this machine is {host_isa().summary}" in finding.text


@pytest.mark.skipif(host_isa().arch != "x86-64", reason="the blocked layout is x86's")
def test_blocked_layout_is_used_on_request_with_a_warning(float_state: ModelState, context: MakeContext) -> None:
    artifact = target(platform="x86-64", blocked_layout=True).build(float_state, context())
    assert ops_of(artifact)["com.microsoft.nchwc::Conv"] == 2
    (finding,) = findings_on(artifact, "blocked layout")
    assert finding.severity == "warning"
    assert "blocks of" in finding.text


def test_needed_runtime_version_is_named(artifact: Artifact) -> None:
    import onnxruntime

    (finding,) = findings_on(artifact, "ONNX Runtime version")
    assert finding.text.startswith("The file needs ONNX Runtime at least 1.17 (ORT format 6, opset 20).")
    assert f"with {onnxruntime.__version__}" in finding.text


def test_findings_say_what_mobile_providers_could_take(artifact: Artifact, int8_artifact: Artifact) -> None:
    assert [finding.topic for finding in artifact.findings[-3:]] == [
        "NNAPI",
        "CoreML (NeuralNetwork)",
        "CoreML (MLProgram)",
    ]
    assert any("takes uint8 activations only" in finding.text for finding in findings_on(int8_artifact, "NNAPI"))
    assert not any("takes uint8 activations only" in finding.text for finding in findings_on(artifact, "NNAPI"))


def test_float16_that_became_float32_again_is_said_so(monkeypatch: pytest.MonkeyPatch, context: MakeContext) -> None:
    monkeypatch.setattr(ort_mobile, "host_isa", lambda: HostIsa(arch="x86-64", has_avx2=True))
    artifact = target().build(ModelState(model=conv_net(dtype=np.float16)), context())
    (finding,) = findings_on(artifact, "float16")
    assert "no float16 kernels and casts back" in finding.text
    assert artifact.inputs[0].dtype == "float16"


# --- platforms and refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("isa", "platform", "is_host"),
    [
        (HostIsa(arch="arm64"), "arm64", True),
        (HostIsa(arch="x86-64"), "arm64", False),
        (HostIsa(arch="x86-64"), "x86-64", True),
        (HostIsa(arch="x86-64", has_vnni=True), "x86-64", False),
        (HostIsa(arch="x86-64", has_vnni=True), "x86-64-vnni", True),
        (HostIsa(arch="x86-64"), "auto", True),
        (HostIsa(arch="riscv64"), "auto", False),
    ],
)
def test_this_machine_is_the_target_only_with_its_instruction_set(
    monkeypatch: pytest.MonkeyPatch, isa: HostIsa, platform: str, is_host: bool
) -> None:
    monkeypatch.setattr(ort_mobile, "host_isa", lambda: isa)
    assert target(platform=platform).is_host is is_host


@pytest.mark.parametrize(
    "options",
    [
        {"platform": "arm64", "blocked_layout": True},
        {"platform": "x86-64", "blocked_layout": True, "optimization_style": "runtime"},
        {"platform": "x86-64", "blocked_layout": True, "optimization_level": "basic"},
        {"platform": "armv7"},
        {"typereduction": True},
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        target(**options)


def test_blocked_layout_is_refused_on_a_machine_without_it(
    monkeypatch: pytest.MonkeyPatch, float_state: ModelState
) -> None:
    monkeypatch.setattr(ort_mobile, "host_isa", lambda: HostIsa(arch="arm64"))
    with pytest.raises(PreconditionError, match="this machine, which is arm64 and not x86-64"):
        target(platform="x86-64", blocked_layout=True).check(float_state, will_quantize=False)


def test_unknown_architecture_has_no_automatic_platform(
    monkeypatch: pytest.MonkeyPatch, float_state: ModelState
) -> None:
    monkeypatch.setattr(ort_mobile, "host_isa", lambda: HostIsa(arch="riscv64"))
    with pytest.raises(PreconditionError, match="architecture 'riscv64'"):
        target(platform="auto").check(float_state, will_quantize=False)


def test_weights_above_the_formats_limit_are_refused_before_the_first_pass(
    monkeypatch: pytest.MonkeyPatch, float_state: ModelState
) -> None:
    monkeypatch.setattr(ort_mobile, "weight_bytes", lambda model: 3 << 30)
    with pytest.raises(TargetError, match=r"3\.0 GiB of weights don't fit into a \.ort file"):
        target().check(float_state, will_quantize=False)
    target().check(float_state, will_quantize=True)  # a quarter of that in int8


def test_artifact_that_computes_something_else_is_refused_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, int8_state: ModelState, context: MakeContext
) -> None:
    def write_other(model: ir.Model, folder: Path) -> Path:
        other = conv_net()
        other.graph.initializers["head.bias"].const_value = ir.tensor(np.full(10, 9, np.float32), name="head.bias")
        other.metadata_props.update(model.metadata_props)
        return proof.write_reference(other, folder)

    monkeypatch.setattr(ort_mobile, "write_reference", write_other)
    made = context()
    with pytest.raises(TargetError, match=r"'net\.ort' does not compute .*: output 'y' reaches -?\d+\.\d dB"):
        target().build(int8_state, made)
    assert list(made.folder.iterdir()) == []


def test_crash_of_the_converter_is_a_target_error_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, float_state: ModelState, context: MakeContext
) -> None:
    def crash(*args: object, **options: object) -> None:
        raise ChildFailure("crashed in native code (SIGABRT)")

    monkeypatch.setattr(ort_convert, "call_in_child", crash)
    made = context()
    with pytest.raises(TargetError, match=r"ONNX Runtime crashed in native code \(SIGABRT\) while it converted"):
        target().build(float_state, made)
    assert list(made.folder.iterdir()) == []


def test_model_that_the_runtime_has_no_kernel_for_is_refused_with_the_operator(context: MakeContext) -> None:
    proto = proto_of(
        [helper.make_node("Relu", ["x"], ["y"], name="cut")],
        inputs={"x": [4]},
        outputs={"y": [4]},
        input_type=TensorProto.BFLOAT16,
        output_type=TensorProto.BFLOAT16,
    )
    with pytest.raises(TargetError, match=r"Conversion to ORT format failed\. .*Relu"):
        target().build(ModelState(model=CanonicalModel(ir.from_proto(proto))), context())


@pytest.mark.parametrize("blocked_layout", [False, True])
def test_timed_build_times_the_layout_that_the_file_will_have(
    *,
    int8_state: ModelState,
    context: MakeContext,
    monkeypatch: pytest.MonkeyPatch,
    blocked_layout: bool,
) -> None:
    if blocked_layout and host_isa().arch != "x86-64":
        pytest.skip("blocked_layout is for x86-64")
    timers: list[ModelTimer] = []

    def remember(
        model: ir.Model, plan: QuantizationPlan, spelling: SpellingName, *, timer: ModelTimer, **_options: object
    ) -> MeasuredPlacement:
        timers.append(timer)
        return MeasuredPlacement(placement=place(model, plan, spelling))

    monkeypatch.setattr(building, "measured_placement", remember)
    target(platform="auto", blocked_layout=blocked_layout).build(
        int8_state, dataclasses.replace(context(), timing_threads=2)
    )
    assert [(timer.threads, timer.blocked_layout) for timer in timers] == [(2, blocked_layout)]


@pytest.mark.parametrize(
    "options", [{"optimization_style": "runtime"}, {"optimization_level": "basic"}, {"placement": "table"}], ids=str
)
def test_files_that_are_not_fully_optimized_are_placed_by_the_table(
    int8_state: ModelState, context: MakeContext, options: dict[str, object]
) -> None:
    timed = dataclasses.replace(context(), timing_threads=1)
    artifact = target(platform="auto", **options).build(int8_state, timed)
    assert artifact.placement is not None
    assert artifact.placement.decided_by == "table"
