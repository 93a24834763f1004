"""Saving and loading: round trips, atomic writing, external data, and what is stored once."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxprune.errors import ModelError, OutputError
from onnxprune.graph import writer
from onnxprune.graph.canonical import canonicalize
from onnxprune.graph.external import FileTensor
from onnxprune.graph.io import external_data_files, load_model, model_bytes, save_model
from onnxprune.graph.metadata import MODULE_PATH_KEY, module_path
from onnxprune.graph.weights import iter_windows, replace_weight, replace_weight_lazily
from onnxprune.ops.shapes import SHAPES

CHANNELS = 256


def layered_proto(num_layers: int = 4, *, equal_biases: bool = True) -> onnx.ModelProto:
    """x [N,256] -> (MatMul -> Add) for each layer; all layers may share one bias."""
    rng = np.random.default_rng(0)
    nodes, weights, name = [], [], "x"
    for layer in range(num_layers):
        bias = "bias" if equal_biases else f"bias{layer}"
        nodes.append(helper.make_node("MatMul", [name, f"w{layer}"], [f"m{layer}"], name=f"layer{layer}/matmul"))
        nodes.append(helper.make_node("Add", [f"m{layer}", bias], [f"a{layer}"], name=f"layer{layer}/add"))
        weights.append(numpy_helper.from_array(rng.random((CHANNELS, CHANNELS), np.float32), f"w{layer}"))
        name = f"a{layer}"
    biases = ["bias"] if equal_biases else [f"bias{layer}" for layer in range(num_layers)]
    weights.extend(numpy_helper.from_array(np.ones((64, CHANNELS), np.float32), bias) for bias in biases)
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", CHANNELS])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10, producer_name="tests")


def written(proto: onnx.ModelProto, path: Path, *, external: bool = False) -> Path:
    onnx.save(proto, path, save_as_external_data=external, location=f"{path.name}.data", size_threshold=0)
    return path


def arrays(model: ir.Model) -> dict[str, np.ndarray]:
    return {
        name: value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }


def no_leftovers(folder: Path) -> bool:
    return not list(folder.glob(".*")) and not list(folder.glob("*.part"))


# --- round trips ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("external", [False, True])
def test_saved_model_has_the_same_weights_nodes_and_interface(tmp_path: Path, external: bool) -> None:
    model = load_model(written(layered_proto(), tmp_path / "source.onnx", external=external))
    save_model(model, tmp_path / "copy.onnx", external_data=external)

    copy = load_model(tmp_path / "copy.onnx")
    assert [node.name for node in copy.graph] == [node.name for node in model.graph]
    assert [(v.name, str(v.shape)) for v in copy.graph.inputs] == [("x", "[N,256]")]
    assert copy.producer_name == "tests"
    for name, array in arrays(model).items():
        np.testing.assert_array_equal(arrays(copy)[name], array)
    expected = (tmp_path / "copy.onnx.data",) if external else ()
    assert external_data_files(tmp_path / "copy.onnx") == expected
    assert no_leftovers(tmp_path)


def test_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    path = written(layered_proto(), tmp_path / "source.onnx")
    first, second = load_model(path), load_model(path)
    # The order in which metadata were set must not show.
    first.metadata_props.update({"b": "2", "a": "1"})
    second.metadata_props.update({"a": "1", "b": "2"})
    assert model_bytes(first) == model_bytes(second)
    for name, model in (("first", first), ("second", second)):
        (tmp_path / name).mkdir()
        save_model(model, tmp_path / name / "model.onnx", external_data=True)
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_strings_small_integers_and_bfloat16_survive(tmp_path: Path) -> None:
    proto = layered_proto()
    proto.graph.initializer.append(helper.make_tensor("words", TensorProto.STRING, [2], ["a\0b", "é"]))
    proto.graph.initializer.append(helper.make_tensor("nibbles", TensorProto.INT4, [3], [1, -8, 7]))
    proto.graph.initializer.append(helper.make_tensor("brain", TensorProto.BFLOAT16, [2], [1.5, -2.0]))
    model = load_model(written(proto, tmp_path / "source.onnx"))
    save_model(model, tmp_path / "copy.onnx")
    copy = onnx.load(tmp_path / "copy.onnx")
    tensors = {tensor.name: tensor for tensor in copy.graph.initializer}
    assert list(tensors["words"].string_data) == [b"a\0b", "é".encode()]
    assert numpy_helper.to_array(tensors["nibbles"]).astype(int).tolist() == [1, -8, 7]
    assert numpy_helper.to_array(tensors["brain"]).astype(float).tolist() == [1.5, -2.0]


def test_model_in_subgraphs_is_written_with_its_weights(tmp_path: Path) -> None:
    body = helper.make_graph(
        [helper.make_node("Mul", ["x", "inner_weight"], ["inner"])],
        "body",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.arange(CHANNELS, dtype=np.float32), "inner_weight")],
    )
    proto = layered_proto(1)
    proto.graph.initializer.append(numpy_helper.from_array(np.array(True), "condition"))
    proto.graph.node.append(helper.make_node("If", ["condition"], ["out"], then_branch=body, else_branch=body))
    model = load_model(written(proto, tmp_path / "source.onnx"))
    save_model(model, tmp_path / "copy.onnx", external_data=True)
    copy = load_model(tmp_path / "copy.onnx")
    inner = next(iter(copy.graph.subgraphs())).initializers["inner_weight"].const_value
    assert inner is not None
    np.testing.assert_array_equal(inner.numpy(), np.arange(CHANNELS, dtype=np.float32))


# --- what is written and what is not ----------------------------------------------------------------------------


def test_unshared_and_equal_weights_are_stored_once(tmp_path: Path) -> None:
    path = written(layered_proto(4, equal_biases=True), tmp_path / "source.onnx")
    model = canonicalize(load_model(path), shape_rules=SHAPES)
    assert len([name for name in model.graph.initializers if name.startswith("bias")]) == 4
    for external in (False, True):
        save_model(model, tmp_path / "copy.onnx", external_data=external)
        copy = onnx.load(tmp_path / "copy.onnx")
        assert [t.name for t in copy.graph.initializer if t.name.startswith("bias")] == ["bias"]
        onnx.checker.check_model(copy)
    # Equal by content, not only by identity.
    model = load_model(written(layered_proto(4, equal_biases=False), tmp_path / "source.onnx"))
    for external in (False, True):
        save_model(model, tmp_path / "copy.onnx", external_data=external)
        names = [t.name for t in onnx.load(tmp_path / "copy.onnx").graph.initializer]
        assert [name for name in names if name.startswith("bias")] == ["bias0"]


def test_weights_that_differ_in_one_element_are_not_merged(tmp_path: Path) -> None:
    model = load_model(written(layered_proto(3, equal_biases=False), tmp_path / "source.onnx"))
    other = np.ones((64, CHANNELS), np.float32)
    other[13, 117] = 2.0
    replace_weight(model.graph.initializers["bias1"], other)
    for external in (False, True):
        save_model(model, tmp_path / "copy.onnx", external_data=external)
        copy = load_model(tmp_path / "copy.onnx")
        assert set(copy.graph.initializers) >= {"bias0", "bias1"}
        assert "bias2" not in copy.graph.initializers
        np.testing.assert_array_equal(arrays(copy)["bias1"], other)


@pytest.mark.parametrize("external", [False, True])
def test_run_that_does_nothing_does_not_grow_the_file_by_more_than_one_percent(tmp_path: Path, external: bool) -> None:
    path = written(layered_proto(6), tmp_path / "source.onnx", external=external)
    save_model(canonicalize(load_model(path), shape_rules=SHAPES), tmp_path / "copy.onnx", external_data=external)

    def total(stem: str) -> int:
        return sum(file.stat().st_size for file in tmp_path.glob(f"{stem}.onnx*"))

    assert total("copy") <= 1.01 * total("source")


def test_real_model_does_not_grow_by_more_than_one_percent(tmp_path: Path, shared_data: Path) -> None:
    from onnxprune.convert.onnx_file import load_onnx

    path = shared_data / "fastestdet" / "FastestDet.onnx"
    save_model(load_onnx(path), tmp_path / "copy.onnx")
    assert (tmp_path / "copy.onnx").stat().st_size <= 1.01 * path.stat().st_size


def test_module_path_is_written_only_where_it_can_not_be_derived(tmp_path: Path) -> None:
    path = written(layered_proto(1), tmp_path / "source.onnx")
    model = canonicalize(load_model(path), shape_rules=SHAPES)
    first, second = model.graph
    assert module_path(first) == "layer0"
    second.metadata_props[MODULE_PATH_KEY] = "head"
    save_model(model, tmp_path / "copy.onnx")
    nodes = onnx.load(tmp_path / "copy.onnx").graph.node
    assert [len(node.metadata_props) for node in nodes] == [0, 1]
    again = canonicalize(load_model(tmp_path / "copy.onnx"), shape_rules=SHAPES)
    assert [module_path(node) for node in again.graph] == ["layer0", "head"]


# --- external data ----------------------------------------------------------------------------------------------


def test_big_weights_stay_on_disk_and_are_read_only(tmp_path: Path) -> None:
    model = load_model(written(layered_proto(1), tmp_path / "source.onnx", external=True))
    tensor = model.graph.initializers["w0"].const_value
    assert isinstance(tensor, FileTensor)
    with pytest.raises(ValueError, match="read-only"):
        tensor.numpy()[0, 0] = 1.0


@pytest.mark.parametrize("external", [False, True])
def test_saving_over_the_loaded_file_leaves_loaded_weights_as_they_were(tmp_path: Path, external: bool) -> None:
    path = written(layered_proto(2, equal_biases=False), tmp_path / "model.onnx", external=True)
    model = load_model(path)
    before = {name: array.copy() for name, array in arrays(model).items()}
    halved = model.clone()
    replace_weight(halved.graph.initializers["w0"], before["w0"][:, :128] * 0.5)

    save_model(halved, path, external_data=external)

    for name, array in arrays(model).items():
        np.testing.assert_array_equal(array, before[name])
    np.testing.assert_array_equal(arrays(load_model(path))["w0"], before["w0"][:, :128] * 0.5)


def test_data_file_changed_in_place_is_noticed(tmp_path: Path) -> None:
    path = written(layered_proto(1), tmp_path / "model.onnx", external=True)
    model = load_model(path)
    data = tmp_path / "model.onnx.data"
    data.write_bytes(b"\0" * (data.stat().st_size + 1))
    with pytest.raises(ModelError, match="was changed while the model loaded from it was in use"):
        arrays(model)


def test_more_data_files_than_descriptors_can_be_open(tmp_path: Path) -> None:
    nodes, weights = [], []
    for index in range(300):
        (tmp_path / f"w{index}").write_bytes(np.full(4, index, np.float32).tobytes())
        weight = TensorProto(
            name=f"w{index}", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL
        )
        weight.external_data.add(key="location", value=f"w{index}")
        weights.append(weight)
        nodes.append(helper.make_node("Add", [f"a{index}", f"w{index}"], [f"a{index + 1}"]))
    inputs = [helper.make_tensor_value_info("a0", TensorProto.FLOAT, [4])]
    outputs = [helper.make_tensor_value_info("a300", TensorProto.FLOAT, [4])]
    graph = helper.make_graph(nodes, "many", inputs, outputs, weights)
    path = tmp_path / "model.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1024), hard))
    try:
        model = load_model(path)
        found = arrays(model)
        assert [int(found[f"w{index}"][0]) for index in range(300)] == list(range(300))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_weights_above_the_limit_go_to_a_data_file_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(written(layered_proto(2), tmp_path / "source.onnx"))
    monkeypatch.setattr(writer, "BIG_WEIGHTS_BYTES", 100_000)
    save_model(model, tmp_path / "copy.onnx")
    assert external_data_files(tmp_path / "copy.onnx") == (tmp_path / "copy.onnx.data",)
    monkeypatch.setattr(writer, "MAX_PROTO_BYTES", 200_000)
    with pytest.raises(OutputError, match="don't fit into one file"):
        save_model(model, tmp_path / "inline.onnx", external_data=False)
    with pytest.raises(OutputError, match="too big for one ONNX file"):
        model_bytes(model)
    assert not (tmp_path / "inline.onnx").exists()


def test_lazy_weights_are_made_once_for_writing_and_kept_nowhere(tmp_path: Path) -> None:
    model = load_model(written(layered_proto(2), tmp_path / "source.onnx", external=True))
    calls = []

    def make() -> np.ndarray:
        calls.append(1)
        return np.full((CHANNELS, CHANNELS), 3.0, np.float32)

    replace_weight_lazily(model.graph.initializers["w1"], (CHANNELS, CHANNELS), ir.DataType.FLOAT, make)
    save_model(model, tmp_path / "copy.onnx", external_data=True)
    assert len(calls) == 1
    assert (arrays(load_model(tmp_path / "copy.onnx"))["w1"] == 3.0).all()


@pytest.mark.parametrize("max_bytes", [1, 4, 1000, 1 << 20])
def test_windows_cover_every_element_once_in_order(tmp_path: Path, max_bytes: int) -> None:
    weights = np.arange(300, dtype=np.float32).reshape(3, 100)
    graph = helper.make_graph([], "g", [], [], [numpy_helper.from_array(weights, "w")])
    graph.node.append(helper.make_node("Relu", ["w"], ["y"]))
    graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 100]))
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    for external in (False, True):
        model = load_model(written(proto, tmp_path / "model.onnx", external=external))
        windows = list(iter_windows(model.graph.initializers["w"], max_bytes))
        assert [window.start for window in windows] == list(range(0, 300, max(1, max_bytes // 4)))
        np.testing.assert_array_equal(np.concatenate([window.array for window in windows]), weights.reshape(-1))


_MEMORY_SCRIPT = """
import resource, sys
from pathlib import Path
from onnxprune.graph.io import load_model, save_model
from onnxprune.graph.canonical import canonicalize
from onnxprune.graph.weights import iter_windows, replace_weight_lazily
from onnxprune.ops.shapes import SHAPES
source, target = map(Path, sys.argv[1:])
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = canonicalize(load_model(source), shape_rules=SHAPES)
total = 0.0
for value in model.graph.initializers.values():
    for window in iter_windows(value, 4 << 20):
        total += float(window.array.sum())
