"""Explicit padding as part of the operator that reads it.

    x (1,3,224,224) -> Pad 0 by (3,3) -> Conv 7x7, pads 0   =>   x -> Conv 7x7, pads 3

| reader | exact when |
|---|---|
| Conv | the padding is with zeros |
| AveragePool | with zeros, and padding counts in the average already or there is none yet |
| MaxPool | with the lowest number, or with 0 where nothing is negative, and no window lies in the padding alone |

Only H, W (and D) may be padded, never cut, and the reader must state its own pads (`auto_pad` NOTSET or VALID).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.passes.simplify.edits import attribute_ints, bypass, constant_input, input_at, is_standard, only_consumer

__all__ = ["fold_pads"]

# Operators whose result is never negative.
_NOT_NEGATIVE = frozenset({"Relu", "Sigmoid", "Softplus", "Exp", "Abs", "Softmax", "HardSigmoid", "Sqrt"})


def fold_pads(model: ir.Model) -> int:
    """No Pad is left that the one node reading it can do by itself (the table at the top of this file).

    Returns:
        How many went.
    """
    return sum(
        _fold(node) for node in list(model.graph.all_nodes()) if node.graph is not None and is_standard(node, "Pad")
    )


def _fold(pad: ir.Node) -> bool:
    source, reader = pad.inputs[0], only_consumer(pad.outputs[0])
    if source is None or source.shape is None or reader is None or reader.inputs[0] is not pad.outputs[0]:
        return False
    added = _spatial_pads(pad, source.shape.rank())
    fill = _fill_value(pad)
    if added is None or fill is None or reader.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return False
    present = np.array(attribute_ints(reader, "pads", [0] * len(added)))
    total = present + added
    if not _is_exact(reader, source, fill=fill, present=present, total=total) or not bypass(pad, source):
        return False
    reader.attributes.pop("auto_pad", None)
    reader.attributes["pads"] = ir.AttrInt64s("pads", [int(size) for size in total])
    if is_standard(reader, "AveragePool"):
        reader.attributes["count_include_pad"] = ir.AttrInt64("count_include_pad", 1)
    return True


def _is_exact(
    reader: ir.Node,
    source: ir.Value,
    *,
    fill: float,
    present: npt.NDArray[np.int64],
    total: npt.NDArray[np.int64],
) -> bool:
    if is_standard(reader, "Conv"):
        return fill == 0.0
    # Rounding up lets a pool's last window hang over the edge, and what is counted there differs with the padding.
    if reader.attributes.get_int("ceil_mode", 0):
        return False
    if is_standard(reader, "AveragePool"):
        counts_padding = bool(reader.attributes.get_int("count_include_pad", 0))
        return fill == 0.0 and (counts_padding or not present.any())
    if is_standard(reader, "MaxPool") and len(reader.outputs) == 1:
        kernel = np.array(attribute_ints(reader, "kernel_shape", ()) * 2)
        dilated = any(step != 1 for step in attribute_ints(reader, "dilations", ()))
        # With pads below the kernel size, every window holds at least one number of the input.
        touches_input = len(kernel) == len(total) and bool((total < kernel).all()) and not dilated
        return touches_input and (_is_lowest(fill, source) or (fill == 0.0 and _is_never_negative(source)))
    return False


def _spatial_pads(pad: ir.Node, rank: int) -> npt.NDArray[np.int64] | None:
    """Begins, then ends, of the axes after the first two; None where another axis is padded or one is cut."""
    if pad.attributes.get_string("mode", "constant") != "constant" or rank < 3:
        return None
    pads = constant_input(pad, 1)
    if pads is None:
        return None
    full = np.zeros((2, rank), np.int64)
    axes: npt.NDArray[np.int64] = np.arange(rank)
    if input_at(pad, 3) is not None:
        given = constant_input(pad, 3)
        if given is None:
            return None
        axes = given % rank
    full[:, axes] = pads.reshape(2, -1)
    return None if full[:, :2].any() or (full < 0).any() else full[:, 2:].reshape(-1)


def _fill_value(pad: ir.Node) -> float | None:
    if input_at(pad, 2) is None:
        return 0.0
    fill = constant_input(pad, 2)
    return float(fill.reshape(-1)[0]) if fill is not None and fill.size == 1 else None


def _is_lowest(fill: float, source: ir.Value) -> bool:
    if source.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE):
        return False
    return fill <= float(np.finfo(source.dtype.numpy()).min)


def _is_never_negative(value: ir.Value) -> bool:
    producer = value.producer()
    if producer is None:
        return False
    if is_standard(producer, "Clip"):
        lowest = constant_input(producer, 1)
        return lowest is not None and bool((lowest >= 0).all())
    return is_standard(producer, *_NOT_NEGATIVE)
