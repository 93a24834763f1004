"""What changes in a node when its opset is raised: one rule for each operator version that is not a plain extension.

Written against the changelog of the ONNX operators, opset 7 to 24. A version without a rule only adds element types,
optional attributes or inputs whose defaults keep the old meaning; a test holds this list against onnx's schemas.

The stock converter (`onnx.version_converter`) is not used: it gives other values for Upsample-9 and Resize-10 in
linear mode (coordinates become half_pixel instead of asymmetric), drops node metadata, knows neither subgraphs nor
functions, and stops at operators of other domains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.errors import ModelError
from onnxprune.graph.cleanup import hand_over
from onnxprune.graph.names import printable

__all__ = ["RULES", "OpsetRule", "RuleContext"]

OpsetRule = Callable[["RuleContext"], None]
"""Rewrites `context.node` from the version before to the rule's version."""

RULES: dict[tuple[str, int], OpsetRule] = {}
"""By operator and by the opset version that brought the change."""


@dataclass(slots=True)
class RuleContext:
    """One node on its way up. `node` is replaced where another operator takes its place."""

    node: ir.Node
    graph: ir.Graph

    def constant(self, array: npt.NDArray[Any]) -> ir.Value:
        """A constant that comes before the node."""
        return self.insert("Constant", [], {"value": ir.tensor(array)})

    def insert(
        self, op_type: str, inputs: Sequence[ir.Value | None], attributes: dict[str, Any] | None = None
    ) -> ir.Value:
        """A new node before the node, in the same place of the source network; returns its output."""
        new = ir.node(op_type, inputs, attributes or {}, metadata_props=dict(self.node.metadata_props))
        self.graph.insert_before(self.node, new)
        return new.outputs[0]

    def replace_by(self, result: ir.Value) -> None:
        """Let `result` take the place and the name of the node's first output, and remove the node."""
        old = self.node.outputs[0]
        name, was_output = old.name, old.is_graph_output()
        result.type, result.shape = old.type, old.shape
        hand_over(old, result)
        if not was_output:
            old.name = None
            result.name = name
        producer = result.producer()
        self.graph.remove(self.node, safe=True)
        if producer is not None:
            producer.name = self.node.name
            self.node = producer

    def take_ints(self, name: str) -> tuple[int, ...] | None:
        """Remove an attribute of integers and return it."""
        attribute = self.node.attributes.pop(name, None)
        return None if attribute is None else tuple(self._value(attribute).as_ints())

    def take_int(self, name: str, default: int) -> int:
        """Remove an integer attribute and return it."""
        attribute = self.node.attributes.pop(name, None)
        return default if attribute is None else self._value(attribute).as_int()

    def take_float(self, name: str) -> float | None:
        """Remove a float attribute and return it."""
        attribute = self.node.attributes.pop(name, None)
        return None if attribute is None else self._value(attribute).as_float()

    def text(self, name: str, default: str) -> str:
        """The value of a string attribute."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else self._value(attribute).as_string()

    def set_input(self, index: int, value: ir.Value | None) -> None:
        """Make `value` input number `index`; inputs before it that are not there are left out."""
        if index >= len(self.node.inputs):
            self.node.resize_inputs(index + 1)
        self.node.replace_input_with(index, value)

    def input_type(self, index: int = 0) -> npt.DTypeLike:
        """NumPy's type of an input; float32 where nothing says it."""
        value = self.node.inputs[index]
        return np.dtype(np.float32) if value is None or value.dtype is None else value.dtype.numpy()

    def refuse(self, reason: str) -> ModelError:
        """The error for a node that can't be raised."""
        return ModelError(
            f"Node '{printable(self.node.name or '')}' ({self.node.op_type}) can't be brought to a newer opset: "
            f"{reason}.",
            "Export the model with opset 18 to 24.",
        )

    def _value(self, attribute: ir.Attr) -> ir.Attr:
        if attribute.is_ref():
            raise self.refuse(f"its attribute '{attribute.name}' is a parameter of a function")
        return attribute


def _rule(version: int, *op_types: str) -> Callable[[OpsetRule], OpsetRule]:
    def register(rule: OpsetRule) -> OpsetRule:
        for op_type in op_types:
            RULES[op_type, version] = rule
        return rule

    return register


def _int64(numbers: Sequence[int]) -> npt.NDArray[np.int64]:
    return np.array(numbers, np.int64)


def _constant_of(value: ir.Value | None) -> npt.NDArray[Any] | None:
    if value is None:
        return None
    if value.is_initializer() and not value.is_graph_input() and value.const_value is not None:
        return value.const_value.numpy()
    producer = value.producer()
    if producer is not None and producer.op_type == "Constant" and "value" in producer.attributes:
        return producer.attributes["value"].as_tensor().numpy()
    return None


