"""The tensors inside a `.tflite` file: the numbers that XNNPACK computes, in the ONNX model's terms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxprune.errors import UsageError
from onnxprune.runtime.feeds import working_feeds
from onnxprune.runtime.litert import litert_runner_from_path
from onnxprune.runtime.tensors import LitertTensors
from tests.tflite_files import TRAINED, packed, unpacked
from tests.tflite_twins import tflite_twin


@pytest.fixture
def twin(tmp_path: Path) -> Path:
    path = tmp_path / "twin.tflite"
    path.write_bytes(tflite_twin())
    return path


def test_tensors_inside_come_after_the_outputs_in_the_onnx_models_axes(twin: Path) -> None:
    runner = LitertTensors(path=twin).runner(["r", "m", "r", "y"])
    assert [spec.name for spec in runner.outputs] == ["y", "r", "m"]
    assert runner.outputs[1].shape == (None, 4, 6, 6)
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8), dtype=np.float32)
    found = runner.run({"x": x})
    assert found["r"].shape == (2, 4, 6, 6)
    np.testing.assert_allclose(found["r"].mean((2, 3)), found["m"], rtol=1e-5)  # sums of 36 in another order
    np.testing.assert_array_equal(found["y"], litert_runner_from_path(twin).run({"x": x})["y"])


def test_unknown_tensor_is_named_with_the_nearest(twin: Path) -> None:
    with pytest.raises(UsageError, match=r"No operator of the main graph computes 'rr'.*Did you mean 'r'"):
        LitertTensors(path=twin).runner(["rr"])


@pytest.mark.parametrize("name", TRAINED)
def test_trained_files_give_the_numbers_of_a_file_that_has_its_tensors_as_outputs(
    shared_data: Path, tmp_path: Path, name: str
) -> None:
    path = shared_data / "mlperf_tiny_models" / f"{name}.tflite"
    inside = list(litert_runner_from_path(path).graph.computed)
    model = unpacked(path)
    subgraph = model.subgraphs[0]
    computed = [int(tensor) for operator in subgraph.operators for tensor in operator.outputs]
    subgraph.outputs = [*subgraph.outputs, *(tensor for tensor in computed if tensor not in subgraph.outputs)]
    rewritten = tmp_path / "rewritten.tflite"
    rewritten.write_bytes(packed(model))

    kept = LitertTensors(path=path).runner(inside)
    feeds = working_feeds(kept, seed=1, batch=2)
    found, expected = kept.run(feeds), litert_runner_from_path(rewritten).run(feeds)

    assert kept.delegated_parts()
    assert len(inside) > 10
    for tensor in inside:
        np.testing.assert_array_equal(found[tensor], expected[tensor])
    for output, array in litert_runner_from_path(path).run(feeds).items():
        np.testing.assert_array_equal(found[output], array)
