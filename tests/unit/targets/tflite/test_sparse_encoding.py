"""Constants as their non-zeros come back as they were: by our decoder, and by LiteRT's DENSIFY."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from onnxprune.targets.tflite.build import tensor_type_of
from onnxprune.targets.tflite.graph import Constant, Graph, Operator, Sparsity, Tensor
from onnxprune.targets.tflite.serialize import serialize
from onnxprune.targets.tflite.sparse.encoding import encode_rows
from tests.sparse_nets import model_of

RNG = np.random.default_rng(0)


def weights(shape: tuple[int, ...], zeros: float, dtype: Any = np.float32) -> npt.NDArray[Any]:
    array = (RNG.standard_normal(shape) * 40).astype(dtype)
    array[RNG.random(shape) < zeros] = 0
    return array


def decode_rows(values: npt.NDArray[Any], sparsity: Sparsity, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """The dense tensor, as DENSIFY computes it."""
    dense = np.zeros(shape, values.dtype)
    segments = sparsity.segments.astype(np.int64)
    rows = np.repeat(np.arange(len(segments) - 1), np.diff(segments))
    dense.reshape(-1, shape[-1])[rows, sparsity.indices] = values
    return dense


def densified(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """What LiteRT makes of the sparse form."""
    encoded = encode_rows(Constant.of(array))
    assert encoded is not None
    values, sparsity = encoded
    type_ = tensor_type_of(array.dtype)
    tensors = {
        "sparse": Tensor(name="sparse", type=type_, shape=array.shape, constant=values, sparsity=sparsity),
        "dense": Tensor(name="dense", type=type_, shape=array.shape),
    }
    operators = (Operator(kind="DENSIFY", inputs=("sparse",), outputs=("dense",)),)
    graph = Graph(name="main", tensors=tensors, operators=operators, inputs=(), outputs=("dense",))
    interpreter = Interpreter(
        model_content=serialize(model_of(graph)),
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    interpreter.allocate_tensors()
    interpreter.invoke()
    (output,) = interpreter.get_output_details()
    found: npt.NDArray[Any] = interpreter.get_tensor(output["index"])
    return found


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
@pytest.mark.parametrize("zeros", [0.75, 0.9, 0.995])
@pytest.mark.parametrize("shape", [(7, 300), (1, 5), (40, 1, 1, 24), (3, 3, 3, 70), (2, 1, 1, 70_000)])
def test_non_zeros_and_their_places_give_the_tensor_back(
    shape: tuple[int, ...], zeros: float, dtype: type[np.generic]
) -> None:
    array = weights(shape, zeros, dtype)
    array.flat[0] = 3
    encoded = encode_rows(Constant.of(array))
    if encoded is None:
        place_bytes = 1 if shape[-1] <= 256 else 2 if shape[-1] <= 65_536 else 4
        assert np.count_nonzero(array) * (array.itemsize + place_bytes) + array.size // shape[-1] + 1 >= array.nbytes
        return
    values, sparsity = encoded
    np.testing.assert_array_equal(decode_rows(values.array(), sparsity, shape), array)
    assert values.nbytes + sparsity.nbytes < array.nbytes


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
@pytest.mark.parametrize("shape", [(7, 300), (40, 1, 1, 240), (3, 3, 3, 70)])
def test_densify_of_litert_gives_the_tensor_back(shape: tuple[int, ...], dtype: type[np.generic]) -> None:
    array = weights(shape, 0.9, dtype)
    np.testing.assert_array_equal(densified(array), array)


def test_densify_of_litert_reads_places_wider_than_16_bits() -> None:
    array = weights((2, 70_000), 0.99)
    array[:, -1] = 1
    np.testing.assert_array_equal(densified(array), array)


@pytest.mark.parametrize(
    ("columns", "dtype"), [(256, np.uint8), (257, np.uint16), (65_536, np.uint16), (65_537, np.int32)]
)
def test_places_take_the_narrowest_type_that_holds_the_last_column(columns: int, dtype: type[np.generic]) -> None:
    array = np.zeros((2, columns), np.float32)
    array[:, -1] = 1
    encoded = encode_rows(Constant.of(array))
    assert encoded is not None
    assert encoded[1].indices.dtype == dtype


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((8, 100), np.float32),  # A buffer without bytes is no constant to TFLite.
        np.ones((8, 100), np.float32),
        np.zeros((0, 4), np.float32),
        weights((8, 100), 0.5, np.int8),
        np.array([0, 0, 0, 0, 1], np.float32),
    ],
    ids=["zeros alone", "no zeros", "no numbers", "no smaller", "a vector"],
)
def test_what_would_not_be_smaller_or_no_constant_stays_dense(array: npt.NDArray[Any]) -> None:
    assert encode_rows(Constant.of(array)) is None


def test_nan_is_kept_and_negative_zero_becomes_zero() -> None:
    array = np.zeros((4, 100), np.float32)
    array[0, :2] = np.nan, -0.0
    encoded = encode_rows(Constant.of(array))
    assert encoded is not None
    assert encoded[0].shape == (1,)
    assert np.isnan(decode_rows(encoded[0].array(), encoded[1], array.shape)[0, 0])