# --- attributes that became inputs --------------------------------------------------------------------------------


@_rule(13, "ReduceSum", "Squeeze", "Unsqueeze")
@_rule(18, "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin")
@_rule(18, "ReduceProd", "ReduceSumSquare")
def _axes_to_input(context: RuleContext) -> None:
    axes = context.take_ints("axes")
    if axes is not None:
        context.set_input(1, context.constant(_int64(axes)))


@_rule(13, "Split")
def _split_to_input(context: RuleContext) -> None:
    sizes = context.take_ints("split")
    if sizes is not None:
        context.set_input(1, context.constant(_int64(sizes)))


@_rule(18, "Split")
def _split_count(context: RuleContext) -> None:
    if len(context.node.inputs) < 2 or context.node.inputs[1] is None:
        context.node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(context.node.outputs))


@_rule(10, "Slice")
def _slice_to_inputs(context: RuleContext) -> None:
    for index, name in enumerate(("starts", "ends", "axes"), start=1):
        numbers = context.take_ints(name)
        if numbers is not None:
            context.set_input(index, context.constant(_int64(numbers)))


@_rule(10, "TopK")
def _topk_to_input(context: RuleContext) -> None:
    context.set_input(1, context.constant(_int64([context.take_int("k", 0)])))


@_rule(11, "Clip")
def _clip_to_inputs(context: RuleContext) -> None:
    for index, name in enumerate(("min", "max"), start=1):
        bound = context.take_float(name)
        if bound is not None:
            context.set_input(index, context.constant(np.array(bound, context.input_type())))


@_rule(11, "Pad")
def _pad_to_inputs(context: RuleContext) -> None:
    pads = context.take_ints("pads")
    if pads is None:
        raise context.refuse("it has no pads")
    fill = context.take_float("value")
    context.set_input(1, context.constant(_int64(pads)))
    if fill:
        context.set_input(2, context.constant(np.array(fill, context.input_type())))


@_rule(20, "DFT")
def _dft_axis_to_input(context: RuleContext) -> None:
    context.set_input(2, context.constant(np.array(context.take_int("axis", 1), np.int64)))


# --- changed meanings -------------------------------------------------------------------------------------------


@_rule(13, "Softmax", "LogSoftmax", "Hardmax")
def _softmax_over_one_axis(context: RuleContext) -> None:
    """Up to opset 12 all axes from `axis` on counted as one."""
    source = context.node.inputs[0]
    axis = context.take_int("axis", 1)
    shape = None if source is None else source.shape
    if shape is not None:
        axis = axis + len(shape) if axis < 0 else axis
        if len(shape) > 0 and all(dim == 1 for dim in shape[axis + 1 :]):
            context.node.attributes["axis"] = ir.AttrInt64("axis", axis)
            return
    flat = context.insert("Flatten", [source], {"axis": axis})
    size = context.insert("Shape", [source])
    context.node.replace_input_with(0, flat)
    context.node.attributes["axis"] = ir.AttrInt64("axis", 1)
    result = ir.node("Reshape", [None, size], metadata_props=dict(context.node.metadata_props))
    context.graph.insert_after(context.node, result)
    old = context.node.outputs[0]
    name, was_output = old.name, old.is_graph_output()
    result.outputs[0].type, result.outputs[0].shape = old.type, old.shape
    hand_over(old, result.outputs[0])
    if not was_output:
        result.outputs[0].name = name
    old.name, old.shape = None, None
    result.replace_input_with(0, old)


@_rule(9, "BatchNormalization")
def _batch_norm_per_channel(context: RuleContext) -> None:
    """`spatial` = 0 gave each position statistics of its own: (x - mean) / sqrt(var + epsilon) * scale + bias."""
    if context.take_int("spatial", 1) != 0:
        return
    _single_output(context)
    epsilon = context.take_float("epsilon")
    source, scale, bias, mean, variance = context.node.inputs
    small = context.constant(np.array(1e-5 if epsilon is None else epsilon, context.input_type()))
    deviation = context.insert("Sqrt", [context.insert("Add", [variance, small])])
    centred = context.insert("Div", [context.insert("Sub", [source, mean]), deviation])
    context.replace_by(context.insert("Add", [context.insert("Mul", [centred, scale]), bias]))


@_rule(14, "BatchNormalization")
def _batch_norm_outputs(context: RuleContext) -> None:
    _single_output(context)


def _single_output(context: RuleContext) -> None:
    if any(value.uses() or value.is_graph_output() for value in context.node.outputs[1:]):
        raise context.refuse("it is in training mode (its statistics are used)")
    context.node.resize_outputs(1)


