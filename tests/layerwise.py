"""Networks and runs for the tests of the passes that win back accuracy around int8."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx import helper

from onnxprune.contracts import Batch, CanonicalModel, ModelState, Pass, PassContext, PassOutcome, QuantizationPlan
from onnxprune.graph.verify import verify
from onnxprune.passes.harness import plan_from_json, plan_to_json, run_pass
from onnxprune.passes.quant.simulate import simulated
from onnxprune.runtime.sessions import ort_runner_from_model
from tests.builders import canonical, proto_of
from tests.quantization import ArraySource, plan_for, signal_to_noise_db

SHAPE = (1, 4, 8, 8)


def normal(*shape: int, seed: int = 3, scale: float = 0.3) -> npt.NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def images(count: int = 24, *, seed: int = 0, shape: tuple[int, ...] = SHAPE, mean: float = 0.7) -> ArraySource:
    """Samples whose channels have means, as real ones do."""
    rng = np.random.default_rng(seed)
    return ArraySource(tuple({"x": (rng.standard_normal(shape) + mean).astype(np.float32)} for _ in range(count)))


def mobile_net(*, spread: float = 1.0, activation: str = "Relu", with_bias: bool = True) -> CanonicalModel:
    """x [1,4,8,8] -> 1x1 -> act -> depthwise -> act -> 1x1 -> pool -> Gemm -> y [1,5].

    `spread` makes channels of the first two layers differ by up to that factor, without changing the function.
    """
    factors = np.geomspace(1.0, spread, 8).astype(np.float32) if spread > 1 else np.ones(8, np.float32)
    first, depthwise, last = normal(8, 4, 1, 1), normal(8, 1, 3, 3, seed=4), normal(6, 8, 1, 1, seed=5)
    weights = {
        "w1": first * factors.reshape(-1, 1, 1, 1),
        "w2": depthwise / factors.reshape(-1, 1, 1, 1),
        "w3": last,
        "w4": normal(5, 6, seed=6),
        "b4": normal(5, seed=7),
    }
    if with_bias:
        weights |= {"b1": normal(8, seed=8) * factors, "b2": normal(8, seed=9), "b3": normal(6, seed=10)}

    def inputs(data: str, number: int) -> list[str]:
        return [data, f"w{number}", f"b{number}"] if with_bias else [data, f"w{number}"]

    attributes: dict[str, Any] = {"alpha": 0.1} if activation == "LeakyRelu" else {}
    nodes = [
        helper.make_node("Conv", inputs("x", 1), ["c1"], name="expand"),
        helper.make_node(activation, ["c1"], ["r1"], name="act1", **attributes),
        helper.make_node("Conv", inputs("r1", 2), ["c2"], name="depthwise", group=8, pads=[1] * 4),
        helper.make_node("Relu", ["c2"], ["r2"], name="act2"),
        helper.make_node("Conv", inputs("r2", 3), ["c3"], name="project"),
        helper.make_node("GlobalAveragePool", ["c3"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "w4", "b4"], ["y"], name="head", transB=1),
    ]
    return canonical(proto_of(nodes, inputs={"x": SHAPE}, outputs={"y": [1, 5]}, weights=weights))


def outputs(model: ir.Model, feeds: Batch) -> npt.NDArray[np.float32]:
    """The first output, computed without optimization."""
    runner = ort_runner_from_model(model, optimization="disabled")
    return np.asarray(next(iter(runner.run(feeds).values())))


def largest_change(before: ir.Model, after: ir.Model, source: ArraySource) -> float:
    """Of the float function, relative to the largest output."""
    pairs = [(outputs(before, batch), outputs(after, batch)) for batch in source]
    return max(float(np.abs(a - b).max()) for a, b in pairs) / max(float(np.abs(a).max()) for a, _ in pairs)


def int8_snr_db(reference: ir.Model, model: ir.Model, plan: QuantizationPlan, source: ArraySource) -> float:
    """Signal to noise of `model` with the numbers of `plan`, against the float `reference`."""
    rounded = simulated(model, plan)
    pairs = [(outputs(reference, batch), outputs(rounded, batch)) for batch in source]
    return signal_to_noise_db(np.stack([a for a, _ in pairs]), np.stack([b for _, b in pairs]))


def quantized(model: CanonicalModel, source: ArraySource, **config: Any) -> ModelState:
    return ModelState(model=model, quantization=plan_for(model, source, **config))


def carried_out(
    pass_: Pass[Any, Any], state: ModelState, source: ArraySource | None = None, *, seed: int = 0
) -> PassOutcome:
    """`run_pass`; the caller's model is shown to be untouched, and the plan to survive JSON with the same result."""
    before = ir.to_proto(state.model).SerializeToString(deterministic=True)
    outcome = run_pass(pass_, state, PassContext(calibration=source, seed=seed))
    verify(outcome.state.model)
    assert ir.to_proto(state.model).SerializeToString(deterministic=True) == before
    plan = plan_from_json(pass_, plan_to_json(pass_, outcome.plan))
    again = run_pass(pass_, state, PassContext(), plan=plan)
    assert _bytes(again.state.model) == _bytes(outcome.state.model)
    return outcome


def _bytes(model: ir.Model) -> bytes:
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))
