"""A `.tflite` file, run in LiteRT's interpreter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy.typing as npt

Feeds = Mapping[str, npt.NDArray[Any]]
Kernels = Literal["XNNPACK", "optimized", "reference"]
"""Those that applications run, LiteRT's own, or its plain ones that define what is right."""


def run_file(
    content: bytes, feeds: Feeds, *, kernels: Kernels = "XNNPACK", read: Sequence[str] = (), runs: int = 1
) -> dict[str, npt.NDArray[Any]]:
    """The outputs, and the tensors of `read`, by name, of the last of `runs` calls with the same feeds."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    resolvers = {
        "XNNPACK": OpResolverType.AUTO,
        "optimized": OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        "reference": OpResolverType.BUILTIN_REF,
    }
    interpreter = Interpreter(
        model_content=bytes(content),
        num_threads=1,
        experimental_op_resolver_type=resolvers[kernels],
        experimental_preserve_all_tensors=bool(read),
    )
    inputs = {detail["name"]: detail for detail in interpreter.get_input_details()}
    for name, feed in feeds.items():
        if tuple(inputs[name]["shape"]) != feed.shape:
            interpreter.resize_tensor_input(inputs[name]["index"], feed.shape)
    interpreter.allocate_tensors()
    for _ in range(runs):
        for name, feed in feeds.items():
            interpreter.set_tensor(inputs[name]["index"], feed)
        interpreter.invoke()
    inside = [detail for detail in interpreter.get_tensor_details() if detail["name"] in read] if read else []
    wanted = (*inside, *interpreter.get_output_details())
    return {detail["name"]: interpreter.get_tensor(detail["index"]) for detail in wanted}
