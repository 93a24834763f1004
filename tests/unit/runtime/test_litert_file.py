"""What a `.tflite` file says about its tensors, operators and interface."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.errors import ModelError
from onnxprune.graph.tensor_graph import GraphTensor
from onnxprune.runtime.litert_file import read_litert_file
from tests.tflite_files import Node, Tensor, packed, tflite_file
from tests.tflite_twins import tflite_twin

F32 = np.float32
RELU = [Node(name="RELU", inputs=["x"], outputs=["y"])]


def test_graph_has_operators_in_order_with_the_onnx_types_that_comparisons_know() -> None:
    graph = read_litert_file(tflite_twin(), "'twin'").graph
    assert [(node.op_type, node.onnx_type) for node in graph.nodes] == [
        ("CONV_2D", "CONV_2D"),
        ("RELU", "Relu"),
        ("MEAN", "MEAN"),
        ("MUL", "Mul"),
        ("FULLY_CONNECTED", "FULLY_CONNECTED"),
    ]
    assert [node.name for node in graph.nodes] == ["c", "r", "m", "scaled", "y"]
    assert graph.nodes[0].reads == ("x", "w", "b")
    assert list(graph.computed) == ["c", "r", "m", "scaled", "y"]
    assert [node.name for node in graph.readers["r"]] == ["m"]
    assert graph.tensors["y"] == GraphTensor(name="y", is_output=True)  # of a size that is left open
    assert graph.tensors["w"].is_constant
    assert not graph.tensors["axes"].may_be_float


def test_what_is_computed_from_constants_alone_is_constant() -> None:
    content = tflite_file(
        tensors={
            "x": Tensor(shape=(2,), dtype=F32),
            "half": Tensor(shape=(2,), dtype=np.float16, data=np.ones(2)),
            "whole": Tensor(shape=(2,), dtype=F32),
            "y": Tensor(shape=(2,), dtype=F32),
        },
        operators=[
            Node(name="DEQUANTIZE", inputs=["half"], outputs=["whole"]),
            Node(name="ADD", inputs=["x", "whole"], outputs=["y"], options_type="AddOptions"),
        ],
        inputs=["x"],
        outputs=["y"],
    )
    tensors = read_litert_file(content, "'net'").graph.tensors
    assert {name: tensor.is_constant for name, tensor in tensors.items()} == {
        "x": False, "half": True, "whole": True, "y": False,
    }  # fmt: skip


def test_integers_with_a_scale_may_be_compared_and_those_without_may_not() -> None:
    content = tflite_file(
        tensors={
            "x": Tensor(shape=(2,), scales=(0.5,), zero_point=3),
            "y": Tensor(shape=(2,), dtype=np.int32),
        },
        operators=[Node(name="CAST", inputs=["x"], outputs=["y"])],
        inputs=["x"],
        outputs=["y"],
    )
    file = read_litert_file(content, "'net'")
    assert file.graph.tensors["x"].may_be_float
    assert not file.graph.tensors["y"].may_be_float
    assert file.inputs[0].zero_points == (3,)


def test_name_that_two_tensors_inside_have_stands_for_none_of_them() -> None:
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(tflite_twin(), 0)
    named = {tensor.name: tensor for tensor in model.subgraphs[0].tensors}
    named[b"scaled"].name = b"m"
    file = read_litert_file(packed(model), "'twin'")
    assert "m" not in file.tensors
    assert list(file.graph.computed) == ["c", "r", "y"]


def test_only_signature_counts_whatever_its_name_and_of_several_the_default_one() -> None:
    tensor = Tensor(shape=(2,), dtype=F32)

    def names(*keys: str) -> tuple[str, str]:
        signatures = {key: {f"{key}_in": "x", f"{key}_out": "y"} for key in keys}
        content = tflite_file(
            tensors={"x": tensor, "y": tensor}, operators=RELU, inputs=["x"], outputs=["y"], signatures=signatures
        )
        file = read_litert_file(content, "'net'")
        return file.inputs[0].name, file.outputs[0].name

    assert names("own") == ("own_in", "own_out")
    assert names("own", "serving_default") == ("serving_default_in", "serving_default_out")
    assert names("one", "two") == ("x", "y")


def test_signature_of_another_subgraph_is_refused() -> None:
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(tflite_twin(), 0)
    model.signatureDefs[0].subgraphIndex = 1
    with pytest.raises(ModelError, match="its signature 'serving_default' names subgraph 1"):
        read_litert_file(packed(model), "'twin'")


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_scale_that_is_no_size_is_refused(scale: float) -> None:
    tensors = {"x": Tensor(shape=(2,), scales=(scale,)), "y": Tensor(shape=(2,), scales=(1.0,))}
    content = tflite_file(tensors=tensors, operators=RELU, inputs=["x"], outputs=["y"])
    with pytest.raises(ModelError, match="'x' has 1 scales and 1 zero points"):
        read_litert_file(content, "'net'")


def test_metadata_behind_the_flatbuffer_is_read_as_large_files_store_it() -> None:
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(tflite_twin(), 0)
    text = b'{"made": "large"}'
    (entry,) = [entry for entry in model.metadata if entry.name == b"onnxprune"]
    buffer = model.buffers[entry.buffer]
    buffer.data, buffer.offset, buffer.size = None, 1 << 20, len(text)
    content = packed(model).ljust(1 << 20, b"\0") + text
    assert read_litert_file(content, "'twin'").metadata["onnxprune"] == text.decode()


@pytest.mark.parametrize("integers", [b"{", b'{"x": 1}', b"[1]"])
def test_list_of_integers_that_makes_no_sense_is_refused_instead_of_guessed(integers: bytes) -> None:
    content = tflite_file(
        tensors={"x": Tensor(shape=(2,), dtype=F32), "y": Tensor(shape=(2,), dtype=F32)},
        operators=RELU,
        inputs=["x"],
        outputs=["y"],
        metadata={"onnxprune.integers": integers},
    )
    with pytest.raises(ModelError, match=r"'onnxprune\.integers' is no JSON list of names"):
        read_litert_file(content, "'net'")
