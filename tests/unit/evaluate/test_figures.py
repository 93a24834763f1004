"""Static figures: which initializers are parameters, what zeros are, and what sparse storage would take."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from onnxprune.contracts import CanonicalModel
from onnxprune.errors import OutputError
from onnxprune.evaluate import figures
from onnxprune.evaluate.figures import model_figures, weight_figures, zipped_bytes


def initializer(name: str, array: npt.NDArray[Any], dtype: ir.DataType | None = None) -> ir.Value:
    return ir.val(name, const_value=ir.Tensor(array, dtype=dtype, name=name))


def model_of(*nodes: ir.Node, shape: tuple[int | str, ...] = ("batch", 3, 4, 4)) -> CanonicalModel:
    """A model whose first node's first input is the graph input 'x'; constants among the inputs are registered."""
    graph_input = nodes[0].inputs[0]
    assert graph_input is not None
    graph_input.shape, graph_input.dtype = ir.Shape(shape), ir.DataType.FLOAT
    constants = {v.name: v for node in nodes for v in node.inputs if v is not None and v.const_value is not None}
    graph = ir.Graph(
        [graph_input],
        nodes[-1].outputs,
        nodes=nodes,
        initializers=list(constants.values()),
        opset_imports={"": 21},
        name="g",
    )
    return CanonicalModel(ir.Model(graph, ir_version=10))


def x() -> ir.Value:
    return ir.val("x")


def conv(weight: npt.NDArray[Any], *, batch: int | str = "batch") -> CanonicalModel:
    out = ir.val("y", dtype=ir.DataType.FLOAT, shape=ir.Shape((batch, weight.shape[0], 4, 4)))
    bias = initializer("b", np.ones(weight.shape[0], np.float32))
    node = ir.node("Conv", [x(), initializer("w", weight), bias], {"pads": [1, 1, 1, 1]}, outputs=[out], name="conv")
    return model_of(node, shape=(batch, 3, 4, 4))


def test_weights_macs_and_the_shape_they_were_taken_at_are_counted() -> None:
    weight = np.ones((5, 3, 3, 3), np.float32)
    weight[0] = 0
    found = model_figures(conv(weight))
    assert (found.parameters, found.nonzero_parameters, found.weight_bytes) == (140, 113, 560)
    # One sample: 5 filters of 3*3*3 at 16 places.
    assert found.macs == 5 * 27 * 16
    assert found.shape_used == {"x": (1, 3, 4, 4)}
    assert (found.num_nodes, found.uncounted_ops) == (1, ())


def test_macs_of_a_fixed_batch_are_those_of_the_batch() -> None:
    assert model_figures(conv(np.ones((5, 3, 3, 3), np.float32), batch=2)).macs == 2 * 5 * 27 * 16


def test_sparse_storage_takes_what_its_definition_says() -> None:
    weight = np.zeros((4, 100), np.float32)
    weight[0, :7] = 1
    node = ir.node("MatMul", [x(), initializer("w", weight)], name="m")
    (found,) = weight_figures(model_of(node, shape=(1, 4)))
    assert (found.parameters, found.nonzero_parameters, found.dense_bytes) == (400, 7, 1600)
    assert found.sparse_bytes == {"coo": 7 * 12, "csr": 7 * 8 + 5 * 4, "bitmap": 7 * 4 + 50}
    assert found.smallest_storage == "csr"


def test_dense_weights_take_more_in_sparse_storage_and_it_shows() -> None:
    model = conv(np.ones((5, 3, 3, 3), np.float32))
    found = model_figures(model)
    assert found.sparse_bytes["coo"] == 3 * found.weight_bytes
    assert all(size > found.weight_bytes for size in found.sparse_bytes.values())
    assert {one.smallest_storage for one in weight_figures(model)} == {"dense"}


def test_integer_constants_and_settings_of_operators_are_no_parameters() -> None:
    resized = ir.node("Resize", [x(), None, initializer("scales", np.float32([1, 1, 2, 2]))], name="resize")
    clipped = ir.node(
        "Clip", [resized.outputs[0], initializer("low", np.float32(0)), initializer("high", np.float32(6))], name="clip"
    )
    reshaped = ir.node("Reshape", [clipped.outputs[0], initializer("shape", np.int64([1, -1]))], name="reshape")
    assert weight_figures(model_of(resized, clipped, reshaped)) == ()


