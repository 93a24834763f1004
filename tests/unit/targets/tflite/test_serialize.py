from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated

from onnxprune.runtime.litert import litert_runner_from_path
from onnxprune.targets.tflite.graph import Constant, Graph, Model, Operator, Tensor
from onnxprune.targets.tflite.serialize import serialize, write_tflite

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3)).astype(np.float32)


def two_sums(*constants: np.ndarray) -> Model:
    """y = x + the constants, one ADD each."""
    tensors = {"x": Tensor(name="x", type="FLOAT32", shape=(-1, 3))}
    operators = []
    last = "x"
    for number, array in enumerate(constants):
        tensors[f"c{number}"] = Tensor(
            name=f"c{number}", type="FLOAT32", shape=array.shape, constant=Constant.of(array)
        )
        name = "y" if number == len(constants) - 1 else f"s{number}"
        tensors[name] = Tensor(name=name, type="FLOAT32", shape=(-1, 3))
        operators.append(Operator(kind="ADD", inputs=(last, f"c{number}"), outputs=(name,)))
        last = name
    graph = Graph(name="main", tensors=tensors, operators=tuple(operators), inputs=("x",), outputs=("y",))
    return Model(graphs=(graph,), input_names=("x",), output_names=("y",), metadata={"note": b"kept"})


def buffers_of(content: bytes) -> list[tuple[int, int]]:
    """(start inside the file, bytes) of every buffer with content."""
    model = schema_py_generated.Model.GetRootAs(content, 0)
    base = np.frombuffer(content, np.uint8).ctypes.data
    arrays = [model.Buffers(index).DataAsNumpy() for index in range(1, model.BuffersLength())]
    return [(array.ctypes.data - base, array.size) for array in arrays]


def test_equal_constants_are_stored_once_and_aligned() -> None:
    same, other = RNG.standard_normal((1, 3)).astype(np.float32), RNG.standard_normal((1, 3)).astype(np.float32)
    content = serialize(two_sums(same, other, same.copy()))
    assert content[4:8] == b"TFL3"
    assert sorted(size for _, size in buffers_of(content)) == [4, 12, 12]
    assert all(start % 16 == 0 for start, _ in buffers_of(content))


def test_constants_behind_the_flatbuffer_compute_the_same(tmp_path: Path) -> None:
    model = two_sums(*(RNG.standard_normal((1, 3)).astype(np.float32) for _ in range(3)))
    inside, behind = tmp_path / "inside.tflite", tmp_path / "behind.tflite"
    assert not write_tflite(model, inside).is_behind
    written = write_tflite(model, behind, max_inside_bytes=10)
    assert (written.is_behind, written.constant_bytes) == (True, 40)
    outputs = [litert_runner_from_path(path).run({"x": X})["y"] for path in (inside, behind)]
    np.testing.assert_array_equal(*outputs)
    assert litert_runner_from_path(behind).metadata == {"note": "kept"}
    found = schema_py_generated.Model.GetRootAs(behind.read_bytes(), 0)
    offsets = [found.Buffers(index).Offset() for index in range(1, found.BuffersLength())]
    assert sum(offset > 0 for offset in offsets) == 3
    assert all(offset % 16 == 0 for offset in offsets)


def test_constants_are_read_one_at_a_time(tmp_path: Path) -> None:
    alive = most = 0

    def lazy(number: int) -> Constant:
        def load() -> np.ndarray:
            nonlocal alive, most

            class Counted(np.ndarray):
                def __del__(self) -> None:
                    nonlocal alive
                    alive -= self.base is None

            array = np.ndarray.__new__(Counted, (1, 3), np.float32)
            array[:] = number
            alive += 1
            most = max(most, alive)
            return array

        return Constant((1, 3), np.dtype(np.float32), load)

    model = two_sums(*(np.full((1, 3), number, np.float32) for number in range(8)))
    tensors = {
        name: replace(tensor, constant=lazy(int(name[1:]))) if tensor.constant is not None else tensor
        for name, tensor in model.main.tensors.items()
    }
    write_tflite(model.with_main(replace(model.main, tensors=tensors)), tmp_path / "a.tflite", max_inside_bytes=10)
    assert most <= 2


def test_open_dimension_can_be_fed_in_any_size(tmp_path: Path) -> None:
    path = tmp_path / "a.tflite"
    write_tflite(two_sums(np.ones((1, 3), np.float32)), path)
    runner = litert_runner_from_path(path)
    assert runner.inputs[0].shape == (None, 3)
    for rows in (1, 4):
        assert runner.run({"x": np.zeros((rows, 3), np.float32)})["y"].shape == (rows, 3)


def test_tensors_that_nobody_reads_are_not_written() -> None:
    model = two_sums(np.ones((1, 3), np.float32))
    unread = Tensor(name="u", type="FLOAT32", shape=(9,), constant=Constant.of(np.ones(9, np.float32)))
    more = replace(model.main, tensors={**model.main.tensors, "u": unread})
    assert serialize(model.with_main(more)) == serialize(model)


def test_option_that_the_schema_does_not_have_is_an_error() -> None:
    model = two_sums(np.ones((1, 3), np.float32))
    wrong = model.main.operators[0].with_options(paddding="SAME")
    with pytest.raises(ValueError, match="AddOptions has no field 'paddding'"):
        serialize(model.with_main(replace(model.main, operators=(wrong,))))
