"""Random ONNX graphs through all stages of the TFLite emitter, against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest

pytest.importorskip("ai_edge_litert")

from tests.random_onnx import OPEN, RandomGraph
from tests.tflite_runs import emitted, litert_outputs

# Of the largest number of a tensor: a dozen layers of float32 sums, added in another order.
TOLERANCE = 1e-4
# Sums that cancel are left with the rounding of their terms, which are around 1.
SMALLEST_SCALE = 0.05


@pytest.mark.parametrize("batch", [1, 2, OPEN], ids=["batch-1", "batch-2", "open-batch"])
def test_random_graphs_compute_what_onnx_runtime_computes(batch: int) -> None:
    compared = 0
    for seed in range(50):
        graph = RandomGraph(seed, batch=batch)
        proto = graph.model()
        model = emitted(proto)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_outputs()]
        for fed in (3, 1) if batch == OPEN else (batch,):
            feeds = graph.feeds(fed)
            actual = litert_outputs(model, feeds)
            for name, expected in zip(names, session.run(names, feeds), strict=True):
                assert actual[name].shape == expected.shape, (seed, name)
                scale = max(float(np.abs(expected).max(initial=0)), SMALLEST_SCALE)
                np.testing.assert_allclose(
                    actual[name] / scale, expected / scale, rtol=0, atol=TOLERANCE, err_msg=f"seed {seed}, {name}"
                )
                compared += 1
    assert compared > 100
