"""Equal outputs, or not: what decides whether a stage's result stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import Batch, PassContext
from onnxprune.errors import OnnxPruneError
from onnxprune.evaluate.fidelity import compare_outputs
from onnxprune.graph.limits import BIG_WEIGHTS_BYTES
from onnxprune.graph.weights import weight_bytes

__all__ = ["OutputCheck", "make_output_check"]

# Largest difference allowed, over the largest absolute value of the output. Folding re-associates sums and rounds
# weights once more; deep networks amplify that. A wrong rewrite (another padding, resize or axis) is off by percents.
_TOLERANCE_OF = {
    ir.DataType.FLOAT: 1e-4,
    ir.DataType.DOUBLE: 1e-4,  # weights are folded in double precision, but activations may still be float32
    ir.DataType.FLOAT16: 2e-2,  # 20 units of float16's 2**-10
    ir.DataType.BFLOAT16: 1e-1,  # 13 units of bfloat16's 2**-7
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputCheck:
    """Feeds and the outputs that the model gave for them before anything was rewritten."""

    feeds: tuple[Batch, ...]
    expected: tuple[dict[str, npt.NDArray[Any]], ...]
    tolerance: float
    context: PassContext

    def problem(self, model: ir.Model) -> str:
        """How `model` differs, in one sentence without its subject, or "" where it does not."""
        from onnxprune.runtime.sessions import ort_runner_from_model

        try:
            runner = ort_runner_from_model(
                model, custom_op_libraries=self.context.custom_op_libraries, optimization="disabled"
            )
            for feeds, expected in zip(self.feeds, self.expected, strict=True):
                differences = compare_outputs(expected, runner.run(feeds)).per_output
                for name, difference in differences.items():
                    allowed = self.tolerance if expected[name].dtype.kind == "f" else 0.0
                    if not difference.max_rel <= allowed:
                        return (
                            f"output '{name}' is off by {difference.max_abs:.3g}, which is {difference.max_rel:.2g} of "
                            f"its largest value where {allowed:g} is allowed"
                        )
        except OnnxPruneError as error:
            return f"its result can't be compared: {error.message.rstrip('.')}"
        return ""


def make_output_check(model: ir.Model, context: PassContext) -> OutputCheck | str:
    """A check against `model` as it is now, or the reason why there can be none.

    Two seeds, and where dimensions are dynamic also two batch sizes, so that a tool that fixed them is found out.
    """
    from onnxprune.runtime.feeds import working_feeds
    from onnxprune.runtime.sessions import ort_runner_from_model

    size_bytes = weight_bytes(model)
    if size_bytes > BIG_WEIGHTS_BYTES:
        return f"its weights take {size_bytes / 1e9:.1f} GB, too much to load it twice"
    try:
        runner = ort_runner_from_model(model, custom_op_libraries=context.custom_op_libraries, optimization="disabled")
        feeds = [working_feeds(runner, seed=context.seed, batch=1)]
    except OnnxPruneError as error:
        return f"it does not run in ONNX Runtime: {error.message.rstrip('.')}"
    try:
        feeds.append(working_feeds(runner, seed=context.seed + 1, batch=2))
    except OnnxPruneError:
        # The model takes a single sample only, whatever it declares.
        feeds.append(working_feeds(runner, seed=context.seed + 1, batch=1))
    types = {value.dtype for node in model.graph.all_nodes() for value in node.outputs}
    return OutputCheck(
        feeds=tuple(feeds),
        expected=tuple(runner.run(batch) for batch in feeds),
        tolerance=max((_TOLERANCE_OF[dtype] for dtype in types if dtype in _TOLERANCE_OF), default=0.0),
        context=context,
    )
