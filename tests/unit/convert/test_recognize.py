"""What a source is, by content first and name second."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxprune.convert.recognize import recognize
from onnxprune.convert.report import SourceKind
from onnxprune.errors import ModelError


def _archive(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/").replace("_dot_", "."), content)
    return path


def _onnx_bytes() -> bytes:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [value],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    return helper.make_model(graph, ir_version=8).SerializeToString()


@pytest.mark.parametrize("suffix", [".pt2", ".keras", ".bin"])
def test_archive_with_a_broken_directory_is_damaged(tmp_path: Path, suffix: str) -> None:
    path = _archive(tmp_path / f"net{suffix}", config_dot_json=b"{}")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"PK\x01\x02", b"PK\x01\xff"))  # the end record still points there

    with pytest.raises(ModelError, match=rf"Source '.*net\{suffix}' is damaged"):
        recognize(path)


@pytest.mark.parametrize(
    "source",
    ["n" * 5000 + ".onnx", "n" * 300 + ".py:make"],
    ids=["path", "factory"],
)
def test_name_that_is_too_long_for_the_system_is_an_error(source: str) -> None:
    with pytest.raises(ModelError, match="can't be looked for: File name too long") as caught:
        recognize(source)

    assert len(caught.value.message) < 200


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("model.onnx", _onnx_bytes(), SourceKind.ONNX),
        ("model.pb", _onnx_bytes(), SourceKind.ONNX),
        ("model.bin", _onnx_bytes(), SourceKind.ONNX),
        ("frozen.pb", b"\x0a\x10\x0a\x05input\x12\x0bPlaceholder", SourceKind.FROZEN_GRAPH),
        ("model.tflite", b"\x1c\x00\x00\x00TFL3rest", SourceKind.TFLITE),
        ("without_ending", b"\x1c\x00\x00\x00TFL3rest", SourceKind.TFLITE),
        ("weights.keras", b"\x89HDF\r\n\x1a\nrest", SourceKind.KERAS_H5),
        ("model.h5", b"\x89HDF\r\n\x1a\nrest", SourceKind.KERAS_H5),
    ],
)
def test_file_is_recognized_by_its_content(tmp_path: Path, name: str, content: bytes, kind: SourceKind) -> None:
    path = tmp_path / name
    path.write_bytes(content)

    found = recognize(str(path))

    assert (found.kind, found.name, found.path) == (kind, name, path)


def test_exported_program_and_keras_archives_are_told_apart(tmp_path: Path) -> None:
    exported = _archive(tmp_path / "model.pt", net__models__model_dot_json=b"{}")
    keras = _archive(tmp_path / "model.zip", config_dot_json=b"{}", model_dot_weights_dot_h5=b"")

    assert recognize(exported).kind is SourceKind.TORCH_EXPORTED
    assert recognize(keras).kind is SourceKind.KERAS_FILE


def test_saved_model_is_a_folder_with_saved_model_pb(tmp_path: Path) -> None:
    (tmp_path / "saved_model.pb").write_bytes(b"x")

    assert recognize(tmp_path).kind is SourceKind.SAVED_MODEL
    with pytest.raises(ModelError, match=r"is part of a SavedModel.*Give its folder"):
        recognize(tmp_path / "saved_model.pb")


def test_folder_that_is_no_saved_model_is_refused_with_the_list_of_what_is_supported(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no saved_model\.pb.*A source is an ONNX file"):
        recognize(tmp_path)


def test_factory_is_a_python_file_or_module_with_a_function(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("")

    of_file = recognize(f"{tmp_path}/net.py:make")
    of_module = recognize("package.module:make")

    assert (of_file.kind, of_file.name) == (SourceKind.TORCH_FACTORY, "net.py:make")
    assert of_file.factory == f"{tmp_path.resolve()}/net.py:make"
    assert (of_module.kind, of_module.factory) == (SourceKind.TORCH_FACTORY, "package.module:make")


def test_factory_in_a_missing_file_is_an_error_before_anything_runs() -> None:
    with pytest.raises(ModelError, match=r"Factory 'nowhere/net.py:make': there is no file 'nowhere/net.py'"):
        recognize("nowhere/net.py:make")


def test_missing_source_is_an_error_that_says_what_a_source_is() -> None:
    with pytest.raises(ModelError, match=r"'missing.onnx' does not exist.*A source is"):
        recognize("missing.onnx")


def test_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()

    with pytest.raises(ModelError, match="is empty"):
        recognize(tmp_path / "model.onnx")


def test_unknown_content_is_refused_with_the_list_of_what_is_supported(tmp_path: Path) -> None:
    (tmp_path / "model.xml").write_text("<net/>")

    with pytest.raises(ModelError, match=r"is of no known kind.*SavedModel folder"):
        recognize(tmp_path / "model.xml")


def test_ort_file_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "model.ort").write_bytes(b"\x1c\x00\x00\x00ORTMrest")

    with pytest.raises(ModelError, match=r"optimized for one processor.*Give the ONNX file"):
        recognize(tmp_path / "model.ort")


@pytest.mark.parametrize("suffix", [".pt2", ".keras"])
def test_archive_that_is_no_zip_is_called_damaged(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"model{suffix}").write_bytes(b"PK\x03\x04 and then nothing")

    with pytest.raises(ModelError, match="is damaged"):
        recognize(tmp_path / f"model{suffix}")


def test_archives_without_the_parts_of_their_kind_are_refused(tmp_path: Path) -> None:
    _archive(tmp_path / "model.pt2", readme_dot_txt=b"")
    _archive(tmp_path / "model.keras", readme_dot_txt=b"")

    with pytest.raises(ModelError, match="not a PyTorch ExportedProgram"):
        recognize(tmp_path / "model.pt2")
    with pytest.raises(ModelError, match="not a Keras model"):
        recognize(tmp_path / "model.keras")


def test_torchscript_file_is_refused_with_the_way_out(tmp_path: Path) -> None:
    _archive(tmp_path / "model.pt", net__data_dot_pkl=b"\x80\x02.", net__constants_dot_pkl=b"\x80\x02.")

    with pytest.raises(ModelError, match=r"is a TorchScript file.*net.py:make_model --weights"):
        recognize(tmp_path / "model.pt")


class _Whole:
    """Pickles like a module: by the name of its class."""


def test_pickled_whole_module_is_refused_and_names_what_it_would_call(tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_bytes(pickle.dumps(_Whole()))

    with pytest.raises(ModelError, match=r"pickled whole module.*_Whole'.*--weights"):
        recognize(tmp_path / "model.pth")


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return exec, (f"open({str(self.marker)!r}, 'w').close()",)


def test_pickle_with_code_is_refused_without_running_it(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "model.pth").write_bytes(pickle.dumps(_Payload(marker)))

    with pytest.raises(ModelError, match=r"would call 'builtins.exec'"):
        recognize(tmp_path / "model.pth")

    assert not marker.exists()


def test_bare_state_dict_is_refused_and_asks_for_a_factory(tmp_path: Path) -> None:
    _archive(tmp_path / "weights.pth", net__data_dot_pkl=pickle.dumps(OrderedDict(a=1), protocol=2))

    with pytest.raises(ModelError, match=r"bare state dict.*net.py:make_model --weights .*weights.pth"):
        recognize(tmp_path / "weights.pth")


def test_safetensors_file_is_a_bare_state_dict_too(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))

    with pytest.raises(ModelError, match="bare state dict"):
        recognize(tmp_path / "w.safetensors")


def test_truncated_pickle_is_called_damaged(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    pickle.dump({"a": np.zeros(3)}, buffer, protocol=2)
    (tmp_path / "weights.pth").write_bytes(buffer.getvalue()[:40])

    with pytest.raises(ModelError, match="is damaged"):
        recognize(tmp_path / "weights.pth")


def test_object_of_an_unknown_class_is_refused() -> None:
    with pytest.raises(ModelError, match=r"'builtins.dict' is not a model.*torch.nn.Module"):
        recognize({})


def test_onnx_model_object_is_refused_as_any_other() -> None:
    with pytest.raises(ModelError, match="ModelProto"):
        recognize(onnx.ModelProto())
