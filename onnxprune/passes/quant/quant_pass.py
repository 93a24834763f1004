"""The `quant` pass: calibrate, and write the quantization plan. The graph stays float; targets spell the plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from onnxprune.contracts import (
    CalibrationSource,
    ModelState,
    Pass,
    PassConfig,
    PassContext,
    PassOutcome,
    QuantizationPlan,
    Requirement,
)
from onnxprune.errors import PassError, PreconditionError
from onnxprune.graph.scope import require_scopes
from onnxprune.passes.quant.accounting import with_account
from onnxprune.passes.quant.calibrate import RangeRule, calibrate
from onnxprune.passes.quant.candidates import find_candidates
from onnxprune.passes.quant.config import QuantConfig
from onnxprune.passes.quant.data_free import data_free_plan
from onnxprune.passes.quant.neural_compressor import engine_files, plan_with_neural_compressor, require_engine
from onnxprune.passes.quant.plan_report import plan_report
from onnxprune.passes.quant.scales import activation_scales
from onnxprune.passes.quant.tail_ranges import channel_axes, reasons_with_ranges, without_mixed_last_layers
from onnxprune.passes.quant.weights import weight_scales

__all__ = ["QuantConfig", "QuantPass"]


class QuantPass(Pass[QuantConfig, QuantizationPlan]):
    """int8 quantization, decided once for all targets.

    1. The operator table picks nodes, activations and weights; nodes without a row, what the user excludes and the
       decode tail stay float, each with its reason.
    2. The float model runs on the calibration samples; ranges are accumulated in fixed memory.
    3. Tensors that operators tie together get one scale; every range contains zero.
    4. Weights get symmetric scales, one for each output channel.
    5. In the modes "dynamic" and "weight-only", weights alone have scales, and nothing is run (see `data_free`).
    6. With `engine = "neural-compressor"`, steps 1 to 4 are that tool's, and its scales are read back.
    7. Where a goal is set (`max_drop`, `min_snr_db`), the plan is simulated, and the layers that do the most damage
       leave 8 bits until it holds.

    The result is `ModelState.quantization`; the graph is not changed.
    """

    name: ClassVar[str] = "quant"
    summary: ClassVar[str] = "plans int8 (static, dynamic or weight-only), which each target spells in its own way"
    config_type: ClassVar[type[PassConfig]] = QuantConfig
    plan_type: ClassVar[type[QuantizationPlan]] = QuantizationPlan
    produces_quantization: ClassVar[bool] = True

    @property
    def requirements(self) -> frozenset[Requirement]:
        """Calibration data in mode "static"; an evaluator where the score has a limit."""
        needed = set()
        if self.config.mode == "static":
            needed.add(Requirement.CALIBRATION)
        if self.config.max_drop is not None:
            needed.add(Requirement.EVALUATOR)
        return frozenset(needed)

    @property
    def plans_activations(self) -> bool:
        """In mode "static" only."""
        return self.config.mode == "static"

    @property
    def without_calibration(self) -> str:
        """The modes that need none."""
        if self.config.mode != "static":
            return ""
        return f"or set {self.pass_id}.mode to 'dynamic' or 'weight-only', which need none"

    @property
    def files_read(self) -> tuple[Path, ...]:
        """What is installed where a foreign engine runs."""
        return engine_files(self.config)

    def check_files(self, state: ModelState) -> None:
        """Refuse a foreign engine that can't be used (raises a `PreconditionError`)."""
        require_engine(self.config)

    def plan(self, state: ModelState, context: PassContext) -> QuantizationPlan:
        """Calibrate and choose all scales.

        Raises:
            PreconditionError: The run has no calibration data.
            UsageError: A pattern of `exclude` means nothing in the model.
            PassError: Nothing in the model can be quantized, or a weight is not finite.
            BadDataError: The calibration data do not fit the model, or make a tensor non-finite.
        """
        require_scopes(state.model, self.config.exclude, of=f"`exclude` of pass '{self.name}'")
        if self.config.mode != "static":
            return self._plan_without_data(state)
        if context.calibration is None:
            raise PreconditionError(
                "Static quantization needs calibration data, but the run has none.",
                f"Give them, {self.without_calibration}.",
            )
        if self.config.engine == "neural-compressor":
            plan = plan_with_neural_compressor(state.model, self.config, context)
        else:
            plan = self._calibrated_plan(state, context.calibration, context)
        return with_account(state.model, plan, self.config, context)

    def apply(self, state: ModelState, plan: QuantizationPlan, context: PassContext) -> PassOutcome:
        """Hand the plan on.

        Raises:
            PassError: The plan was made for another model.
        """
        _check_names(state, plan)
        report = plan_report(self.pass_id, self.name, plan)
        return PassOutcome(state=ModelState(model=state.model, quantization=plan), report=report)

    def _calibrated_plan(self, state: ModelState, source: CalibrationSource, context: PassContext) -> QuantizationPlan:
        config = self.config
        candidates = find_candidates(state.model, exclude=config.exclude)
        if not any(item.row.is_compute for item in candidates.nodes):
            raise _nothing_to_quantize(state.model, candidates.excluded_nodes)
        calibrated = calibrate(
            state.model,
            candidates.calibrated,
            source,
            rule=RangeRule(
                method=config.calibration_method,
                percentile=config.percentile,
                momentum=config.momentum,
                num_bits=config.activation_bits,
            ),
            channel_axes=channel_axes(candidates),
            max_samples=config.num_samples,
            threads=config.threads,
            custom_op_libraries=context.custom_op_libraries,
            progress=context.progress,
        )
        tail_reasons = reasons_with_ranges(
            state.model,
            candidates,
            source,
            num_bits=config.activation_bits,
            custom_op_libraries=context.custom_op_libraries,
        )
        candidates = without_mixed_last_layers(candidates, calibrated.channels, num_bits=config.activation_bits)
        scales = activation_scales(candidates, calibrated.ranges, num_bits=config.activation_bits)
        weights = weight_scales(
            candidates,
            scales.activations,
            num_bits=config.weight_bits,
            per_channel=config.per_channel,
            method=config.weight_method,
        )
        is_percentile = config.calibration_method == "percentile"
        return QuantizationPlan(
            activations=scales.activations,
            weights=weights,
            method=f"percentile {config.percentile:g}" if is_percentile else config.calibration_method,
            calibration_hash=source.content_hash,
            num_samples=calibrated.num_samples,
            skipped=scales.skipped,
            excluded_nodes={**candidates.excluded_nodes, **tail_reasons, **scales.excluded_nodes},
        )

    def _plan_without_data(self, state: ModelState) -> QuantizationPlan:
        plan = data_free_plan(
            state.model,
            mode=self.config.mode,
            num_bits=self.config.weight_bits,
            per_channel=self.config.per_channel,
            exclude=self.config.exclude,
        )
        if not plan.weights:
            raise _nothing_to_quantize(state.model, plan.excluded_nodes)
        return plan


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