def test_shared_weight_counts_once_even_where_one_reader_only_sets_something() -> None:
    shared = initializer("w", np.float32(6))
    clipped = ir.node("Clip", [x(), None, shared], name="clip")
    added = ir.node("Mul", [clipped.outputs[0], shared], name="mul")
    again = ir.node("Add", [added.outputs[0], shared], name="add")
    (found,) = weight_figures(model_of(clipped, added, again))
    assert (found.name, found.parameters) == ("w", 1)
    assert set(found.sparse_bytes.values()) == {found.dense_bytes}


def qdq(weight: npt.NDArray[Any], zero_point: npt.NDArray[Any], scale: Any, **attributes: Any) -> CanonicalModel:
    dequantized = ir.node(
        "DequantizeLinear",
        [initializer("w", weight), initializer("s", np.float32(scale)), initializer("z", zero_point)],
        attributes,
        name="dq",
    )
    product = ir.node("MatMul", [x(), dequantized.outputs[0]], name="m")
    model = model_of(product, shape=(1, weight.shape[0]))
    for value in dequantized.inputs:
        assert value is not None
        model.graph.register_initializer(value)
    model.graph.insert_before(product, dequantized)
    return model


def test_quantized_weights_are_parameters_and_their_zero_point_is_zero() -> None:
    weight = np.array([[128, 0], [5, 128]], np.uint8)
    (found,) = weight_figures(qdq(weight, np.uint8(128), 0.1))
    assert (found.name, found.parameters, found.nonzero_parameters, found.dense_bytes) == ("w", 4, 2, 4)


def test_each_channel_has_its_own_zero_point() -> None:
    weight = np.array([[1, 2, 3], [1, 2, 3]], np.uint8)
    points = np.array([1, 0, 3], np.uint8)
    assert weight_figures(qdq(weight, points, [1, 1, 1], axis=1))[0].nonzero_parameters == 2
    assert weight_figures(qdq(weight.T.copy(), points, [1, 1, 1], axis=0))[0].nonzero_parameters == 2
    assert weight_figures(qdq(weight, points, [1, 1, 1], axis=-1))[0].nonzero_parameters == 2


def test_blocks_have_their_own_zero_points() -> None:
    weight = np.array([[1], [1], [2], [2]], np.uint8)
    found = weight_figures(qdq(weight, np.array([[1], [2]], np.uint8), [[1], [1]], axis=0, block_size=2))
    assert found[0].nonzero_parameters == 0


@pytest.mark.parametrize("window_bytes", [1, 3, 1 << 20])
def test_counts_do_not_depend_on_the_window(window_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_WINDOW_BYTES", window_bytes)
    weight = np.random.default_rng(0).integers(0, 3, (7, 5, 3), dtype=np.uint8)
    points = np.array([0, 1, 2, 1, 0], np.uint8)
    expected = int((weight != points[:, None]).sum())
    assert weight_figures(qdq(weight, points, np.ones(5), axis=1))[0].nonzero_parameters == expected


def test_four_bit_weights_take_half_a_byte() -> None:
    packed = initializer("w", np.array([[0, 1, 2, -3]], ir.DataType.INT4.numpy()))
    scale = initializer("s", np.float32(1))
    dequantized = ir.node("DequantizeLinear", [packed, scale], name="dq")
    product = ir.node("MatMul", [x(), dequantized.outputs[0]], name="m")
    model = model_of(product, shape=(1, 1))
    model.graph.register_initializer(packed)
    model.graph.register_initializer(scale)
    model.graph.insert_before(product, dequantized)
    (found,) = weight_figures(model)
    assert (found.parameters, found.nonzero_parameters, found.dense_bytes) == (4, 3, 2)
    assert found.sparse_bytes["bitmap"] == 2 + 1


def test_half_precision_zeros_are_counted() -> None:
    weight = initializer("w", np.array([0, 1, -0.0, 2], ir.DataType.BFLOAT16.numpy()))
    (found,) = weight_figures(model_of(ir.node("Mul", [x(), weight], name="m"), shape=(4,)))
    assert (found.parameters, found.nonzero_parameters, found.dense_bytes) == (4, 2, 8)


def test_zipped_bytes_are_those_of_deflate(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(1_200_000) + bytes(1_200_000)
    (tmp_path / "a.bin").write_bytes(content)
    # zlib.compress adds a header of 2 and a checksum of 4 bytes.
    assert zipped_bytes(tmp_path / "a.bin") == len(zlib.compress(content, 6)) - 6
    with pytest.raises(OutputError, match=r"missing\.bin' can't be read"):
        zipped_bytes(tmp_path / "missing.bin")
