"""onnx-neural-compressor itself as the engine of `quant`, in the interpreter that the environment names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from onnxprune.contracts import CanonicalModel, ModelState, PassContext, QuantizationPlan
from onnxprune.errors import PassError
from onnxprune.passes.quant import QuantConfig, QuantPass
from onnxprune.passes.quant import neural_compressor as engine
from onnxprune.targets import qdq
from tests.builders import canonical, conv_net, proto_of
from tests.quantization import ArraySource, normal_batches, plan_for, run, signal_to_noise_db

VARIABLE = "ONNXPRUNE_NEURAL_COMPRESSOR_PYTHON"
PYTHON = os.environ.get(VARIABLE, "")
DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits"
SOURCE = normal_batches((1, 3, 8, 8))

pytestmark = pytest.mark.skipif(
    not PYTHON, reason=f"needs onnx-neural-compressor: 'make test-neural-compressor' sets {VARIABLE}"
)


def plan(model: CanonicalModel, source: ArraySource = SOURCE, **settings: object) -> QuantizationPlan:
    config = QuantConfig(engine="neural-compressor", engine_python=PYTHON, threads=1, **settings)
    return QuantPass(config).plan(ModelState(model=model), PassContext(calibration=source))


@pytest.fixture(scope="module")
def minmax() -> QuantizationPlan:
    return plan(conv_net(batch=1))


def test_probe_tells_versions_and_what_is_read() -> None:
    probe = engine.probe_engine(PYTHON)

    assert probe.engine_version == "1.0"
    assert probe.versions["numpy"].startswith("1.")
    assert (probe.max_opset, probe.max_ir_version) >= (21, 10)
    assert probe.files
    assert all(path.is_file() for path in probe.files)


def test_minmax_of_the_engine_and_ours_are_the_same_numbers(minmax: QuantizationPlan) -> None:
    ours, theirs = plan_for(conv_net(batch=1), SOURCE), minmax

    assert theirs.method == "neural-compressor 1.0 minmax"
    assert theirs.calibration_hash == ours.calibration_hash
    assert set(theirs.weights) == set(ours.weights)
    for name, weight in theirs.weights.items():
        np.testing.assert_allclose(weight.scales, ours.weights[name].scales, rtol=1e-6)
    assert set(theirs.activations) == set(ours.activations)
    for name, found in theirs.activations.items():
        assert found.scale == pytest.approx(ours.activations[name].scale, rel=1e-6), name
        assert abs(found.zero_point - ours.activations[name].zero_point) <= 1, name


def test_percentile_is_the_one_that_was_asked_for() -> None:
    found = plan(conv_net(batch=1), calibration_method="percentile", percentile=90.0)

    data = np.concatenate([batch["x"].reshape(-1) for batch in SOURCE.batches])
    # The engine's histogram has 2048 bins, and ends at the bin that reaches the share.
    assert found.activations["x"].scale == pytest.approx(np.ptp(np.percentile(data, [5, 95])) / 255, rel=0.02)
    assert found.method == "neural-compressor 1.0 percentile 90"


def test_entropy_is_the_engines_which_gives_what_minmax_does(minmax: QuantizationPlan) -> None:
    found = plan(conv_net(batch=1), calibration_method="entropy")

    assert found.activations == minmax.activations
    assert found.method == "neural-compressor 1.0 entropy"


def test_weights_get_one_scale_on_request_and_activations_a_middle_zero_point() -> None:
    found = plan(conv_net(batch=1), per_channel=False, engine_activation_symmetric=True)

    assert {(weight.axis, len(weight.scales)) for weight in found.weights.values()} == {(None, 1)}
    assert found.activations["x"].zero_point == 0
    # Behind a Relu there is nothing below zero, so our rules use all integers for what is above.
    assert found.activations["r1"].zero_point == -128
    assert "r1" in found.adjusted


def test_excluded_nodes_and_operators_that_are_not_named_stay_float() -> None:
    found = plan(conv_net(batch=1), exclude=("block/conv",), engine_op_types=("Conv", "Relu"))

    assert found.excluded_nodes["block/conv"] == "excluded by 'block/conv'"
    assert "neural-compressor left it in float" in found.excluded_nodes["head/gemm"]
    assert set(found.weights) == {"stem.weight"}


def test_last_matmul_stays_float_on_request() -> None:
    rng = np.random.default_rng(1)
    model = canonical(
        proto_of(
            [
                helper.make_node("MatMul", ["x", "w"], ["a"], name="first"),
                helper.make_node("MatMul", ["a", "v"], ["y"], name="last"),
            ],
            inputs={"x": [1, 8]},
            outputs={"y": [1, 4]},
            weights={name: rng.standard_normal((8, size)).astype(np.float32) for name, size in (("w", 8), ("v", 4))},
        )
    )
    source = normal_batches((1, 8))

    assert set(plan(model, source).weights) == {"w", "v"}
    assert set(plan(model, source, engine_quantize_last_matmul=False).weights) == {"w"}


def test_names_that_the_engine_would_invent_itself_do_no_harm() -> None:
    weight = np.random.default_rng(2).standard_normal((4, 3, 3, 3)).astype(np.float32)
    model = canonical(
        proto_of(
            [
                helper.make_node("Conv", ["x", "x_scale"], ["x_quantized"], name="(conv"),
                helper.make_node("Relu", ["x_quantized"], ["x_zero_point"], name="(conv_quant"),
                helper.make_node("Conv", ["x_zero_point", "v"], ["y"], name="last[0]"),
            ],
            inputs={"x": [1, 3, 8, 8]},
            outputs={"y": [1, 8, 6, 6]},
            weights={"x_scale": weight, "v": np.ones((8, 4, 1, 1), np.float32)},
        )
    )
    assert set(plan(model).activations) == {"x", "x_zero_point", "y"}


def test_spelled_model_computes_what_the_float_one_does(minmax: QuantizationPlan) -> None:
    model = conv_net(batch=1)
    spelled = qdq.spell(model, minmax, qdq.place(model, minmax, "arm64"), "arm64")
    feeds = SOURCE.batches[0]
    assert signal_to_noise_db(run(model, feeds)[0], run(spelled, feeds)[0]) > 25.0


def test_opset_that_its_runtime_does_not_read_is_lowered(
    minmax: QuantizationPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = engine.probe_engine(PYTHON).model_copy(update={"max_opset": 18, "max_ir_version": 8})
    monkeypatch.setattr(engine, "probe_engine", lambda python: old)
    model = conv_net(batch=1)

    assert plan(model).activations == minmax.activations
    assert model.opset_imports[""] == 20


def test_operator_that_it_does_not_know_is_an_error_with_those_it_knows() -> None:
    with pytest.raises(PassError, match=r"does not know the operator 'Conf'\. It knows: FusedConv, Conv, "):
        plan(conv_net(batch=1), engine_op_types=("Conf",))


def test_run_of_the_detector_reports_the_engine_like_any_other(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-c", "from onnxprune.cli.main import main; main()"),
        *("run", str(DIGITS / "models" / "detector.onnx"), "--passes", "quant"),
        *("--calibration", str(DIGITS / "images" / "calibration"), "--set", "preprocess.scale=0.00392156862745098"),
        *("--set", "quant.num_samples=8", "--set", "quant.calibration_method=percentile"),
        *("--set", "quant.engine=neural-compressor", "--set", f"quant.engine_python={PYTHON}"),
        *("--no-measure", "--json", "--out", str(tmp_path / "out")),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)

    assert ended.returncode == 0, ended.stderr
    (quant,) = [entry for entry in json.loads(ended.stdout)["passes"] if entry["pass_name"] == "quant"]
    assert "neural-compressor 1.0 percentile 99.99, 8 samples" in quant["summary"]
    assert quant["figures"]["quantized_weights"] > 10
