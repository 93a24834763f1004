"""Damaged, hostile and unsupported files are refused with a message that names the thing."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxprune.errors import ModelError
from onnxprune.graph.io import load_model


def small_proto() -> onnx.ModelProto:
    """x [1,4] -> MatMul with w -> Relu -> y"""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"], name="mm"), helper.make_node("Relu", ["h"], ["y"], name="relu")],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])],
        [numpy_helper.from_array(np.ones((4, 3), np.float32), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def write(proto: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def refusal(path: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load_model(path)
    assert "model.onnx" in caught.value.message
    return caught.value


def refusal_of(proto: onnx.ModelProto, folder: Path) -> str:
    return refusal(write(proto, folder)).message


# --- bytes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(b"", "is empty", id="empty"),
        pytest.param(b"just some text\n", "is a text file", id="text"),
        pytest.param(b"\x00\xff\xfe" * 50, "can't be parsed", id="noise"),
        pytest.param(b"PK\x03\x04rest", "a ZIP archive", id="zip"),
        pytest.param(b"\x1c\x00\x00\x00TFL3rest", "a TFLite model", id="tflite"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer", id="lfs"),
        pytest.param(b"<!doctype html><html>", "a web page", id="html"),
        pytest.param(b"\x89HDF\r\n\x1a\n", "an HDF5 file", id="hdf5"),
    ],
)
def test_file_that_is_no_onnx_model_is_refused_and_named_for_what_it_is(
    tmp_path: Path, content: bytes, said: str
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert said in refusal(path).message


def test_truncated_file_is_refused_wherever_it_was_cut(tmp_path: Path) -> None:
    whole = small_proto().SerializeToString()
    path = tmp_path / "model.onnx"
    for length in range(1, len(whole) - 1, 7):
        path.write_bytes(whole[:length])
        refusal(path)


def test_file_with_a_flipped_byte_is_loaded_or_refused_but_never_crashes(tmp_path: Path) -> None:
    whole = bytearray(small_proto().SerializeToString())
    path = tmp_path / "model.onnx"
    refused = 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            load_model(path)
        except ModelError:
            refused += 1
    # Most of it is structure; in the rest are weights, whose bytes may be anything.
    assert len(whole) / 4 < refused < len(whole)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="There is no file"):
        load_model(tmp_path / "model.onnx")
    (tmp_path / "saved_model").mkdir()
    with pytest.raises(ModelError, match="is not a file"):
        load_model(tmp_path / "saved_model")


def test_file_above_two_gigabytes_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(small_proto().SerializeToString())
    os.truncate(path, 2**31 + 5)  # sparse: takes no room on disk
    assert "the format (protobuf) ends at 2 GiB" in refusal(path).message


# --- versions ---------------------------------------------------------------------------------------------------


def test_unknown_versions_are_refused(tmp_path: Path) -> None:
    proto = small_proto()
    proto.ir_version = 99
    assert "IR version 99" in refusal_of(proto, tmp_path)
    proto = small_proto()
    proto.opset_import[0].version = 999
    assert "opset 999" in refusal_of(proto, tmp_path)
    proto = small_proto()
    proto.opset_import[0].version = 5
    assert "opset 5" in refusal_of(proto, tmp_path)
    proto = small_proto()
    proto.opset_import.add(domain="ai.onnx", version=19)
    assert "in two versions" in refusal_of(proto, tmp_path)


def test_node_of_a_domain_that_is_not_imported_is_refused(tmp_path: Path) -> None:
    proto = small_proto()
    proto.graph.node[1].domain = "com.acme"
    assert "node 'relu' (Relu) is from the operator domain 'com.acme'" in refusal_of(proto, tmp_path)


# --- what would vanish or fail opaquely -------------------------------------------------------------------------


def test_training_information_is_refused_instead_of_dropped(tmp_path: Path) -> None:
    proto = small_proto()
    proto.training_info.add()
    assert "training_info" in refusal_of(proto, tmp_path)


def test_sparse_initializer_becomes_a_dense_one_of_the_same_name(tmp_path: Path) -> None:
    proto = small_proto()
    del proto.graph.initializer[:]
    values = numpy_helper.from_array(np.array([2.0, 3.0], np.float32), "w")
    indices = numpy_helper.from_array(np.array([[0, 1], [3, 2]], np.int64), "w_indices")
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4, 3]))

    model = load_model(write(proto, tmp_path))

    expected = np.zeros((4, 3), np.float32)
    expected[0, 1], expected[3, 2] = 2.0, 3.0
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), expected)


def test_sparse_tensor_that_would_explode_is_refused_by_name(tmp_path: Path) -> None:
    proto = small_proto()
    values = numpy_helper.from_array(np.ones(1, np.float32), "bomb")
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "i")
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [2**20, 2**20]))
    assert "'bomb'" in refusal_of(proto, tmp_path)


def test_sparse_index_outside_of_the_tensor_is_refused(tmp_path: Path) -> None:
    proto = small_proto()
    values = numpy_helper.from_array(np.ones(1, np.float32), "sparse")
    indices = numpy_helper.from_array(np.array([99], np.int64), "i")
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4, 3]))
    assert "index outside" in refusal_of(proto, tmp_path)


def test_map_and_sequence_types_are_refused_by_name(tmp_path: Path) -> None:
    proto = small_proto()
    output = proto.graph.output.add(name="probabilities")
    output.type.sequence_type.elem_type.map_type.key_type = TensorProto.INT64
    output.type.sequence_type.elem_type.map_type.value_type.tensor_type.elem_type = TensorProto.FLOAT
    assert "'probabilities' is a map" in refusal_of(proto, tmp_path)
    proto = small_proto()
    proto.graph.input.append(helper.make_tensor_sequence_value_info("boxes", TensorProto.FLOAT, None))
    assert "input 'boxes' is a sequence" in refusal_of(proto, tmp_path)


# --- names ------------------------------------------------------------------------------------------------------


def rename_output(proto: onnx.ModelProto, name: str) -> None:
    proto.graph.node[1].output[0] = proto.graph.output[0].name = name


def rename_node(proto: onnx.ModelProto, name: str) -> None:
    proto.graph.node[0].name = name


@pytest.mark.parametrize("rename", [rename_output, rename_node])
@pytest.mark.parametrize("name", ["a\x1b[31mred", "two\nlines", "bell\x07", "back\u202ewards", "zero\x00"])
def test_name_with_control_characters_is_refused_and_shown_escaped(
    tmp_path: Path, rename: Callable[[onnx.ModelProto, str], None], name: str
) -> None:
    proto = small_proto()
    rename(proto, name)
    message = refusal_of(proto, tmp_path)
    assert "control or invisible characters" in message
    assert message.isprintable()


def test_name_in_another_script_is_fine(tmp_path: Path) -> None:
    proto = small_proto()
    rename_output(proto, "выход/出力")
    assert load_model(write(proto, tmp_path)).graph.outputs[0].name == "выход/出力"


# --- dimensions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [[-4, 3], [2**62, 4], [2**31, 2**31, 2**31], [0, 2**62]])
def test_tensor_with_impossible_dimensions_is_refused_by_name(tmp_path: Path, dims: list[int]) -> None:
    proto = small_proto()
    del proto.graph.initializer[0].dims[:]
    proto.graph.initializer[0].dims.extend(dims)
    assert "tensor 'w'" in refusal_of(proto, tmp_path)


def test_tensor_with_more_or_less_data_than_its_shape_is_refused(tmp_path: Path) -> None:
    for raw_data in (b"\0" * 47, b"\0" * 52, b""):
        proto = small_proto()
        proto.graph.initializer[0].raw_data = raw_data
        assert "tensor 'w' of shape [4, 3] (FLOAT) needs 48 bytes" in refusal_of(proto, tmp_path)
    proto = small_proto()
    proto.graph.initializer[0].ClearField("raw_data")
    proto.graph.initializer[0].float_data.extend([1.0] * 11)
    assert "needs 12 entries but has 11" in refusal_of(proto, tmp_path)


def test_huge_tensor_without_data_is_refused_before_it_is_allocated(tmp_path: Path) -> None:
    # onnx_ir would make zeros of that shape: 16 TiB.
    proto = small_proto()
    del proto.graph.initializer[0].dims[:]
    proto.graph.initializer[0].dims.extend([2**21, 2**21])
    proto.graph.initializer[0].ClearField("raw_data")
    assert "tensor 'w'" in refusal_of(proto, tmp_path)


def test_tensor_in_an_attribute_is_checked_too(tmp_path: Path) -> None:
    proto = small_proto()
    constant = helper.make_node("Constant", [], ["c"], name="const", value=numpy_helper.from_array(np.ones(3)))
    constant.attribute[0].t.dims[0] = 10**12
    proto.graph.node.append(constant)
    assert "'const.value'" in refusal_of(proto, tmp_path)


@pytest.mark.parametrize("size", [-1, -7, 2**40])
def test_impossible_dimension_of_an_input_is_refused_by_name(tmp_path: Path, size: int) -> None:
    proto = small_proto()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = size
    assert f"value 'x' has a dimension of {size}" in refusal_of(proto, tmp_path)


@pytest.mark.parametrize(
    "array", [np.array([1, -2, 7], np.int8), np.array([True, False]), np.array([0.5, 2], np.float16)]
)
def test_tensors_of_all_storage_forms_pass(tmp_path: Path, array: np.ndarray) -> None:
    proto = small_proto()
    proto.graph.initializer.append(numpy_helper.from_array(array, "raw"))
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    proto.graph.initializer.append(helper.make_tensor("listed", kind, array.shape, array.tolist()))
    model = load_model(write(proto, tmp_path))
    for name in ("raw", "listed"):
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None
        np.testing.assert_array_equal(tensor.numpy(), array)


# --- structure --------------------------------------------------------------------------------------------------


def test_cycle_is_refused_and_its_nodes_are_named(tmp_path: Path) -> None:
    proto = small_proto()
    proto.graph.node[0].input[0] = "y"
    message = refusal_of(proto, tmp_path)
    assert "cycle" in message
    assert "'mm'" in message
    assert "'relu'" in message


def test_cycle_through_a_subgraph_is_refused(tmp_path: Path) -> None:
    proto = small_proto()
    body = helper.make_graph(
        [helper.make_node("Identity", ["later"], ["inner"])],
        "body",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    proto.graph.initializer.append(numpy_helper.from_array(np.array(True), "condition"))
    branch = helper.make_node("If", ["condition"], ["earlier"], name="branch", then_branch=body, else_branch=body)
    proto.graph.node.append(branch)
    proto.graph.node.append(helper.make_node("Relu", ["earlier"], ["later"], name="after"))
    assert "cycle" in refusal_of(proto, tmp_path)


def test_nodes_in_any_order_are_accepted(tmp_path: Path) -> None:
    proto = small_proto()
    nodes = [proto.graph.node[1], proto.graph.node[0]]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(copies)
    assert len(load_model(write(proto, tmp_path)).graph) == 2


def test_value_defined_twice_is_refused(tmp_path: Path) -> None:
    proto = small_proto()
    proto.graph.node.append(helper.make_node("Relu", ["x"], ["h"], name="again"))
    assert "value 'h' is defined twice, the second time by node 'again' (Relu)" in refusal_of(proto, tmp_path)
    proto = small_proto()
    proto.graph.node.append(helper.make_node("Relu", ["x"], ["w"], name="again"))
    assert "value 'w' is defined twice" in refusal_of(proto, tmp_path)


def test_two_inputs_initializers_or_outputs_of_one_name_are_refused(tmp_path: Path) -> None:
    for part in ("input", "initializer", "output"):
        proto = small_proto()
        values = getattr(proto.graph, part)
        values.append(values[0])
        assert f"there are two {part}s named" in refusal_of(proto, tmp_path)


def test_undefined_input_and_output_are_refused(tmp_path: Path) -> None:
    proto = small_proto()
    proto.graph.node[0].input[1] = "nowhere"
    assert "node 'mm' (MatMul) uses the value 'nowhere', which nothing defines" in refusal_of(proto, tmp_path)
    proto = small_proto()
    proto.graph.output[0].name = "nothing"
    assert "output 'nothing' is not defined" in refusal_of(proto, tmp_path)


def nested(depth: int) -> onnx.GraphProto:
    output = helper.make_tensor_value_info(f"o{depth}", TensorProto.FLOAT, None)
    if depth == 0:
        return helper.make_graph([helper.make_node("Relu", ["x"], ["o0"])], "leaf", [], [output])
    body = nested(depth - 1)
    node = helper.make_node("If", ["condition"], [f"o{depth}"], then_branch=body, else_branch=body)
    return helper.make_graph([node], f"g{depth}", [], [output])


def test_deeply_nested_subgraphs_are_refused(tmp_path: Path) -> None:
    proto = small_proto()
    proto.graph.initializer.append(numpy_helper.from_array(np.array(True), "condition"))
    inner = nested(0)
    for depth in range(1, 25):
        output = helper.make_tensor_value_info(f"o{depth}", TensorProto.FLOAT, None)
        node = helper.make_node("If", ["condition"], [f"o{depth}"], then_branch=inner)
        inner = helper.make_graph([node], f"g{depth}", [], [output])
    proto.graph.node.extend(inner.node)
    assert "nested more than 16 deep" in refusal_of(proto, tmp_path)


def test_subgraphs_beyond_the_parsers_own_depth_are_refused(tmp_path: Path) -> None:
    def field(number: int, payload: bytes) -> bytes:
        length, size = len(payload), b""
        while length > 127:
            size += bytes([length & 127 | 128])
            length >>= 7
        return bytes([number << 3 | 2]) + size + bytes([length]) + payload

    graph = b""
    for _ in range(500):
        # GraphProto.node (1) holds NodeProto.attribute (5), which holds AttributeProto.g (6).
        graph = field(1, field(5, field(6, graph)))
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x08\x0a" + field(7, graph))
    assert "can't be parsed" in refusal(path).message


def function(name: str, calls: list[str]) -> onnx.FunctionProto:
    nodes = [
        helper.make_node(call, [f"v{index}"], [f"v{index + 1}"], domain="local") for index, call in enumerate(calls)
    ]
    nodes.append(helper.make_node("Relu", [f"v{len(calls)}"], ["out"]))
    return helper.make_function(
        "local", name, ["v0"], ["out"], nodes, [helper.make_opsetid("", 20), helper.make_opsetid("local", 1)]
    )


def with_functions(*functions: onnx.FunctionProto, call: str) -> onnx.ModelProto:
    proto = small_proto()
    proto.functions.extend(functions)
    proto.opset_import.add(domain="local", version=1)
    proto.graph.node[1].CopyFrom(helper.make_node(call, ["h"], ["y"], name="call", domain="local"))
    return proto


def test_functions_that_call_each_other_in_a_circle_are_refused(tmp_path: Path) -> None:
    proto = with_functions(function("A", ["B"]), function("B", ["A"]), call="A")
    assert "functions call each other in a circle: A -> B -> A" in refusal_of(proto, tmp_path)


def test_functions_that_double_at_each_level_are_refused_before_they_are_inlined(tmp_path: Path) -> None:
    # 40 small functions stand for 2**40 nodes.
    levels = [function(f"F{i}", [f"F{i + 1}", f"F{i + 1}"]) for i in range(40)]
    proto = with_functions(*levels, function("F40", []), call="F0")
    assert "when its functions are inlined" in refusal_of(proto, tmp_path)


def test_long_chain_of_functions_does_not_exhaust_the_stack(tmp_path: Path) -> None:
    levels = [function(f"F{i}", [f"F{i + 1}"]) for i in range(2000)]
    proto = with_functions(*levels, function("F2000", []), call="F0")
    assert len(load_model(write(proto, tmp_path)).functions) == 2001


# --- external data ----------------------------------------------------------------------------------------------


def external_proto(folder: Path, **entries: str) -> onnx.ModelProto:
    proto = small_proto()
    tensor = proto.graph.initializer[0]
    (folder / "model.data").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "model.data", **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return proto


def test_external_data_beside_the_model_are_read(tmp_path: Path) -> None:
    model = load_model(write(external_proto(tmp_path), tmp_path))
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), np.ones((4, 3), np.float32))


@pytest.mark.parametrize(
    "location", ["../secret", "/etc/hostname", "sub/../../secret", "", "C:\\secret", "..\\secret", "\\\\host\\share"]
)
@pytest.mark.parametrize("relative", [False, True])
def test_external_data_that_leave_the_folder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str, relative: bool
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"\0" * 48)
    path = write(external_proto(folder, location=location), folder)
    # onnx_ir's own check is off for a bare file name.
    monkeypatch.chdir(folder)
    message = refusal(Path("model.onnx") if relative else path).message
    assert "tensor 'w'" in message


def test_symlinked_external_data_are_refused_with_the_way_out(tmp_path: Path) -> None:
    # The layout of Hugging Face's cache: snapshots hold links into a folder of blobs.
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    proto = external_proto(blobs)
    write(proto, blobs)
    (snapshot / "model.onnx").symlink_to(blobs / "model.onnx")
    (snapshot / "model.data").symlink_to(blobs / "model.data")
    error = refusal(snapshot / "model.onnx")
    assert "symbolic link" in error.message
    assert "Hugging Face" in error.hint
    assert "cp -L" in error.hint


def test_link_to_a_data_file_in_the_same_folder_is_followed(tmp_path: Path) -> None:
    path = write(external_proto(tmp_path, location="link.data"), tmp_path)
    (tmp_path / "link.data").symlink_to("model.data")
    assert "w" in load_model(path).graph.initializers


def test_missing_and_short_data_files_are_refused(tmp_path: Path) -> None:
    path = write(external_proto(tmp_path), tmp_path)
    (tmp_path / "model.data").write_bytes(b"\0" * 47)
    assert "needs 48 bytes from byte 0 on, but 'model.data' ends at byte 47" in refusal(path).message
    (tmp_path / "model.data").unlink()
    assert "there is no such file" in refusal(path).message


@pytest.mark.parametrize(
    "entries",
    [{"offset": "-8"}, {"offset": "9" * 30}, {"length": "12"}, {"length": "-48"}, {"offset": "0x10"}, {"offset": "4"}],
    ids=str,
)
def test_impossible_offset_and_length_are_refused(tmp_path: Path, entries: dict[str, str]) -> None:
    assert "tensor 'w'" in refusal_of(external_proto(tmp_path, **entries), tmp_path)


def test_data_file_that_is_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    path = write(external_proto(tmp_path, location="pipe"), tmp_path)
    os.mkfifo(tmp_path / "pipe")
    outcome: list[str] = []
    thread = threading.Thread(target=lambda: outcome.append(refusal(path).message), daemon=True)
    thread.start()
    thread.join(20)
    assert outcome
    assert "not a plain file" in outcome[0]
