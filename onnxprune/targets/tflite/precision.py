"""What weights and activations are in the file: float32, float16, int8, or int8 weights alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal, TypeAlias

import onnx_ir as ir

from onnxprune.contracts import Finding, Placement, QuantizationMode, QuantizationPlan
from onnxprune.errors import quoted_list
from onnxprune.targets.qdq.data_free import spell_data_free
from onnxprune.targets.tflite.fusion import merge_reshapes
from onnxprune.targets.tflite.graph import Graph, Model
from onnxprune.targets.tflite.integers import Integerized, integerize
from onnxprune.targets.tflite.weights import (
    SMALLEST_STORED,
    WeightsResult,
    store_narrow,
    weights_as_half,
    weights_as_integers,
)

__all__ = ["Precision", "apply_precision", "with_planned_weights"]

Precision: TypeAlias = Literal["fp32", "fp16", "int8", "int8-float-io", "dynamic-int8"]


def with_planned_weights(model: ir.Model, plan: QuantizationPlan) -> ir.Model:
    """A copy of `model` whose planned weights are int8 behind DequantizeLinear, for precision "dynamic-int8".

    Args:
        model: The float model, canonical.
        plan: In the mode "dynamic" or "weight-only".
    """
    placement = Placement(target="tflite", integer_nodes=(), float_nodes={})
    return spell_data_free(model, replace(plan, mode="weight-only"), placement, "tflite", form="kept")


def apply_precision(
    model: Model, precision: Precision, *, mode: QuantizationMode | None = None
) -> tuple[Model, tuple[Finding, ...]]:
    """`model` with its constants, and for int8 its operators, in `precision`.

    Args:
        model: Lowered, laid out and fused.
        precision: See `onnxprune.targets.tflite.target.TfliteConfig`. "fp32" keeps constants narrow that are.
        mode: Of the plan by which the weights of `model` were written (`with_planned_weights`); None: there is none.
            "weight-only" lets "dynamic-int8" compute in float.
    """
    if precision in ("int8", "int8-float-io"):
        return _integers(model, float_io=precision == "int8-float-io")
    if precision == "fp16":
        found = [weights_as_half(graph) for graph in model.graphs]
        return _with_results(model, found), _kept_findings(found, "float16")
    if precision == "dynamic-int8" and mode != "weight-only":
        found = [weights_as_integers(graph) for graph in model.graphs]
        return _with_results(model, found), (*_dynamic_findings(found), *_kept_findings(found, "int8"))
    return replace(model, graphs=tuple(store_narrow(graph) for graph in model.graphs)), ()


def _with_results(model: Model, found: Iterable[WeightsResult]) -> Model:
    return replace(model, graphs=tuple(store_narrow(result.graph) for result in found))


def _integers(model: Model, *, float_io: bool) -> tuple[Model, tuple[Finding, ...]]:
    # Bodies of IF and WHILE share tensors with the graph around them, whose types are fixed by both sides.
    made = integerize(model.main, float_io=float_io)
    # QUANTIZE and DEQUANTIZE stood between some of them.
    main = merge_reshapes(made.graph)
    graphs = (store_narrow(main), *(store_narrow(graph) for graph in model.graphs[1:]))
    findings = [_placement_finding(made), *_fixed_scale_findings(made)]
    if not float_io:
        findings.extend(_float_port_findings(made.graph))
    return replace(model, graphs=graphs), tuple(findings)


def _placement_finding(made: Integerized) -> Finding:
    """How many operators compute in integers, and why the others do not."""
    graph = made.graph
    computing = [operator for operator in graph.operators if operator.kind not in ("QUANTIZE", "DEQUANTIZE")]
    integer = sum(graph.tensors[operator.outputs[0]].type in ("INT8", "INT16") for operator in computing)
    text = f"{integer} of {len(computing)} operators work on integers."
    reasons = Counter(made.float_reasons.values())
    if reasons:
        listed = [f"{count} x {kind}: {reason}" for (kind, reason), count in reasons.most_common(_SHOWN)]
        more = len(reasons) - len(listed)
        text += f" Float stay {'; '.join(listed)}{f'; and {more} more reasons' if more > 0 else ''}."
    return Finding(topic="int8", text=text)


def _fixed_scale_findings(made: Integerized) -> list[Finding]:
    if not made.fixed_scales:
        return []
    kinds = Counter(made.fixed_scales.values())
    listed = ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))
    return [
        Finding(
            topic="int8",
            text=f"TFLite fixes the scale of what {listed} give ({quoted_list(list(made.fixed_scales))}); the plan has "
            "other scales for them, so they are rounded twice.",
        )
    ]


def _float_port_findings(graph: Graph) -> list[Finding]:
    names = [name for name in (*graph.inputs, *graph.outputs) if graph.tensors[name].type == "FLOAT32"]
    if not names:
        return []
    return [
        Finding(
            topic="int8",
            text=f"{quoted_list(names)} stay float32: no integer operator stands next to them.",
            severity="warning",
        )
    ]


def _dynamic_findings(found: Iterable[WeightsResult]) -> list[Finding]:
    graphs = [result.graph for result in found]
    hybrid = sum(
        graph.tensors[operator.inputs[0]].type == "FLOAT32" and _has_integer_weight(graph, operator.inputs)
        for graph in graphs
        for operator in graph.operators
        if operator.kind not in ("DEQUANTIZE", "GATHER")
    )
    text = f"{hybrid} operators multiply by int8 weights, and quantize their input in each run."
    return [
        Finding(topic="int8", text=f"{text} Weights below {SMALLEST_STORED} numbers stay float32."),
    ]


def _has_integer_weight(graph: Graph, inputs: Iterable[str]) -> bool:
    tensors = (graph.tensors[name] for name in inputs if name)
    return any(tensor.type == "INT8" and tensor.constant is not None for tensor in tensors)


def _kept_findings(found: Iterable[WeightsResult], form: str) -> tuple[Finding, ...]:
    kept: Mapping[str, str] = {name: reason for result in found for name, reason in result.kept_float.items()}
    if not kept:
        return ()
    first = next(iter(kept.values()))
    text = f"{quoted_list(list(kept))} stay float32 instead of {form}: {first}."
    return (Finding(topic="weights", text=text, severity="warning"),)


_SHOWN = 5
