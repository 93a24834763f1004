"""Model-local functions, replaced by their bodies."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import PreconditionError
from onnx_ir.passes import common as ir_passes

from onnxprune.errors import ModelError
from onnxprune.graph.names import printable
from onnxprune.graph.opset import raise_function_opsets

__all__ = ["inline_functions"]


def inline_functions(model: ir.Model) -> None:
    """Replace every call of a model-local function by its body, in the highest opset that one of them is in.

    Raises:
        ModelError: Functions call each other in a circle, or can't be brought to one opset.
    """
    if not model.functions:
        return
    raise_function_opsets(model)
    try:
        ir_passes.InlinePass()(model)
    except PreconditionError as error:
        raise ModelError(f"The model's functions can't be inlined: {printable(str(error))}.") from error
    except ValueError as error:
        raise ModelError(
            f"The model's functions can't be inlined: {printable(str(error))}.", "Export the model without functions."
        ) from error
    # What nobody calls goes; nothing in the graph refers to it.
    model.functions.clear()