@_rule(12, "Dropout")
def _dropout_in_inference(context: RuleContext) -> None:
    # Up to opset 11 a Dropout in a model file did nothing; from 12 on it does nothing without a third input.
    context.node.attributes.pop("ratio", None)


@_rule(16, "RoiAlign")
def _roi_align_offset(context: RuleContext) -> None:
    # The default became half_pixel.
    context.node.attributes["coordinate_transformation_mode"] = ir.AttrString(
        "coordinate_transformation_mode", "output_half_pixel"
    )


@_rule(21, "GroupNormalization")
def _group_norm_per_channel(context: RuleContext) -> None:
    """Scale and bias were given for each group, and are now for each channel."""
    source = context.node.inputs[0]
    channels = None if source is None or source.shape is None else source.shape[1]
    groups = context.node.attributes["num_groups"].as_int()
    if not isinstance(channels, int):
        raise context.refuse("its number of channels is not static")
    column, repeated, flat = _int64([-1, 1]), _int64([groups, channels // groups]), _int64([-1])
    for index in (1, 2):
        value = context.insert("Reshape", [context.node.inputs[index], context.constant(column)])
        value = context.insert("Expand", [value, context.constant(repeated)])
        context.node.replace_input_with(index, context.insert("Reshape", [value, context.constant(flat)]))


@_rule(9, "Scan")
def _scan_without_batch(context: RuleContext) -> None:
    raise context.refuse("Scan had a batch axis in opset 8 and has none since")


# --- renamed ----------------------------------------------------------------------------------------------------


@_rule(11, "Scatter")
def _scatter_elements(context: RuleContext) -> None:
    context.node.op_type = "ScatterElements"


@_rule(20, "GridSample")
def _grid_sample_modes(context: RuleContext) -> None:
    mode = context.text("mode", "bilinear")
    context.node.attributes["mode"] = ir.AttrString("mode", {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode))


# --- Upsample and Resize ----------------------------------------------------------------------------------------


@_rule(9, "Upsample")
def _upsample_scales_to_input(context: RuleContext) -> None:
    attribute = context.node.attributes.pop("scales", None)
    if attribute is None:
        raise context.refuse("it has no scales")
    context.set_input(1, context.constant(np.array(attribute.as_floats(), np.float32)))


@_rule(10, "Upsample")
def _upsample_to_resize(context: RuleContext) -> None:
    context.node.op_type = "Resize"


@_rule(11, "Resize")
def _resize_asymmetric(context: RuleContext) -> None:
    """Resize-10 (and Upsample) mapped x to x / scale, and "nearest" took the pixel below, or above when shrinking."""
    node = context.node
    scales_value = node.inputs[1]
    mode = context.text("mode", "nearest")
    context.set_input(2, scales_value)
    node.replace_input_with(1, None)
    node.attributes["coordinate_transformation_mode"] = ir.AttrString("coordinate_transformation_mode", "asymmetric")
    if mode != "nearest":
        return
    scales = _constant_of(scales_value)
    node.attributes["nearest_mode"] = ir.AttrString("nearest_mode", "floor")
    if scales is None or not (scales < 1).any():
        return
    if not (scales > 1).any():
        node.attributes["nearest_mode"] = ir.AttrString("nearest_mode", "ceil")
        return
    # Growing and shrinking at once: shrink first, each by its own rule.
    attributes = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "ceil"}
    shrinking = context.constant(np.minimum(scales, 1).astype(np.float32))
    node.replace_input_with(0, context.insert("Resize", [node.inputs[0], None, shrinking], attributes))
    node.replace_input_with(2, context.constant(np.maximum(scales, 1).astype(np.float32)))


@_rule(13, "Resize")
def _resize_optional_inputs(context: RuleContext) -> None:
    """An empty tensor said "not given" up to opset 12; `tf_half_pixel_for_nn` went."""
    node = context.node
    for index in range(1, min(len(node.inputs), 3)):
        array = _constant_of(node.inputs[index])
        if array is not None and array.size == 0:
            node.replace_input_with(index, None)
    if context.text("coordinate_transformation_mode", "half_pixel") != "tf_half_pixel_for_nn":
        return
    if context.text("nearest_mode", "round_prefer_floor") != "floor":
        raise context.refuse("its mode tf_half_pixel_for_nn went with opset 13 and has no equivalent with its rounding")
    # floor((x + 0.5) / scale) = floor(((x + 0.5) / scale - 0.5) + 0.5)
    node.attributes["coordinate_transformation_mode"] = ir.AttrString("coordinate_transformation_mode", "half_pixel")
    node.attributes["nearest_mode"] = ir.AttrString("nearest_mode", "round_prefer_ceil")