value = model.graph.initializers["w0"]
tensor = value.const_value
replace_weight_lazily(value, tensor.shape.numpy(), tensor.dtype, lambda: tensor.numpy() * 0.5)
save_model(model, target, external_data=True)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) * 1024)
"""


def test_reading_changing_and_saving_a_big_model_takes_a_fraction_of_its_size(tmp_path: Path) -> None:
    weights = []
    with (tmp_path / "big.data").open("wb") as data:
        rng = np.random.default_rng(0)
        for index in range(12):
            data.write(rng.random(4_000_000, np.float32).tobytes())
            weight = TensorProto(name=f"w{index}", data_type=TensorProto.FLOAT, dims=[2000, 2000])
            weight.data_location = TensorProto.EXTERNAL
            for key, entry in (("location", "big.data"), ("offset", index * 16_000_000), ("length", 16_000_000)):
                weight.external_data.add(key=key, value=str(entry))
            weights.append(weight)
    nodes = [helper.make_node("MatMul", [f"a{i}", f"w{i}"], [f"a{i + 1}"]) for i in range(12)]
    graph = helper.make_graph(
        nodes,
        "big",
        [helper.make_tensor_value_info("a0", TensorProto.FLOAT, [1, 2000])],
        [helper.make_tensor_value_info("a12", TensorProto.FLOAT, [1, 2000])],
        weights,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "big.onnx").write_bytes(proto.SerializeToString())

    script = [sys.executable, "-c", _MEMORY_SCRIPT, str(tmp_path / "big.onnx"), str(tmp_path / "out.onnx")]
    grown_bytes = int(subprocess.run(script, check=True, capture_output=True, text=True).stdout)

    # 192 MB of weights pass through; one weight of 16 MB is computed: twice that, plus buffers.
    assert grown_bytes < 80e6
    # Big weights begin at whole pages.
    assert (tmp_path / "out.onnx.data").stat().st_size <= (tmp_path / "big.data").stat().st_size + 12 * 4096


# --- failures while writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("external", [False, True])
def test_full_disk_is_an_error_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool
) -> None:
    model = load_model(written(layered_proto(1), tmp_path / "source.onnx"))
    target = tmp_path / "out"
    target.mkdir()
    fdopen = os.fdopen

    class FullDisk:
        def __init__(self, file: IO[bytes]) -> None:
            self._file = file

        def write(self, content: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    monkeypatch.setattr(os, "fdopen", lambda descriptor, mode: FullDisk(fdopen(descriptor, mode)))
    with pytest.raises(OutputError, match="No space left on device") as caught:
        save_model(model, target / "copy.onnx", external_data=external)
    assert caught.value.exit_code == 11
    assert list(target.iterdir()) == []


def test_missing_or_forbidden_folder_is_an_output_error(tmp_path: Path) -> None:
    model = load_model(written(layered_proto(1), tmp_path / "source.onnx"))
    with pytest.raises(OutputError, match="No such file"):
        save_model(model, tmp_path / "missing" / "copy.onnx")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="Not a directory"):
        save_model(model, tmp_path / "file" / "copy.onnx")
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o555)
        with pytest.raises(OutputError, match="Permission denied"):
            save_model(model, tmp_path / "locked" / "copy.onnx")


def test_ctrl_c_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = written(layered_proto(1), tmp_path / "model.onnx")
    before = path.read_bytes()
    model = load_model(path)

    def interrupted() -> np.ndarray:
        raise KeyboardInterrupt

    replace_weight_lazily(model.graph.initializers["w0"], (CHANNELS, CHANNELS), ir.DataType.FLOAT, interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_model(model, path, external_data=True)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_written_files_have_ordinary_permissions(tmp_path: Path) -> None:
    model = load_model(written(layered_proto(1), tmp_path / "source.onnx"))
    save_model(model, tmp_path / "copy.onnx", external_data=True)
    umask = os.umask(0)
    os.umask(umask)
    for name in ("copy.onnx", "copy.onnx.data"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask
