"""A trial quantization, for steps that stand before `quant` and must know whether they help."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from onnxprune.contracts import Batch, CanonicalModel, ModelState, NullProgress, PassContext, QuantizationPlan
from onnxprune.errors import PassError
from onnxprune.passes.layerwise.gain import BEST_DB, simulated_snr_db
from onnxprune.passes.layerwise.samples import SampleSplit, count_samples
from onnxprune.passes.quant.quant_pass import QuantConfig, QuantPass

__all__ = ["trial_plan", "trial_snr_db"]


@dataclass(frozen=True, slots=True)
class _HeldBatches:
    """A `CalibrationSource` of batches in memory."""

    batches: tuple[Batch, ...]

    @property
    def num_samples(self) -> int:
        return count_samples(self.batches)

    @property
    def content_hash(self) -> str:
        digest = hashlib.sha256()
        for batch in self.batches:
            for name in sorted(batch):
                digest.update(batch[name].tobytes())
        return digest.hexdigest()

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def trial_plan(
    model: CanonicalModel, split: SampleSplit, context: PassContext, *, per_channel: bool, weight_bits: int
) -> QuantizationPlan | None:
    """What `quant` would plan for `model` from the samples to decide with; None where it finds nothing to quantize."""
    pass_ = QuantPass(QuantConfig(per_channel=per_channel, weight_bits=weight_bits))
    quiet = replace(context, calibration=_HeldBatches(split.fit), progress=NullProgress())
    try:
        return pass_.plan(ModelState(model=model), quiet)
    except PassError:
        return None


def trial_snr_db(
    reference: CanonicalModel,
    changed: CanonicalModel,
    split: SampleSplit,
    context: PassContext,
    *,
    per_channel: bool,
    weight_bits: int,
) -> float:
    """Signal to noise of the outputs of `changed`, quantized, against the float `reference`, on the judging samples."""
    plan = trial_plan(changed, split, context, per_channel=per_channel, weight_bits=weight_bits)
    return BEST_DB if plan is None else simulated_snr_db(reference, changed, plan, split.judge, context)
