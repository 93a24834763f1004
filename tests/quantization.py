"""Calibration sources, plans and runs for the tests of quantization."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime

from onnxprune.contracts import Batch, CanonicalModel, ModelState, PassContext, Placement, QuantizationPlan
from onnxprune.passes.quant import QuantConfig, QuantPass
from onnxprune.targets.qdq.kernels import KERNELS

FATAL = 4


@dataclass(frozen=True)
class ArraySource:
    """Calibration batches held in memory."""

    batches: tuple[Batch, ...]

    @property
    def num_samples(self) -> int:
        return sum(next(iter(batch.values())).shape[0] for batch in self.batches)

    @property
    def content_hash(self) -> str:
        digest = hashlib.sha256()
        for batch in self.batches:
            for name in sorted(batch):
                digest.update(np.ascontiguousarray(batch[name]).tobytes())
        return digest.hexdigest()

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def normal_batches(shape: Sequence[int], *, count: int = 8, name: str = "x", seed: int = 0) -> ArraySource:
    """`count` batches of normal numbers."""
    rng = np.random.default_rng(seed)
    return ArraySource(tuple({name: rng.standard_normal(shape).astype(np.float32)} for _ in range(count)))


def plan_for(model: CanonicalModel, source: ArraySource, **config: Any) -> QuantizationPlan:
    """What the `quant` pass plans."""
    pass_ = QuantPass(QuantConfig(threads=1, **config))
    return pass_.plan(ModelState(model=model), PassContext(calibration=source))


def everything_integer(model: ir.Model, plan: QuantizationPlan) -> Placement:
    """All nodes that have a kernel and are not excluded, whatever that costs."""
    names = [node.name for node in model.graph if node.name not in plan.excluded_nodes and KERNELS.get(node)]
    others = [node.name for node in model.graph if node.name not in names]
    return Placement(target="test", integer_nodes=tuple(names), float_nodes=dict.fromkeys(others, "test"))


def session(model: ir.Model, *, optimized: bool = True, write_to: Path | None = None) -> onnxruntime.InferenceSession:
    """ONNX Runtime with int8 kernels for signed activations allowed, as it is on ARM."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    if write_to is not None:
        options.optimized_model_filepath = str(write_to)
    return onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run(model: ir.Model, feeds: Batch, *, optimized: bool = True) -> list[npt.NDArray[np.float32]]:
    """All outputs. Not optimized, Q and DQ are carried out literally: the meaning of the graph."""
    return list(session(model, optimized=optimized).run(None, dict(feeds)))


def kernels(model: ir.Model, folder: Path) -> Counter[str]:
    """The operators that ONNX Runtime really runs."""
    path = folder / "optimized.onnx"
    session(model, write_to=path)
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def signal_to_noise_db(reference: npt.NDArray[Any], actual: npt.NDArray[Any]) -> float:
    """10 log10 of signal power over error power."""
    error = float(np.square(reference.astype(np.float64) - actual).sum())
    return float(10 * np.log10(np.square(reference.astype(np.float64)).sum() / max(error, 1e-30)))
