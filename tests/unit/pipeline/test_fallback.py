"""What a fallback costs, and whether artifacts keep what the simulation promised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxprune.contracts import (
    Artifact,
    FallbackRecord,
    Measurements,
    ModelState,
    NullProgress,
    PassConfig,
    Runner,
    Score,
    Target,
    TargetContext,
)
from onnxprune.pipeline.fallback import FallbackJob, promise_warnings, settled_early_warnings, with_fallback_costs
from onnxprune.pipeline.measure import Yardstick
from onnxprune.recipe import MeasureOptions
from onnxprune.runtime.sessions import ort_runner_from_model
from tests.builders import conv_net
from tests.quantization import normal_batches, plan_for

SOURCE = normal_batches((1, 3, 8, 8))
MODEL = conv_net(batch=1)
PLAN = plan_for(MODEL, SOURCE)
RECORD = FallbackRecord(
    goal="max_drop",
    limit=0.01,
    kind="float",
    before=0.05,
    reached=0.008,
    met=True,
    evaluations=7,
    num_layers=1,
    float_score=Score(metric="top1", value=0.9),
    nodes={"block/conv": "returned to float"},
)
ARTIFACT = Artifact(target="fake", folder=Path(), files=(), inputs=(), outputs=())
MEASURED = Measurements(target="fake", size_bytes=1)


class NoisyRunner:
    """The float model with its outputs off by a part of themselves."""

    def __init__(self, part: float) -> None:
        self._runner = ort_runner_from_model(MODEL)
        self._part = part
        self.inputs, self.outputs = self._runner.inputs, self._runner.outputs

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        return {name: array * np.float32(1 + self._part) for name, array in self._runner.run(feeds).items()}


class FakeTarget(Target[PassConfig]):
    """Remembers what it builds."""

    name, summary, config_type = "fake", "for tests", PassConfig

    def __init__(self, *, is_host: bool = True, noise: float = 0.0) -> None:
        super().__init__(PassConfig())
        self._is_host = is_host
        self._noise = noise
        self.built: list[ModelState] = []

    @property
    def is_host(self) -> bool:
        return self._is_host

    def build(self, state: ModelState, context: TargetContext) -> Artifact:
        self.built.append(state)
        return ARTIFACT

    def runner(self, artifact: Artifact, *, threads: int = 1, custom_op_libraries: tuple[Path, ...] = ()) -> Runner:
        return NoisyRunner(self._noise)


def state(record: FallbackRecord | None = RECORD) -> ModelState:
    returned = record.nodes if record is not None else {}
    return ModelState(model=MODEL, quantization=replace(PLAN, fallback=record, returned_nodes=returned))


def yardstick(**options: Any) -> Yardstick:
    return Yardstick(
        source=ort_runner_from_model(MODEL),
        batches=SOURCE.batches,
        data="calibration",
        evaluator=None,
        source_score=None,
        options=MeasureOptions(min_seconds=0.01, **options),
        custom_op_libraries=(),
    )


def costs(target: FakeTarget, *, of: ModelState | None = None, **options: Any) -> Measurements:
    job = FallbackJob(of or state(), yardstick(**options), 0, NullProgress())
    (measured,) = with_fallback_costs([MEASURED], [ARTIFACT], [target], job)
    return measured


def test_twin_is_built_from_the_plan_without_the_fallback_and_timed_against_the_artifact() -> None:
    target = FakeTarget()
    cost = costs(target).fallback
    assert cost is not None
    assert cost.num_layers == 1
    assert cost.latency is not None
    assert cost.latency.before.p50_ms > 0
    (twin,) = target.built
    assert twin.quantization == PLAN


@pytest.mark.parametrize(
    ("target", "options", "reason"),
    [
        (FakeTarget(is_host=False), {}, "is not the target"),
        (FakeTarget(), {"latency": False}, "latency is not measured in this run"),
    ],
    ids=["elsewhere", "switched-off"],
)
def test_what_can_not_be_timed_says_why_and_builds_nothing(
    target: FakeTarget, options: dict[str, Any], reason: str
) -> None:
    cost = costs(target, **options).fallback
    assert cost is not None
    assert cost.latency is None
    assert reason in cost.not_measured_reason
    assert not target.built


@pytest.mark.parametrize("of", [state(None), state(replace(RECORD, nodes={}, num_layers=0)), ModelState(model=MODEL)])
def test_without_a_fallback_there_is_no_cost(of: ModelState) -> None:
    target = FakeTarget()
    assert costs(target, of=of).fallback is None
    assert not target.built


def warnings(record: FallbackRecord, measured: Measurements, *, noise: float = 0.0) -> tuple[str, ...]:
    return promise_warnings(state(record), [ARTIFACT], [FakeTarget(noise=noise)], [measured], yardstick())


def test_artifact_that_scores_worse_than_the_simulation_promised_is_named() -> None:
    (text,) = warnings(RECORD, replace(MEASURED, score=Score(metric="top1", value=0.88)))
    assert "fake: the artifact misses max_drop 0.01" in text
    assert "top1 is worse by 0.02" in text
    assert warnings(RECORD, replace(MEASURED, score=Score(metric="top1", value=0.89))) == ()


def test_outputs_of_the_artifact_are_held_against_the_signal_to_noise_ratio() -> None:
    record = replace(RECORD, goal="min_snr_db", limit=30.0, float_score=None)
    (text,) = warnings(record, MEASURED, noise=0.1)
    assert "its outputs keep 20.0 dB" in text
    assert warnings(record, MEASURED, noise=0.01) == ()


def test_goal_that_even_the_plan_misses_is_a_warning_of_its_own() -> None:
    (text,) = warnings(replace(RECORD, met=False), MEASURED)
    assert "max_drop 0.01 of pass 'quant' is missed" in text


@pytest.mark.parametrize(("num_layers", "said"), [(1, "1 layer left 8 bits"), (3, "3 layers left 8 bits")])
def test_goal_that_was_settled_before_a_repair_is_a_warning_that_says_what_to_do(num_layers: int, said: str) -> None:
    (text,) = settled_early_warnings(state(replace(RECORD, num_layers=num_layers)), ["adaround"])
    assert f"{said} before 'adaround' could repair them" in text
    assert "Run once without the goal" in text


@pytest.mark.parametrize(
    ("of", "repaired_by"),
    [
        (state(), ()),
        (state(replace(RECORD, nodes={}, num_layers=0)), ("adaround",)),
        (state(None), ("adaround",)),
        (ModelState(model=MODEL), ("adaround",)),
    ],
    ids=["no-repair", "nothing-left", "no-goal", "not-quantized"],
)
def test_goal_that_took_nothing_from_a_repair_is_no_warning(of: ModelState, repaired_by: tuple[str, ...]) -> None:
    assert settled_early_warnings(of, repaired_by) == ()
