"""A result that is larger, slower or full of zeros is never passed over in silence."""

from __future__ import annotations

import math
from dataclasses import replace

from onnxprune.contracts import Fidelity, LatencyRatio, LatencySummary, Measurements, ModelFigures, OutputDifference
from onnxprune.pipeline.verdict import result_warnings

SUMMARY = LatencySummary(p50_ms=1, p90_ms=1, p99_ms=1, num_runs=10, num_warmup=1, threads=1)
FIGURES = ModelFigures(
    parameters=1000, nonzero_parameters=1000, macs=1000, weight_bytes=4000, num_nodes=3, sparse_bytes={"coo": 12000}
)
SOURCE = Measurements(target="source", size_bytes=5000)


def latency(ratio: float, low: float, high: float) -> LatencyRatio:
    return LatencyRatio(ratio=ratio, low=low, high=high, before=SUMMARY, after=SUMMARY)


def warnings(measured: Measurements, after: ModelFigures = FIGURES) -> tuple[str, ...]:
    return result_warnings(FIGURES, after, SOURCE, [measured])


def test_a_smaller_and_faster_artifact_gives_no_warning() -> None:
    assert warnings(Measurements(target="onnx", size_bytes=2000, latency=latency(2.0, 1.9, 2.1))) == ()


def test_a_larger_artifact_is_said_to_be_larger() -> None:
    (text,) = warnings(Measurements(target="onnx", size_bytes=6000))
    assert "larger than the source (6,000 against 5,000 bytes)" in text


def test_outputs_of_which_nothing_was_compared_are_named() -> None:
    nothing = OutputDifference(max_abs=0.0, max_rel=0.0, cosine=1.0, snr_db=math.inf, is_compared=False)
    whole = replace(nothing, per_output={"odd": nothing, "fine": replace(nothing, is_compared=True)})
    fidelity = Fidelity(difference=whole, num_samples=4, data="random")
    (text,) = warnings(Measurements(target="onnx", size_bytes=2000, fidelity=fidelity))
    assert "onnx: output 'odd' is NaN or infinite throughout" in text


def test_an_artifact_that_is_slower_beyond_noise_is_said_to_be_slower() -> None:
    (text,) = warnings(
        Measurements(target="onnx", size_bytes=2000, latency=latency(0.5, 0.4, 0.8), latency_on_target=True)
    )
    assert "2.00x its latency (95 % interval 1.25 to 2.50)" in text


def test_a_ratio_within_two_percent_of_one_is_not_called_slower() -> None:
    assert (
        warnings(
            Measurements(target="onnx", size_bytes=2000, latency=latency(0.97, 0.95, 0.99), latency_on_target=True)
        )
        == ()
    )


def test_a_time_taken_on_another_machine_is_no_verdict() -> None:
    assert warnings(Measurements(target="onnx", size_bytes=2000, latency=latency(0.5, 0.4, 0.8))) == ()


def test_zeros_are_not_sold_as_savings() -> None:
    after = replace(FIGURES, nonzero_parameters=400, sparse_bytes={"coo": 4800, "bitmap": 1725})
    (text,) = warnings(Measurements(target="onnx", size_bytes=5000), after)
    assert "60% of the weights are zeros" in text
    assert "(bitmap) the weights would take 1,725 bytes instead of 4,000" in text


def test_zeros_are_left_to_a_target_that_says_itself_what_they_are_worth() -> None:
    after = replace(FIGURES, nonzero_parameters=400)
    both = [Measurements(target=target, size_bytes=5000) for target in ("tflite", "onnx")]
    assert result_warnings(FIGURES, after, SOURCE, both[:1], sparse_targets={"tflite"}) == ()
    (text,) = result_warnings(FIGURES, after, SOURCE, both, sparse_targets={"tflite"})
    assert text.startswith("onnx: 60% of the weights are zeros")


def test_zeros_that_were_there_before_are_not_the_runs_doing() -> None:
    with_zeros = replace(FIGURES, nonzero_parameters=400)
    assert result_warnings(with_zeros, with_zeros, SOURCE, [Measurements(target="onnx", size_bytes=5000)]) == ()
