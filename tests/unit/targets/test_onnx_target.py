from __future__ import annotations

import dataclasses
import hashlib
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from pydantic import ValidationError

from onnxprune.contracts import Artifact, ModelState, Placement, TargetContext
from onnxprune.errors import ModelError, OutputError, PreconditionError, TargetError
from onnxprune.runtime.child import ChildFailure
from onnxprune.runtime.host import HostIsa
from onnxprune.runtime.sessions import ort_runner_from_model
from onnxprune.targets import building, proof
from onnxprune.targets import onnx as onnx_target
from onnxprune.targets.building import spell_for
from onnxprune.targets.onnx import OnnxTarget, OnnxTargetConfig
from onnxprune.targets.qdq import find_spelling
from onnxprune.targets.qdq.measured import MeasuredPlacement
from tests.builders import CanonicalModel, conv_net, proto_of
from tests.unit.targets.conftest import PROVENANCE

MakeContext = Callable[..., TargetContext]

AVX2 = HostIsa(arch="x86-64", has_avx2=True)
VNNI = HostIsa(arch="x86-64", has_avx2=True, has_vnni=True)
ARM = HostIsa(arch="arm64", has_dotprod=True)
RISCV = HostIsa(arch="riscv64")

IMAGES = {"x": np.random.default_rng(5).standard_normal((2, 3, 8, 8), dtype=np.float32)}


def target(**options: object) -> OnnxTarget:
    return OnnxTarget(OnnxTargetConfig.model_validate(options))


def on_host(monkeypatch: pytest.MonkeyPatch, isa: HostIsa) -> None:
    monkeypatch.setattr(onnx_target, "host_isa", lambda: isa)


