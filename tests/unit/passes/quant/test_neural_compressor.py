"""The engine neural-compressor from this side: what it is given, what is accepted of it, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import helper
from pydantic import ValidationError

from onnxprune.contracts import CanonicalModel, ModelState, PassContext, QuantizationPlan
from onnxprune.errors import BadDataError, OnnxPruneError, PassError, PreconditionError
from onnxprune.passes.harness import plan_from_json, plan_to_json, run_pass
from onnxprune.passes.quant import QuantConfig, QuantPass
from onnxprune.passes.quant import neural_compressor as engine
from onnxprune.recipe import decode_recipe, read_recipe_file
from tests import fake_engine
from tests.builders import canonical, conv_net, proto_of
from tests.quantization import ArraySource, normal_batches

SOURCE = normal_batches((1, 3, 8, 8))


@pytest.fixture(autouse=True)
def _fake_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "CHILD_SCRIPT", Path(fake_engine.__file__))
    monkeypatch.delenv("FAKE_ENGINE", raising=False)
    # Its answer is kept for the tests that follow.
    engine.probe_engine(sys.executable)


def config(**settings: object) -> QuantConfig:
    return QuantConfig(**{"engine": "neural-compressor", "engine_python": sys.executable, "threads": 1, **settings})


def plan(model: CanonicalModel, source: ArraySource = SOURCE, **settings: object) -> QuantizationPlan:
    return QuantPass(config(**settings)).plan(ModelState(model=model), PassContext(calibration=source))


def test_engines_scales_become_a_plan_with_its_name_and_the_datas_hash() -> None:
    found = plan(conv_net(batch=1))

    # Symmetric around zero in the engine; behind a Relu the range ends at zero, so the steps are half as wide.
    assert (found.activations["x"].scale, found.activations["x"].zero_point) == (np.float32(0.05), 0)
    assert found.activations["r1"].scale == pytest.approx(0.05 * 127 / 255, rel=1e-6)
    assert found.activations["r1"].zero_point == -128
    assert "the range ends where 'stem/relu' does" in found.adjusted["r1"]
    assert found.method == "neural-compressor 1.0 minmax"
    assert (found.num_samples, found.calibration_hash) == (8, SOURCE.content_hash)
    assert found.weights["stem.weight"].axis == 0
    assert not found.excluded_nodes


def test_last_layer_whose_channels_cannot_share_a_scale_stays_float_as_with_our_own_calibration() -> None:
    weight = np.random.default_rng(3).standard_normal((8, 3, 3, 3)).astype(np.float32)
    weight[:4] *= 1000.0  # boxes in pixels beside scores
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="conv", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["r"], name="relu"),
        helper.make_node("Conv", ["r", "v"], ["y"], name="head"),
    ]
    head = np.zeros((8, 8, 1, 1), np.float32)
    head[np.arange(8), np.arange(8)] = 1.0
    model = canonical(
        proto_of(nodes, inputs={"x": [1, 3, 8, 8]}, outputs={"y": [1, 8, 8, 8]}, weights={"w": weight, "v": head})
    )

    found = plan(model)

    assert "can't share a scale" in found.excluded_nodes["head"]
    assert set(found.weights) == {"w"}


def test_report_says_which_scales_were_changed_and_the_plan_survives_json() -> None:
    pass_ = QuantPass(config())
    outcome = run_pass(pass_, ModelState(model=conv_net(batch=1)), PassContext(calibration=SOURCE))

    changes = [change.what for change in outcome.report.changes if change.where == "r1"]
    assert any("the engine's scale 0.05" in what for what in changes)
    assert any("scales of the engine were changed" in note for note in outcome.report.notes)
    assert plan_from_json(pass_, plan_to_json(pass_, outcome.plan)) == outcome.plan


def test_samples_are_handed_over_in_files_up_to_the_number_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict] = []
    real = engine.call_script

    def watched(python: Path, script: str, job: dict, **others: object) -> object:
        if job["task"] == "quantize":
            folder: Path = others["folder"]  # type: ignore[assignment]
            arrays = [np.load(folder / "samples" / f"{number}.npz") for number in range(3)]
            assert not (folder / "samples" / "3.npz").exists()
            np.testing.assert_array_equal(arrays[2]["v0"], SOURCE.batches[2]["x"])
            seen.append(job)
        return real(python, script, job, **others)

    monkeypatch.setattr(engine, "call_script", watched)
    found = plan(conv_net(batch=1), num_samples=3, exclude=("head",), engine_op_types=("Conv",))

    assert found.num_samples == 3
    (job,) = seen
    assert (job["num_batches"], job["op_types"]) == (3, ["Conv"])
    # Nodes by place: 'head/gemm' is the last of eight, and 'head' is the module around it and its neighbours.
    assert job["nodes_to_exclude"] == ["n5", "n6", "n7"]
    assert found.excluded_nodes["head/gemm"] == "excluded by 'head'"


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("crash", "neural-compressor crashed in native code"),
        ("killed", "killed by SIGKILL"),
        ("hang", "did not finish within 3 s"),
        ("garbage", "without a proper answer"),
        ("memory", "ran out of memory"),
        ("no model", r"can't be read: There is no file 'quantized.onnx'"),
        ("no onnx", "gave back a model that can't be read"),
    ],
)
def test_engine_that_fails_is_an_error_that_says_how(
    behaviour: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_ENGINE", behaviour)
    with pytest.raises(PassError, match=message):
        plan(conv_net(batch=1), engine_timeout_s=3.0 if behaviour == "hang" else 60.0)


def test_engines_message_names_what_the_user_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_ENGINE", "fails at a node")
    with pytest.raises(PassError, match="no parameters for stem/relu and x"):
        plan(conv_net(batch=1))


def test_lack_of_memory_is_followed_by_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_ENGINE", "memory")
    with pytest.raises(PassError) as caught:
        plan(conv_net(batch=1), calibration_method="percentile")
    assert "keeps every activation of every sample" in caught.value.hint


def test_unknown_kind_of_error_in_an_answer_is_still_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_ENGINE", "unknown error")
    with pytest.raises(OnnxPruneError, match="odd"):
        plan(conv_net(batch=1))


def test_tensor_that_the_engine_finds_not_finite_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_ENGINE", "nan")
    with pytest.raises(BadDataError, match="tensor 'x' not finite"):
        plan(conv_net(batch=1))


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("lacks", "lacks 'scipy'"),
        ("other version", "has onnx-neural-compressor 2.1"),
        ("old", "reads no opset 18"),
        ("nonsense", "makes no sense"),
        ("garbage", "must name a Python interpreter that has onnx-neural-compressor"),
    ],
)
def test_unusable_interpreter_is_refused_before_anything_is_calibrated(
    behaviour: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_ENGINE", behaviour)
    engine._probe.cache_clear()
    pass_ = QuantPass(config())
    with pytest.raises(PreconditionError, match=message):
        pass_.check_files(ModelState(model=conv_net(batch=1)))
    assert pass_.files_read == ()


@pytest.mark.parametrize("content", [None, "no program"], ids=["missing", "not executable"])
def test_interpreter_that_is_none_is_refused(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "python"
    if content is not None:
        path.write_text(content)
    with pytest.raises(PreconditionError, match="must name a Python interpreter") as caught:
        engine.probe_engine(str(path))
    assert "pip install onnx-neural-compressor==1.0" in caught.value.hint


def test_plan_that_is_given_needs_no_engine(tmp_path: Path) -> None:
    given = plan(conv_net(batch=1))
    gone = QuantPass(config(engine_python=str(tmp_path / "gone")))
    outcome = run_pass(gone, ModelState(model=conv_net(batch=1)), PassContext(), plan=given)
    assert outcome.state.quantization == given


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine_python": None}, "'engine_python' must name a Python interpreter"),
        ({"weight_bits": 7}, "'weight_bits' can't be honoured"),
        ({"calibration_method": "mse"}, "'mse' is not one that engine = 'neural-compressor' has"),
        ({"engine_timeout_s": 0.0}, "greater than 0"),
        ({"engine": "onnxprune", "engine_python": None, "engine_op_types": ("Conv",)}, "'engine_op_types' acts only"),
        ({"engine": "onnxprune"}, "'engine_python' acts only"),
    ],
)
def test_settings_that_would_not_act_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**settings)


def test_sample_that_is_not_finite_is_refused_before_the_engine_sees_it() -> None:
    bad = {"x": np.full((1, 3, 8, 8), np.inf, dtype=np.float32)}
    with pytest.raises(BadDataError, match="sample 1 holds 192 numbers in input 'x'"):
        plan(conv_net(batch=1), ArraySource((SOURCE.batches[0], bad)))


def test_no_samples_and_custom_operators_are_refused() -> None:
    with pytest.raises(BadDataError, match="hold no sample"):
        plan(conv_net(batch=1), ArraySource(()))
    context = PassContext(calibration=SOURCE, custom_op_libraries=(Path("ops.so"),))
    with pytest.raises(PreconditionError, match="custom operators"):
        QuantPass(config()).plan(ModelState(model=conv_net(batch=1)), context)


def test_interpreters_path_counts_from_the_recipe_and_its_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "nc").mkdir()
    (tmp_path / "nc" / "python").symlink_to(sys.executable)
    recipe = tmp_path / "edge.toml"
    recipe.write_text(
        'schema = 1\npasses = [{ name = "quant", engine = "neural-compressor", engine_python = "nc/python" }]\n'
    )

    (step,) = decode_recipe(read_recipe_file(recipe)).steps

    assert step.config.engine_python == str(tmp_path / "nc" / "python")
