"""Constants brought to one form: typed initializers, not inputs, each with one user."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxprune.errors import ModelError
from onnxprune.graph.cleanup import hand_over
from onnxprune.graph.metadata import SHARED_FROM_KEY
from onnxprune.graph.names import UniqueNames, printable

__all__ = ["lift_constants", "remove_initializers_from_inputs", "unshare_initializers"]


def lift_constants(model: ir.Model) -> None:
    """Turn every Constant node into an initializer of its graph, under the name of its output.

    Raises:
        ModelError: A Constant node has not exactly one value.
    """
    for graph in list(model.graphs()):
        for node in graph:
            if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
                _lift(node, graph)


def _lift(node: ir.Node, graph: ir.Graph) -> None:
    try:
        tensor = _constant_tensor(node)
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"The value of the Constant node '{printable(node.name or '')}' is malformed: {error}"
        ) from error
    old = node.outputs[0]
    name = old.name
    tensor.name = name
    new = ir.Value(
        name=None, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    hand_over(old, new)
    old.name = None
    graph.remove(node, safe=True)
    new.name = name
    new.shape, new.type = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
    graph.register_initializer(new)


def _constant_tensor(node: ir.Node) -> ir.TensorProtocol:
    """The value of a Constant node, whichever of its attributes holds it."""
    if len(node.attributes) != 1:
        raise ModelError(
            f"The Constant node '{printable(node.name or '')}' must have exactly one value, "
            f"but has {sorted(node.attributes)}."
        )
    attribute = next(iter(node.attributes.values()))
    match attribute.name:
        case "value":
            return attribute.as_tensor()
        case "value_int":
            return ir.Tensor(np.array(attribute.as_int(), np.int64))
        case "value_ints":
            return ir.Tensor(np.array(attribute.as_ints(), np.int64))
        case "value_float":
            return ir.Tensor(np.array(attribute.as_float(), np.float32))
        case "value_floats":
            return ir.Tensor(np.array(attribute.as_floats(), np.float32))
        case "value_string":
            return ir.StringTensor([_utf8(attribute.value)], shape=ir.Shape([]))
        case "value_strings":
            # Not onnx_ir's way through a NumPy byte string array, which cuts zero bytes and fails beyond ASCII.
            strings = [_utf8(text) for text in attribute.value]
            return ir.StringTensor(strings, shape=ir.Shape([len(strings)]))
        case other:
            raise ModelError(f"The Constant node '{printable(node.name or '')}' has an unknown value '{other}'.")


def _utf8(text: str | bytes) -> bytes:
    return text.encode("utf-8") if isinstance(text, str) else text


def remove_initializers_from_inputs(model: ir.Model) -> None:
    """Take initializers out of the inputs of the model, where IR 3 files list them."""
    inputs = [value for value in model.graph.inputs if not value.is_initializer()]
    if len(inputs) != len(model.graph.inputs):
        model.graph.inputs.clear()
        model.graph.inputs.extend(inputs)


def unshare_initializers(model: ir.Model) -> None:
    """Give every use of an initializer an initializer of its own, all with the same tensor object behind them.

    Exporters merge equal biases and shape constants; pruning one user would break the other. The copies (and the
    original) carry the original's name under `SHARED_FROM_KEY`, so that what is tied on purpose can be found.
    Writing merges what is still equal.
    """
    names = UniqueNames.of_values(model)
    for graph in list(model.graphs()):
        for value in list(graph.initializers.values()):
            uses = list(value.uses())
            to_copy = uses if value.is_graph_output() else uses[1:]
            if not to_copy:
                continue
            origin = value.metadata_props.setdefault(SHARED_FROM_KEY, value.name or "")
            for node, index in to_copy:
                copy = ir.Value(
                    name=names.claim(value.name or "constant"),
                    shape=value.shape,
                    type=None if value.dtype is None else ir.TensorType(value.dtype),
                    const_value=value.const_value,
                    metadata_props={SHARED_FROM_KEY: origin},
                )
                graph.register_initializer(copy)
                node.replace_input_with(index, copy)
