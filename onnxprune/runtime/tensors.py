"""Asking a model for the tensors inside it: a graph in ONNX Runtime, a `.tflite` file in LiteRT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from onnxprune.runtime.litert import LitertRunner, litert_runner_from_path
from onnxprune.runtime.sessions import Optimization, OrtRunner, ort_runner_from_model

__all__ = ["LitertTensors", "OrtTensors"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OrtTensors:
    """A `onnxprune.evaluate.tensor_diff.TensorSource`: a graph whose tensors become outputs, a new session each time.

    ONNX Runtime does not fuse across an output, so operators around it may run in other kernels than in the artifact:
    an integer kernel in between can differ by a step of its scale.
    """

    model: ir.Model
    threads: int = 1
    custom_op_libraries: tuple[Path, ...] = ()
    optimization: Optimization = "all"

    def runner(self, names: Sequence[str]) -> OrtRunner:
        """A runner that gives the model's outputs and the tensors called `names`."""
        outputs = {value.name for value in self.model.graph.outputs}
        return ort_runner_from_model(
            self.model,
            threads=self.threads,
            custom_op_libraries=self.custom_op_libraries,
            optimization=self.optimization,
            extra_outputs=[name for name in dict.fromkeys(names) if name not in outputs],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LitertTensors:
    """A `onnxprune.evaluate.tensor_diff.TensorSource`: a file of which LiteRT keeps all tensors.

    XNNPACK then gets each operator alone instead of whole parts of the graph. That is the same arithmetic: the outputs
    are those of the file as it runs otherwise, bit for bit, and the tensors those of a file that has them as outputs
    (an exception would be XNNPACK's sparse kernels, which need a whole part). Integers come as the floats that they
    stand for, in the ONNX model's axes. `runner` needs memory for all tensors, however many are asked for.
    """

    path: Path
    threads: int = 1

    def runner(self, names: Sequence[str]) -> LitertRunner:
        """A runner that gives the file's outputs and the tensors called `names`."""
        return litert_runner_from_path(self.path, threads=self.threads, extra_outputs=names)
