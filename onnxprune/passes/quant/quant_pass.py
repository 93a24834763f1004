"""The `quant` pass: calibrate, and write the quantization plan. The graph stays float; targets spell the plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import onnx_ir as ir
from pydantic import Field, field_validator

from onnxprune.contracts import (
    Change,
    ModelState,
    Pass,
    PassConfig,
    PassContext,
    PassOutcome,
    PassReport,
    QuantizationPlan,
    Requirement,
    Skip,
)
from onnxprune.errors import PassError, PreconditionError
from onnxprune.graph.scope import require_scopes
from onnxprune.passes.quant.calibrate import CalibrationMethod, calibrate
from onnxprune.passes.quant.candidates import find_candidates
from onnxprune.passes.quant.scales import activation_scales
from onnxprune.passes.quant.weights import weight_scales

__all__ = ["QuantConfig", "QuantPass"]


class QuantConfig(PassConfig):
    """How to calibrate, and what to keep in float."""

    calibration_method: CalibrationMethod = "minmax"
    """"minmax": the extremes over all samples. "percentile": cuts outliers, as `percentile` says."""
    percentile: float = Field(default=99.99, gt=50.0, le=100.0)
    """With "percentile": the middle share of a tensor's numbers, in percent, that does not saturate."""
    per_channel: bool = True
    """One weight scale for each output channel; False: one for each weight."""
    weight_bits: int = Field(default=8, ge=4, le=8)
    """Bits that weights use; they are stored as int8 in any case."""
    num_samples: int | None = Field(default=None, ge=1)
    """Use the first so many calibration samples; None: all."""
    exclude: tuple[str, ...] = ()
    """Globs of what stays float: names of nodes and weights, modules with all inside them ("head", "*.stem")."""
    threads: int = Field(default=2, ge=1)
    """Threads of the float model while calibrating."""

    @field_validator("exclude")
    @classmethod
    def _patterns_are_not_empty(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        if any(not pattern for pattern in patterns):
            raise ValueError("an empty pattern matches nothing")
        return patterns


class QuantPass(Pass[QuantConfig, QuantizationPlan]):
    """Static int8 quantization, decided once for all targets.

    1. The operator table picks nodes, activations and weights; nodes without a row, what the user excludes and the
       decode tail stay float, each with its reason.
    2. The float model runs on the calibration samples; ranges are accumulated in fixed memory.
    3. Tensors that operators tie together get one scale; every range contains zero.
    4. Weights get symmetric scales, one for each output channel.

    The result is `ModelState.quantization`; the graph is not changed.
    """

    name: ClassVar[str] = "quant"
    summary: ClassVar[str] = "calibrates ranges and plans static int8, which each target spells in its own way"
    config_type: ClassVar[type[PassConfig]] = QuantConfig
    plan_type: ClassVar[type[QuantizationPlan]] = QuantizationPlan
    produces_quantization: ClassVar[bool] = True

    @property
    def requirements(self) -> frozenset[Requirement]:
        """Calibration data, always."""
        return frozenset({Requirement.CALIBRATION})

    def plan(self, state: ModelState, context: PassContext) -> QuantizationPlan:
        """Calibrate and choose all scales.

        Raises:
            PreconditionError: The run has no calibration data.
            UsageError: A pattern of `exclude` means nothing in the model.
            PassError: Nothing in the model can be quantized, or a weight is not finite.
            BadDataError: The calibration data do not fit the model, or make a tensor non-finite.
        """
        if context.calibration is None:
            raise PreconditionError("Static quantization needs calibration data, but the run has none.")
        require_scopes(state.model, self.config.exclude, of=f"`exclude` of pass '{self.name}'")
        candidates = find_candidates(state.model, exclude=self.config.exclude)
        if not any(item.row.is_compute for item in candidates.nodes):
            raise _nothing_to_quantize(state.model, candidates.excluded_nodes)
        calibrated = calibrate(
            state.model,
            candidates.calibrated,
            context.calibration,
            method=self.config.calibration_method,
            percentile=self.config.percentile,
            max_samples=self.config.num_samples,
            threads=self.config.threads,
            custom_op_libraries=context.custom_op_libraries,
            progress=context.progress,
        )
        scales = activation_scales(candidates, calibrated.ranges)
        weights = weight_scales(
            candidates,
            scales.activations,
            num_bits=self.config.weight_bits,
            per_channel=self.config.per_channel,
        )
        method = self.config.calibration_method
        return QuantizationPlan(
            activations=scales.activations,
            weights=weights,
            method=f"percentile {self.config.percentile:g}" if method == "percentile" else method,
            calibration_hash=context.calibration.content_hash,
            num_samples=calibrated.num_samples,
            skipped=scales.skipped,
            excluded_nodes={**candidates.excluded_nodes, **scales.excluded_nodes},
        )

    def apply(self, state: ModelState, plan: QuantizationPlan, context: PassContext) -> PassOutcome:
        """Hand the plan on.

        Raises:
            PassError: The plan was made for another model.
        """
        _check_names(state, plan)
        report = PassReport(
            pass_id=self.pass_id,
            pass_name=self.name,
            summary=(
                f"{len(plan.activations)} activations and {len(plan.weights)} weights have scales "
                f"({plan.method}, {plan.num_samples} samples); {len(plan.excluded_nodes)} nodes stay float"
            ),
            changes=tuple(_range_changes(plan)),
            skips=(
                *(Skip(where=node, reason=reason) for node, reason in plan.excluded_nodes.items()),
                *(Skip(where=tensor, reason=reason) for tensor, reason in plan.skipped.items()),
            ),
            notes=tuple(_notes(plan)),
            figures={
                "quantized_activations": len(plan.activations),
                "quantized_weights": len(plan.weights),
                "float_nodes": len(plan.excluded_nodes),
                "calibration_samples": plan.num_samples,
            },
        )
        return PassOutcome(state=ModelState(model=state.model, quantization=plan), report=report)


def _nothing_to_quantize(model: ir.Model, excluded: Mapping[str, str]) -> PassError:
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph):
        return PassError(
            "Nothing to quantize: the model is quantized already.",
            "Give the float model that it came from, or drop pass 'quant'.",
        )
    if any(value.dtype is ir.DataType.FLOAT16 for value in model.graph.initializers.values()):
        return PassError(
            "Nothing to quantize: the weights are float16, and int8 is planned from float32.",
            "Give the float32 model, or drop pass 'fp16'; or drop pass 'quant'.",
        )
    examples = "; ".join(f"'{name}': {reason}" for name, reason in list(excluded.items())[:5])
    return PassError(
        "Nothing to quantize: no Conv, Gemm or MatMul with a constant float32 weight is left"
        + (f" ({examples})." if examples else "."),
        "Drop pass 'quant', or loosen `quant.exclude`.",
    )