@pytest.fixture(scope="module")
def artifact(float_state: ModelState, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A float model in one file."""
    folder = tmp_path_factory.mktemp("one")
    return target().build(float_state, TargetContext(folder=folder, stem="net", provenance=PROVENANCE))


@pytest.fixture(scope="module")
def artifact_with_data(float_state: ModelState, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A float model with external data."""
    folder = tmp_path_factory.mktemp("two")
    return target(external_data=True).build(
        float_state, TargetContext(folder=folder, stem="net", provenance=PROVENANCE)
    )


def test_float_artifact_computes_what_the_graph_computes(float_state: ModelState, artifact: Artifact) -> None:
    expected = ort_runner_from_model(float_state.model).run(IMAGES)["y"]
    found = target().runner(artifact).run(IMAGES)["y"]
    np.testing.assert_array_equal(found, expected)
    assert [(spec.name, spec.dtype, spec.shape) for spec in artifact.inputs] == [("x", "float32", ("N", 3, 8, 8))]
    assert [(spec.name, spec.dtype, spec.shape) for spec in artifact.outputs] == [("y", "float32", ("N", 10))]
    assert (artifact.placement, artifact.findings) == (None, ())


def test_artifact_lists_exactly_the_files_in_its_folder_with_their_hashes(artifact_with_data: Artifact) -> None:
    artifact = artifact_with_data
    assert [(file.path, file.role) for file in artifact.files] == [("net.onnx", "model"), ("net.onnx.data", "weights")]
    assert sorted(path.name for path in artifact.folder.iterdir()) == ["net.onnx", "net.onnx.data"]
    for file in artifact.files:
        content = (artifact.folder / file.path).read_bytes()
        assert (file.sha256, file.size_bytes) == (hashlib.sha256(content).hexdigest(), len(content))
    assert artifact.size_bytes == sum(path.stat().st_size for path in artifact.folder.iterdir())


def test_artifact_with_external_data_runs_from_another_folder(artifact_with_data: Artifact, tmp_path: Path) -> None:
    folder = shutil.copytree(artifact_with_data.folder, tmp_path / "elsewhere")
    moved = dataclasses.replace(artifact_with_data, folder=Path(folder))
    assert target().runner(moved).run(IMAGES)["y"].shape == (2, 10)


def test_provenance_joins_the_models_own_metadata(float_state: ModelState, artifact: Artifact) -> None:
    metadata = {entry.key: entry.value for entry in onnx.load(artifact.model_path).metadata_props}
    assert json.loads(metadata.pop("onnxprune")) == artifact.provenance == PROVENANCE
    assert metadata == {"author": "somebody", "labels": "a,b,c"}
    assert "onnxprune" not in float_state.model.metadata_props


def test_same_model_gives_the_same_bytes_and_no_path(artifact_with_data: Artifact, context: MakeContext) -> None:
    again = target(external_data=True).build(ModelState(model=conv_net()), context())
    assert again.files == artifact_with_data.files
    for built in (again, artifact_with_data):
        for file in built.files:
            assert str(built.folder).encode() not in (built.folder / file.path).read_bytes()


@pytest.mark.parametrize(
    ("spelling", "activations", "finding"),
    [
        ("x86-vnni", "uint8", "Scores measured here may be too low"),
        ("x86", "uint8", None),
        ("arm64", "int8", "spelled for 'arm64', and this machine is x86-64 (AVX2): its speed is not measured"),
    ],
)
def test_int8_is_spelled_for_the_processor_and_another_machine_says_so(
    monkeypatch: pytest.MonkeyPatch,
    int8_state: ModelState,
    context: MakeContext,
    spelling: str,
    activations: str,
    finding: str | None,
) -> None:
    on_host(monkeypatch, AVX2)
    artifact = target(spelling=spelling).build(int8_state, context())
    model = ir.load(artifact.model_path)
    quantizers = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    assert {node.inputs[2].const_value.dtype.numpy().name for node in quantizers} == {activations}  # type: ignore[union-attr]
    weights = [
        value.const_value.numpy()
        for value in model.graph.initializers.values()
        if value.dtype is ir.DataType.INT8 and value.const_value is not None and value.const_value.size > 100
    ]
    assert max(int(np.abs(weight).max()) for weight in weights) == 127
    assert artifact.placement is not None
    assert "stem/conv" in artifact.placement.integer_nodes
    assert artifact.inputs[0].dtype == "float32"
    texts = [found.text for found in artifact.findings if found.topic == "int8"]
    assert len(texts) == (finding is not None)
    assert finding is None or finding in texts[0]


def test_placement_of_an_earlier_run_is_kept(int8_state: ModelState, context: MakeContext) -> None:
    first = spell_for(int8_state, context(), "x86", choice="table")
    assert first.placement is not None
    fewer = dataclasses.replace(
        first.placement, integer_nodes=("stem/conv",), float_nodes={"block/conv": "because I say so"}
    )
    second = spell_for(int8_state, dataclasses.replace(context(), placement=fewer), "x86", choice="table")
    assert second.placement is fewer
    quantized = [sum(node.op_type == "QuantizeLinear" for node in found.model.graph) for found in (first, second)]
    assert quantized[0] > quantized[1] > 0


@pytest.mark.parametrize(
    ("isa", "spelling", "is_host"),
    [
        (AVX2, "auto", True),
        (VNNI, "auto", True),
        (ARM, "auto", True),
        (RISCV, "auto", False),
        (AVX2, "x86", True),
        (AVX2, "x86-vnni", False),
        (VNNI, "x86", False),
        (VNNI, "arm64", False),
        (ARM, "arm64", True),
    ],
)
def test_this_machine_is_the_target_only_where_it_would_be_spelled_the_same(
    monkeypatch: pytest.MonkeyPatch, isa: HostIsa, spelling: str, is_host: bool
) -> None:
    on_host(monkeypatch, isa)
    assert target(spelling=spelling).is_host is is_host


def test_auto_spelling_on_an_unknown_architecture_refuses_int8_only(
    monkeypatch: pytest.MonkeyPatch, float_state: ModelState
) -> None:
    on_host(monkeypatch, RISCV)
    with pytest.raises(PreconditionError, match=r"architecture 'riscv64'.*'x86-vnni', 'x86' or 'arm64'"):
        target().check(float_state, will_quantize=True)
    target().check(float_state, will_quantize=False)


def test_zero_weights_are_said_not_to_save_bytes(monkeypatch: pytest.MonkeyPatch, context: MakeContext) -> None:
    on_host(monkeypatch, RISCV)  # float models are built on any machine
    model = conv_net()
    weight = model.graph.initializers["block.weight"]
    assert weight.const_value is not None
    weight.const_value = ir.tensor(np.zeros_like(weight.const_value.numpy()), name="block.weight")
    (finding,) = target().build(ModelState(model=model), context()).findings
    # 16*16*9 zeros of 16*3*9 + 16*16*9 + 16 + 16 + 10*16 + 10 numbers.
    assert finding.topic == "sparse storage"
    assert finding.text.startswith("78% of the weights are zero, but an ONNX file stores")


def test_output_that_is_no_tensor_is_refused_before_the_first_pass() -> None:
    proto = proto_of([helper.make_node("SequenceConstruct", ["x"], ["parts"])], inputs={"x": [2]}, outputs={})
    proto.graph.output.append(helper.make_tensor_sequence_value_info("parts", TensorProto.FLOAT, None))
    state = ModelState(model=CanonicalModel(ir.from_proto(proto)))
    with pytest.raises(ModelError, match="'parts' is a Sequence"):
        target().check(state, will_quantize=False)


def test_one_file_above_its_limit_is_refused_before_the_first_pass(
    monkeypatch: pytest.MonkeyPatch, float_state: ModelState
) -> None:
    monkeypatch.setattr(onnx_target, "weight_bytes", lambda model: 3 << 30)
    with pytest.raises(TargetError, match=r"3\.0 GiB of weights don't fit into one ONNX file"):
        target(external_data=False).check(float_state, will_quantize=False)
    target(external_data=False).check(float_state, will_quantize=True)
    target().check(float_state, will_quantize=False)


# --- what must not pass -------------------------------------------------------------------------------------------


def test_artifact_that_computes_something_else_is_refused_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, float_state: ModelState, context: MakeContext
) -> None:
    def write_other(model: ir.Model, folder: Path) -> Path:
        other = conv_net()
        other.graph.initializers["head.bias"].const_value = ir.tensor(np.ones(10, np.float32), name="head.bias")
        return proof.write_reference(other, folder)

    monkeypatch.setattr(onnx_target, "write_reference", write_other)
    made = context()
    with pytest.raises(
        TargetError, match=r"'net\.onnx' does not compute what its graph computes: output 'y' is off by"
    ) as e:
        target().build(float_state, made)
    assert e.value.exit_code == 7
    assert list(made.folder.iterdir()) == []


