"""What a step does to the model's outputs: the ratio of signal to noise of a quantized model against the float one.

For each output, over all samples together, noise / signal = sum (a - r)^2 / sum r^2. Their mean over the outputs, in
decibels, is the figure: an output that is wholly wrong counts as much as it should, and a good one can't hide it.

An output that comes out of a Softmax or Sigmoid is judged before it. Behind it nearly all samples agree to many digits,
and the few that don't decide the figure alone: on a keyword spotter, steps that gained 0.6 dB before the Softmax
seemed to win or lose up to 10 dB behind it, depending on the 31 samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import Batch, PassContext, QuantizationPlan
from onnxprune.passes.quant.simulate import simulated
from onnxprune.runtime.sessions import ort_runner_from_model

__all__ = ["BEST_DB", "WORTH_DB", "Gain", "NoiseMeter", "judge_step", "output_snr_db", "simulated_snr_db"]

BEST_DB = 200.0
"""What equal outputs count as: beyond float32's resolution, and a number that JSON can hold."""

WORTH_DB = 0.2
"""A gain below this is within what other samples would change, and no reason to touch a model before `quant`."""

_SATURATING = frozenset({"Softmax", "LogSoftmax", "Sigmoid"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """Signal-to-noise ratio of the outputs, int8 against float, before and after a step; `measured_on` says where."""

    before_db: float
    after_db: float
    measured_on: str

    @property
    def is_worse(self) -> bool:
        """True when the step took more than it gave."""
        return self.after_db < self.before_db

    @property
    def is_worth_it(self) -> bool:
        """True when the step gave more than chance might."""
        return self.after_db >= self.before_db + WORTH_DB

    @property
    def is_visible(self) -> bool:
        """True when the two figures differ as they are shown."""
        return f"{self.before_db:.1f}" != f"{self.after_db:.1f}"

    @property
    def text(self) -> str:
        """For a report's line."""
        return f"{self.before_db:.1f} -> {self.after_db:.1f} dB on {self.measured_on}"

    @property
    def figures(self) -> dict[str, float]:
        """For a report's figures."""
        return {"snr_before_db": self.before_db, "snr_after_db": self.after_db}


class NoiseMeter:
    """Accumulates signal and noise of one tensor, or of one layer."""

    def __init__(self) -> None:
        self.signal = 0.0
        self.noise = 0.0

    def add(self, reference: npt.NDArray[Any], actual: npt.NDArray[Any]) -> None:
        """Count one batch; both have one shape."""
        expected = reference.astype(np.float64).ravel()
        error = actual.astype(np.float64).ravel() - expected
        kept = np.isfinite(expected) & np.isfinite(error)
        self.signal += float(expected[kept] @ expected[kept])
        self.noise += float(error[kept] @ error[kept])
        if not np.isfinite(actual[np.isfinite(reference)]).all():
            self.noise = math.inf

    @property
    def relative_noise(self) -> float:
        """Noise over signal; infinite where there is noise without a signal."""
        if self.noise == 0.0:
            return 0.0
        return self.noise / self.signal if self.signal > 0.0 else math.inf

    @property
    def snr_db(self) -> float:
        """In decibels, between -200 and 200."""
        return _decibel(self.relative_noise)


def output_snr_db(
    reference: ir.Model, actual: ir.Model, batches: Iterable[Batch], *, custom_op_libraries: Sequence[Path] = ()
) -> float:
    """The figure of this file for `actual` against `reference`, which has the same nodes and perhaps more.

    Outputs of integers, or of another length, are left out; `BEST_DB` where no output can be compared.
    """
    pairs = _judged_tensors(reference, actual)
    expected, found = (
        ort_runner_from_model(
            model,
            custom_op_libraries=custom_op_libraries,
            extra_outputs=_inner(model, [pair[side] for pair in pairs]),
        )
        for side, model in enumerate((reference, actual))
    )
    meters: dict[str, NoiseMeter] = {}
    for batch in batches:
        wanted, results = expected.run(batch), found.run(batch)
        for name, twin in pairs:
            array = wanted[name]
            if np.issubdtype(array.dtype, np.floating) and results[twin].shape == array.shape:
                meters.setdefault(name, NoiseMeter()).add(array, results[twin])
    known = [meter.relative_noise for meter in meters.values() if meter.signal > 0.0]
    return _decibel(sum(known) / len(known)) if known else BEST_DB


def simulated_snr_db(
    reference: ir.Model, model: ir.Model, plan: QuantizationPlan, batches: Iterable[Batch], context: PassContext
) -> float:
    """How well `model`, computed with the rounded numbers of `plan`, repeats the outputs of the float `reference`."""
    return output_snr_db(reference, simulated(model, plan), batches, custom_op_libraries=context.custom_op_libraries)


def judge_step(
    reference: ir.Model,
    changed: ir.Model,
    plan: QuantizationPlan,
    batches: Sequence[Batch],
    context: PassContext,
    *,
    measured_on: str,
) -> Gain:
    """The gain of a step after `quant`, which turned the weights of `reference` into those of `changed`."""
    return Gain(
        before_db=simulated_snr_db(reference, reference, plan, batches, context),
        after_db=simulated_snr_db(reference, changed, plan, batches, context),
        measured_on=measured_on,
    )


def _judged_tensors(reference: ir.Model, actual: ir.Model) -> list[tuple[str, str]]:
    """What is compared: names in `reference` and in `actual`."""
    nodes = {node.name: node for node in actual.graph}
    pairs = []
    for output in reference.graph.outputs:
        name = output.name or ""
        producer = output.producer()
        twin = nodes.get(producer.name) if producer is not None else None
        if producer is not None and twin is not None and producer.op_type in _SATURATING:
            before, after = producer.inputs[0], twin.inputs[0]
            if before is not None and after is not None and before.producer() is not None:
                pairs.append((before.name or "", after.name or ""))
                continue
        pairs.append((name, name))
    return pairs


def _inner(model: ir.Model, names: Iterable[str]) -> list[str]:
    """Those of `names` that are not outputs of the model already."""
    outputs = {value.name for value in model.graph.outputs}
    return [name for name in dict.fromkeys(names) if name not in outputs]


def _decibel(relative_noise: float) -> float:
    if relative_noise <= 0.0:
        return BEST_DB
    if math.isinf(relative_noise):
        return -BEST_DB
    return min(BEST_DB, max(-BEST_DB, -10.0 * math.log10(relative_noise)))