def _check_names(state: ModelState, plan: QuantizationPlan) -> None:
    graph = state.model.graph
    known = {value.name for value in graph.inputs} | set(graph.initializers)
    known.update(value.name for node in graph for value in node.outputs)
    unknown = [name for name in (*plan.activations, *plan.weights) if name not in known]
    if unknown:
        raise PassError(
            f"The quantization plan was made for another model: this one has no tensor '{unknown[0]}'.",
            "Make the plan anew by running without `--plan`.",
        )


def _range_changes(plan: QuantizationPlan) -> list[Change]:
    activations = [
        Change(
            what="activation range",
            where=name,
            figures={
                "low": found.range_min,
                "high": found.range_max,
                "scale": found.scale,
                "zero_point": found.zero_point,
            },
        )
        for name, found in plan.activations.items()
    ]
    weights = [
        Change(
            what="weight scales",
            where=name,
            figures={
                "num_scales": len(found.scales),
                "smallest_scale": min(found.scales),
                "largest_scale": max(found.scales),
            },
        )
        for name, found in plan.weights.items()
    ]
    return [*activations, *weights]


def _notes(plan: QuantizationPlan) -> list[str]:
    notes = []
    if plan.num_samples < 8:
        notes.append(f"Only {plan.num_samples} calibration samples: ranges may be too narrow. 32 to 512 are usual.")
    return notes
