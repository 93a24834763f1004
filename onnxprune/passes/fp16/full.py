"""Mode "full": arithmetic in float16, with Casts where it ends.

    x float32 -> Conv -> Relu -> TopK       =>    x -> Cast -> Conv -> Relu -> Cast -> TopK
                                                       to float16               to float32

A node computes in float16 when its operator may (its schema says so), when it is none of `_NEEDS_FLOAT32`, and when its
weights and the values that were seen on it fit. Everything else stays float32, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from onnxprune.contracts import PassContext
from onnxprune.errors import OnnxPruneError
from onnxprune.graph.metadata import module_path
from onnxprune.graph.names import UniqueNames
from onnxprune.graph.scope import first_match, weight_names
from onnxprune.graph.weights import add_initializer, constant_array
from onnxprune.ops.table import opset_version_of
from onnxprune.passes.fp16.plan import Fp16Config, Fp16Plan, RoundedTensor
from onnxprune.passes.fp16.rounding import FLOAT16_MAX, round_weight
from onnxprune.passes.fp16.weights_only import store_as_float16

__all__ = ["apply_full_plan", "plan_full"]

FLOAT, FLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16

Use = tuple[ir.Node, int]
"""A node and the position of one of its inputs."""

# Values seen on a few inputs may grow on others: float16 is used up to a quarter of its range.
HEADROOM = 4.0

_NEEDS_FLOAT32: dict[str, str] = {
    **dict.fromkeys(("Resize", "Upsample", "RoiAlign", "GridSample", "AffineGrid"), "it computes coordinates"),
    **dict.fromkeys(("NonMaxSuppression", "TopK", "ArgMax", "ArgMin"), "it compares values that would become equal"),
    **dict.fromkeys(("Range", "CumSum"), "it counts: above 2048 float16 skips integers"),
    **dict.fromkeys(("ReduceSumSquare", "ReduceProd", "ReduceLogSumExp", "ReduceL2"), "its sums leave float16's range"),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"), "its scales are float32"),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), "rounding adds up over the steps, and ONNX Runtime has no kernel for it"),
    **dict.fromkeys(("If", "Loop", "Scan", "SequenceMap"), "it has a body"),
    "Cast": "it says its type itself",
}


# --- deciding ------------------------------------------------------------------------------------------------


def plan_full(model: ir.Model, config: Fp16Config, context: PassContext) -> Fp16Plan:
    """Which nodes compute in float16, from their operators, weights and the values on one batch."""
    peaks = _largest_magnitudes(model, context)
    verdicts: dict[str, RoundedTensor | str] = {}
    float32_nodes: dict[str, str] = {}
    float16_nodes: list[str] = []
    used: dict[str, RoundedTensor] = {}
    for node in model.graph:
        if not any(_is_float(value) for value in (*node.inputs, *node.outputs)):
            continue
        weights = [value for value in node.inputs if _is_float(value) and value is not None and value.is_initializer()]
        for value in weights:
            verdicts.setdefault(value.name or "", round_weight(value))
        reason = (
            _reason_by_operator(node, config)
            or _reason_by_values(node, peaks)
            or next(
                (
                    f"weight '{w.name}': {verdict}"
                    for w in weights
                    if isinstance(verdict := verdicts[w.name or ""], str)
                ),
                "",
            )
        )
        if reason:
            float32_nodes[node.name or ""] = reason
            continue
        float16_nodes.append(node.name or "")
        for value in weights:
            verdict = verdicts[value.name or ""]
            if isinstance(verdict, RoundedTensor):
                used[verdict.name] = verdict
    return Fp16Plan(
        mode="full",
        weights=tuple(used.values()),
        float32_weights={
            name: verdict if isinstance(verdict, str) else "the nodes that read it stay float32"
            for name, verdict in verdicts.items()
            if name not in used
        },
        float16_nodes=tuple(float16_nodes),
        float32_nodes=float32_nodes,
        float32_io=_float32_io(model, config, peaks),
    )


def _float32_io(model: ir.Model, config: Fp16Config, peaks: Mapping[str, float]) -> dict[str, str]:
    """Inputs and outputs that stay float32, and why."""
    reasons: dict[str, str] = {}
    for value in (*model.graph.inputs, *model.graph.outputs):
        if not _is_float(value):
            continue
        reason = "inputs and outputs stay as they are (keep_io)" if config.keep_io else _range_reason(value, peaks)
        if reason:
            reasons[value.name or ""] = reason
    return reasons


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype is FLOAT


def _reason_by_operator(node: ir.Node, config: Fp16Config) -> str:
    names = (node.name, node.op_type, *weight_names(node))
    if glob := first_match(config.skip, *names, module_paths=(module_path(node),)):
        return f"excluded by skip '{glob}'"
    if node.domain not in ("", "ai.onnx"):
        return f"operators of '{node.domain}' may not take float16"
    if reason := _NEEDS_FLOAT32.get(node.op_type):
        return f"{node.op_type}: {reason}"
    return "" if _schema_allows_float16(node) else f"{node.op_type} does not take float16 for float32"


def _schema_allows_float16(node: ir.Node) -> bool:
    """True when every float32 input may be float16, and every float32 output then is."""
    try:
        schema = onnx.defs.get_schema(node.op_type, opset_version_of(node), "")
    except onnx.defs.SchemaError:
        return False
    allowed = {constraint.type_param_str: constraint.allowed_type_strs for constraint in schema.type_constraints}
    becoming = set()
    for position, value in enumerate(node.inputs):
        if not _is_float(value):
            continue
        variable = _type_variable(schema.inputs, position)
        if "tensor(float16)" not in allowed.get(variable, ()):
            return False
        becoming.add(variable)
    return all(
        _type_variable(schema.outputs, position) in becoming
        for position, value in enumerate(node.outputs)
        if _is_float(value)
    )


def _type_variable(formal: Sequence[onnx.defs.OpSchema.FormalParameter], position: int) -> str:
    """Name of the type variable of an input or output; a variadic one repeats the last."""
    return formal[min(position, len(formal) - 1)].type_str if formal else ""


def _reason_by_values(node: ir.Node, peaks: Mapping[str, float]) -> str:
    values = (value for value in (*node.inputs, *node.outputs) if value is not None)
    return next((reason for value in values if (reason := _range_reason(value, peaks))), "")


def _range_reason(value: ir.Value, peaks: Mapping[str, float]) -> str:
    peak = peaks.get(value.name or "", 0.0)
    if peak * HEADROOM <= FLOAT16_MAX:
        return ""
    return f"'{value.name}' reaches {peak:.3g}, and float16 ends at {FLOAT16_MAX:g}"


def _largest_magnitudes(model: ir.Model, context: PassContext) -> dict[str, float]:
    """The largest magnitude of every float32 value for one batch: of the calibration data, else of seeded numbers.

    Empty where the model can't be run.
    """
    from onnxprune.runtime.feeds import working_feeds
    from onnxprune.runtime.sessions import ort_runner_from_model

    observed = [value.name for node in model.graph for value in node.outputs if _is_float(value) and value.name]
    try:
        runner = ort_runner_from_model(
            model,
            custom_op_libraries=context.custom_op_libraries,
            optimization="disabled",
            extra_outputs=observed,
        )
        if context.calibration is not None:
            feeds = next(iter(context.calibration))
        else:
            feeds = working_feeds(runner, seed=context.seed)
        values = {**feeds, **runner.run(feeds)}
    except OnnxPruneError:
        return {}
    return {
        name: float(np.abs(array[np.isfinite(array)]).max(initial=0.0))
        for name, array in values.items()
        if array.dtype == np.float32
    }


# --- doing ---------------------------------------------------------------------------------------------------


def apply_full_plan(model: ir.Model, plan: Fp16Plan) -> None:
    """Carry `plan` out on the main graph; bodies of If, Loop and Scan stay float32."""
    _Conversion(model, plan).run()


class _Conversion:
    """The state of one conversion: which nodes are float16, and the Casts made so far."""

    def __init__(self, model: ir.Model, plan: Fp16Plan) -> None:
        self.graph = model.graph
        self.float16_nodes = frozenset(plan.float16_nodes)
        self.float32_io = frozenset(plan.float32_io)
        self.value_names, self.node_names = UniqueNames.of_values(model), UniqueNames.of_nodes(model)

    def run(self) -> None:
        """Values first get the type that their producer gives them, then readers of the other type get a Cast."""
        produced = [value for node in self.graph for value in node.outputs if _is_float(value)]
        initializers = [value for value in self.graph.initializers.values() if _is_float(value)]
        for value in initializers:
            self._convert_weight(value)
        for value in list(self.graph.inputs):
            if _is_float(value):
                self._convert_input(value)
        for value in produced:
            self._convert_produced(value)

    def _reads_float16(self, use: Use) -> bool:
        node, _ = use
        return node.graph is self.graph and node.name in self.float16_nodes

    def _convert_weight(self, value: ir.Value) -> None:
        uses = [(use.node, use.idx) for use in value.uses()]
        narrow = [use for use in uses if self._reads_float16(use)]
        if not narrow:
            return
        if len(narrow) == len(uses) and not value.is_graph_output():
            store_as_float16(value)
            return
        array = constant_array(value)
        if array is None:
            return
        copy = add_initializer(self.graph, f"{value.name}.float16", array.astype(np.float16), self.value_names)
        for node, position in narrow:
            node.replace_input_with(position, copy)

    def _convert_input(self, value: ir.Value) -> None:
        uses = [(use.node, use.idx) for use in value.uses()]
        if value.name in self.float32_io:
            self._redirect(value, [use for use in uses if self._reads_float16(use)], FLOAT16)
            return
        value.type = ir.TensorType(FLOAT16)
        self._redirect(value, [use for use in uses if not self._reads_float16(use)], FLOAT)

    def _convert_produced(self, value: ir.Value) -> None:
        producer = value.producer()
        uses = [(use.node, use.idx) for use in value.uses()]
        is_float16 = producer is not None and producer.name in self.float16_nodes
        if is_float16:
            value.type = ir.TensorType(FLOAT16)
            self._redirect(value, [use for use in uses if not self._reads_float16(use)], FLOAT)
        else:
            self._redirect(value, [use for use in uses if self._reads_float16(use)], FLOAT16)
        stays_float32 = value.name in self.float32_io
        if value.is_graph_output() and is_float16 == stays_float32:
            self._cast_output(value, FLOAT if stays_float32 else FLOAT16)

    def _redirect(self, value: ir.Value, uses: list[Use], dtype: ir.DataType) -> None:
        """Let `uses` read `value` cast to `dtype`, through one Cast."""
        if not uses:
            return
        suffix = "float16" if dtype is FLOAT16 else "float32"
        result = self._add_cast(value, dtype, self.value_names.claim(f"{value.name}.{suffix}"))
        for node, position in uses:
            node.replace_input_with(position, result)

    def _cast_output(self, value: ir.Value, dtype: ir.DataType) -> None:
        """Return `value` cast to `dtype` under its name; the value itself gets another one."""
        name = value.name or ""
        positions = [position for position, output in enumerate(self.graph.outputs) if output is value]
        result = self._add_cast(value, dtype, self.value_names.claim(f"{name}.cast"))
        for position in positions:
            self.graph.outputs[position] = result
        value.name, result.name = result.name, name

    def _add_cast(self, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
        cast = ir.Node(
            "",
            "Cast",
            [value],
            [ir.AttrInt64("to", dtype.value)],
            name=self.node_names.claim(f"{value.name}.to_{'float16' if dtype is FLOAT16 else 'float32'}"),
        )
        result = cast.outputs[0]
        result.name, result.type, result.shape = name, ir.TensorType(dtype), value.shape
        producer = value.producer()
        neighbour = producer or next((use.node for use in value.uses()), None)
        if neighbour is not None:
            cast.metadata_props.update(neighbour.metadata_props)
        if producer is not None:
            self.graph.insert_after(producer, cast)
        else:
            self.graph.insert_before(self.graph[0], cast)
        return result