def test_runtime_that_crashes_on_the_artifact_is_a_target_error_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, float_state: ModelState, context: MakeContext
) -> None:
    seeds = []

    def crash(function: str, arguments: dict[str, object], **options: object) -> None:
        seeds.append(arguments["seed"])
        raise ChildFailure("crashed in native code (SIGSEGV)")

    monkeypatch.setattr(proof, "call_in_child", crash)
    made = context()
    with pytest.raises(TargetError, match=r"ONNX Runtime crashed in native code \(SIGSEGV\) while it loaded and ran"):
        target().build(float_state, dataclasses.replace(made, seed=7))
    assert list(made.folder.iterdir()) == []
    assert seeds == [7]


def test_model_that_the_runtime_cannot_run_is_a_target_error_with_its_reason(context: MakeContext) -> None:
    proto = proto_of(
        [helper.make_node("Reshape", ["x", "shape"], ["y"], name="squash")],
        inputs={"x": [5]},
        outputs={"y": [None, None]},
        weights={"shape": np.array([2, 3], np.int64)},
    )
    with pytest.raises(TargetError, match=r"'net\.onnx' was written, but does not run\. .*squash"):
        target().build(ModelState(model=CanonicalModel(ir.from_proto(proto))), context())


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that nobody can write to")
def test_folder_that_cannot_be_written_to_is_an_output_error(float_state: ModelState) -> None:
    with pytest.raises(OutputError, match=r"Writing 'net\.onnx' failed") as caught:
        target().build(float_state, TargetContext(folder=Path("/proc"), stem="net"))
    assert caught.value.exit_code == 11


