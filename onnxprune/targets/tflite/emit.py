"""All stages in their order: an ONNX graph becomes the model that is serialized."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import onnx_ir as ir

from onnxprune.contracts import Finding, QuantizationPlan
from onnxprune.targets.tflite.fusion import fuse
from onnxprune.targets.tflite.graph import Model
from onnxprune.targets.tflite.interface import with_channels_last
from onnxprune.targets.tflite.layout import assign_layouts
from onnxprune.targets.tflite.lowering import lower
from onnxprune.targets.tflite.naming import with_source_names
from onnxprune.targets.tflite.precision import Precision, apply_precision, with_planned_weights
from onnxprune.targets.tflite.sparse import SparseMode, make_sparse

__all__ = ["EmitOptions", "Emitted", "Layout", "emit"]

Layout: TypeAlias = Literal["as-is", "nhwc"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EmitOptions:
    """What is asked of the file; see `onnxprune.targets.tflite.target.TfliteConfig`."""

    input_layout: Layout = "as-is"
    output_layout: Layout = "as-is"
    precision: Precision = "fp32"
    sparse: SparseMode = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Emitted:
    """What is written, and what there is to say about it."""

    model: Model
    findings: tuple[Finding, ...] = ()


def emit(
    model: ir.Model,
    options: EmitOptions | None = None,
    *,
    plan: QuantizationPlan | None = None,
    source: ir.Model | None = None,
) -> Emitted:
    """The TFLite model of an ONNX graph.

    Args:
        model: Canonical, or its QDQ spelling.
        options: What is asked for.
        plan: For precision "dynamic-int8": the scales of weights, in a mode without data.
        source: What `model` spells, after whose values integers are called.

    Raises:
        TargetError: Nodes can't be expressed; the message names all of them with the reasons.
    """
    options = options or EmitOptions()
    mode = plan.mode if plan is not None and plan.mode != "static" and options.precision == "dynamic-int8" else None
    lowered = lower(model if plan is None or mode is None else with_planned_weights(model, plan))
    main = with_channels_last(
        lowered.main, inputs=options.input_layout == "nhwc", outputs=options.output_layout == "nhwc"
    )
    graphs = (main, *lowered.graphs[1:])
    arranged = replace(lowered, graphs=tuple(fuse(assign_layouts(graph)) for graph in graphs))
    made, findings = apply_precision(arranged, options.precision, mode=mode)
    if source is not None:
        values = {value.name for node in source.graph for value in node.outputs if value.name}
        made = made.with_main(with_source_names(made.main, values))
    # Last: it reads the graph as XNNPACK will.
    main, sparse_findings = make_sparse(made.main, options.sparse)
    return Emitted(model=made.with_main(main), findings=(*findings, *sparse_findings))
