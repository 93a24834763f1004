"""Streaming calibration: right ranges, whatever the batches and sweeps, and no silent NaN."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from onnxprune.contracts import CanonicalModel
from onnxprune.errors import BadDataError
from onnxprune.passes.quant.accumulate import RangeRule, TensorRange
from onnxprune.passes.quant.calibrate import calibrate
from tests.builders import canonical, proto_of
from tests.quantization import ArraySource


def log_net(batch: int | str = "N") -> CanonicalModel:
    """x [N,4] -> Log -> l -> Relu -> r -> Neg -> y: a negative input makes "l" NaN."""
    return canonical(
        proto_of(
            [
                helper.make_node("Log", ["x"], ["l"], name="log"),
                helper.make_node("Relu", ["l"], ["r"], name="relu"),
                helper.make_node("Neg", ["r"], ["y"], name="neg"),
            ],
            inputs={"x": [batch, 4]},
            outputs={"y": [batch, 4]},
        )
    )


def tensors(model: CanonicalModel, *names: str) -> list:
    values = {value.name: value for value in model.graph.inputs}
    values |= {value.name: value for node in model.graph for value in node.outputs}
    return [values[name] for name in names]


def source(*rows: list[float], batch: int = 1) -> ArraySource:
    array = np.array(rows, dtype=np.float32)
    return ArraySource(tuple({"x": array[start : start + batch]} for start in range(0, len(array), batch)))


ROWS = ([1.0, 2.0, 3.0, 4.0], [0.5, 2.0, 2.0, 2.0], [1.0, 1.0, 8.0, 1.0])


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("max_output_bytes", [1, 1 << 30])
def test_ranges_are_the_extremes_over_all_samples(batch: int, max_output_bytes: int) -> None:
    model = log_net()

    found = calibrate(
        model,
        tensors(model, "x", "l", "r", "y"),
        source(*ROWS, batch=batch),
        max_output_bytes=max_output_bytes,
    )

    assert found.ranges["x"] == TensorRange(low=0.5, high=8.0)
    assert found.ranges["l"].low == pytest.approx(np.log(0.5), rel=1e-6)
    assert found.ranges["r"].low == 0.0
    assert found.ranges["y"].low == pytest.approx(-np.log(8.0), rel=1e-6)
    assert found.num_samples == 3
    assert found.num_sweeps == (3 if max_output_bytes == 1 else 1)


def test_percentile_leaves_the_outlier_out() -> None:
    model = log_net()
    rng = np.random.default_rng(0)
    rows = rng.uniform(1.0, 2.0, size=(500, 4)).astype(np.float32)
    rows[250, 0] = 1000.0
    data = ArraySource(tuple({"x": row[None]} for row in rows))

    found = calibrate(model, tensors(model, "x"), data, rule=RangeRule(method="percentile", percentile=99.0))

    assert found.ranges["x"].high < 2.3


def test_sample_limit_is_kept() -> None:
    model = log_net()

    found = calibrate(model, tensors(model, "x"), source(*ROWS), max_samples=2)

    assert found.num_samples == 2
    assert found.ranges["x"].high == 4.0


def test_nan_inside_the_model_is_refused_with_tensor_and_sample_although_relu_would_hide_it() -> None:
    model = log_net()
    bad = source(ROWS[0], ROWS[1], [1.0, -1.0, 1.0, 1.0], batch=2)

    with pytest.raises(BadDataError, match=r"Calibration sample 2 makes tensor 'l' not finite: 1 of its 4 numbers"):
        calibrate(model, tensors(model, "l", "r"), bad)


def test_sample_within_a_batch_is_named() -> None:
    model = log_net()
    bad = source([1.0, np.inf, 1.0, 1.0], batch=1)
    both = ArraySource(({"x": np.stack([np.ones(4, np.float32), bad.batches[0]["x"][0]])},))

    with pytest.raises(BadDataError, match=r"sample 1 makes input 'x' not finite: 1 of its 8 numbers are infinite"):
        calibrate(model, tensors(model, "x"), both)


def test_no_samples_are_refused() -> None:
    model = log_net()

    with pytest.raises(BadDataError, match="hold no sample"):
        calibrate(model, tensors(model, "x"), ArraySource(()))


def test_tensor_that_no_sample_computes_has_no_range() -> None:
    model = canonical(
        proto_of(
            [
                helper.make_node("NonZero", ["x"], ["n"], name="nonzero"),
                helper.make_node("Transpose", ["n"], ["t"], name="transpose"),
                helper.make_node("GatherND", ["x", "t"], ["y"], name="gather"),
            ],
            inputs={"x": [1, 4]},
            outputs={"y": ["K"]},
        )
    )

    found = calibrate(model, tensors(model, "x", "y"), source([0.0, 0.0, 0.0, 0.0]))

    assert set(found.ranges) == {"x"}