LIMITED_BUILD = """
import sys
from pathlib import Path
from onnxprune.contracts import Artifact, ModelState, Placement, TargetContext
from onnxprune.errors import OnnxPruneError
from onnxprune.plugins import find_target
from tests.builders import conv_net
target_type = find_target(sys.argv[1])
try:
    target_type(target_type.config_type()).build(
        ModelState(model=conv_net()), TargetContext(folder=Path(sys.argv[2]), stem="net"))
except OnnxPruneError as error:
    print(error.exit_code, error)
"""


@pytest.mark.parametrize(
    ("name", "limit_bytes"),
    # The ONNX file has 12 kB, the .ort file 17 kB: one limit stops our writer, the other ONNX Runtime's.
    [("onnx", 8_000), ("ort-mobile", 8_000), ("ort-mobile", 15_000)],
)
def test_full_disk_is_an_output_error_and_leaves_nothing(tmp_path: Path, name: str, limit_bytes: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED_BUILD, name, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes)),
    )
    assert done.stdout.startswith("11 "), done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def test_timed_build_decides_by_measurement_and_keeps_the_regions(int8_state: ModelState, context: MakeContext) -> None:
    timed = dataclasses.replace(context(), timing_threads=1)
    artifact = target().build(int8_state, timed)
    assert artifact.placement is not None
    assert artifact.placement.decided_by == "measured"
    assert {name for region in artifact.regions for name in region.nodes} >= set(artifact.placement.integer_nodes)
    (finding,) = (finding for finding in artifact.findings if finding.topic == "placement")
    assert "this machine" in finding.text


@pytest.mark.parametrize(("options", "threads"), [({"placement": "table"}, 1), ({}, None)])
def test_nothing_is_timed_where_the_table_shall_decide_or_nothing_may_be_timed(
    int8_state: ModelState, context: MakeContext, options: dict[str, object], threads: int | None
) -> None:
    artifact = target(**options).build(int8_state, dataclasses.replace(context(), timing_threads=threads))
    assert artifact.placement is not None
    assert artifact.placement.decided_by == "table"
    assert artifact.regions == ()
    assert any("not measured on the target" in finding.text for finding in artifact.findings)


def test_measured_placement_of_an_earlier_run_is_repeated_without_timing(
    int8_state: ModelState, context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = target().build(int8_state, dataclasses.replace(context(), timing_threads=1))
    monkeypatch.setattr(building, "measured_placement", lambda *_args, **_options: pytest.fail("timed"))
    again = target().build(int8_state, dataclasses.replace(context(), timing_threads=1, placement=first.placement))
    assert again.placement == first.placement
    assert [file.sha256 for file in again.files] == [file.sha256 for file in first.files]


def test_model_that_is_slower_in_int8_is_written_in_float(
    int8_state: ModelState, context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_float(*_args: object, **_options: object) -> MeasuredPlacement:
        placement = Placement(
            target=find_spelling(target().spelling or "x86").placement_target,
            integer_nodes=(),
            float_nodes={node.name or "": "slow" for node in int8_state.model.graph},
            decided_by="measured",
        )
        return MeasuredPlacement(placement=placement, float_ms=1.0, integer_ms=2.0)

    monkeypatch.setattr(building, "measured_placement", all_float)
    artifact = target().build(int8_state, dataclasses.replace(context(), timing_threads=1))
    expected = ort_runner_from_model(int8_state.model).run(IMAGES)["y"]
    np.testing.assert_array_equal(target().runner(artifact).run(IMAGES)["y"], expected)
    assert any(finding.severity == "warning" and "does not pay" in finding.text for finding in artifact.findings)


def test_integer_operators_are_refused_for_runtimes_without_them() -> None:
    with pytest.raises(ValidationError, match="placement 'everywhere' is not"):
        OnnxTargetConfig(int8_format="qoperator", placement="everywhere")


def test_integer_operators_are_refused_for_a_plan_without_ranges(int8_state: ModelState, context: MakeContext) -> None:
    assert int8_state.quantization is not None
    plan = dataclasses.replace(int8_state.quantization, activations={}, mode="dynamic")
    state = dataclasses.replace(int8_state, quantization=plan)
    with pytest.raises(TargetError, match="the plan's mode is 'dynamic'"):
        OnnxTarget(OnnxTargetConfig(int8_format="qoperator")).build(state, context())
