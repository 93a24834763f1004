"""What a source is, told from its content first and its name second, without running anything in it."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from onnxprune.convert.pytorch_pickle import refuse_torch_file
from onnxprune.convert.report import SourceKind
from onnxprune.data.user_code import FunctionSpec, parse_function_spec
from onnxprune.errors import ModelError

__all__ = ["SUPPORTED_SOURCES", "RecognizedSource", "recognize"]

SUPPORTED_SOURCES = (
    "an ONNX file (.onnx), a PyTorch ExportedProgram (.pt2), a PyTorch factory (path/file.py:function or "
    "package.module:function, with --weights for a state dict), a TensorFlow SavedModel folder, a Keras file "
    "(.keras, .h5), a frozen TensorFlow graph (.pb), or a TFLite file (.tflite)"
)
_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
_HEAD_BYTES = 64
_SHOWN_CHARACTERS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class RecognizedSource:
    """What to convert. `path` is None for factories of an installed module and for objects."""

    kind: SourceKind
    name: str
    path: Path | None = None
    factory: str = ""
    """'file.py:function' or 'package.module:function'."""


def recognize(source: object) -> RecognizedSource:
    """Tell what `source` is.

    Raises:
        ModelError: It does not exist, is empty, or is nothing that onnxprune reads; says what is supported.
    """
    if isinstance(source, str | os.PathLike):
        return _recognize_path(os.fspath(source))
    return _recognize_object(source)


def _recognize_object(source: object) -> RecognizedSource:
    # By name, so that neither torch nor TensorFlow is imported to look at an object of the other.
    bases = {f"{base.__module__.partition('.')[0]}.{base.__qualname__}" for base in type(source).__mro__}
    name = type(source).__qualname__
    if "torch.ScriptModule" in bases or "torch.RecursiveScriptModule" in bases:
        raise ModelError(
            f"The source is a TorchScript module ('{name}'): PyTorch's exporter no longer reads TorchScript.",
            "Give the nn.Module that it was made from.",
        )
    if bases & {"torch.Module", "torch.ExportedProgram"}:
        return RecognizedSource(kind=SourceKind.TORCH_OBJECT, name=name)
    if "keras.Model" in bases:
        return RecognizedSource(kind=SourceKind.KERAS_OBJECT, name=name)
    raise ModelError(
        f"An object of type '{type(source).__module__}.{name}' is not a model that onnxprune knows.",
        "Objects can be torch.nn.Module, torch.export.ExportedProgram and keras.Model; "
        f"files can be {SUPPORTED_SOURCES}.",
    )


def _recognize_path(text: str) -> RecognizedSource:
    path = Path(text)
    if not _exists(path):
        factory = parse_function_spec(text)
        if factory is not None:
            return _factory(text, factory)
        raise ModelError(f"Source '{text}' does not exist.", f"A source is {SUPPORTED_SOURCES}.")
    if path.is_dir():
        return _recognize_folder(path)
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise ModelError(f"Source '{text}' can't be read: {error.strerror}.") from error
    if not head:
        raise ModelError(f"Source '{text}' is empty.", "The file was probably not written to its end: copy it again.")
    for recognizer in _RECOGNIZERS:
        kind = recognizer(path, head)
        if kind is not None:
            return RecognizedSource(kind=kind, name=path.name, path=path)
    raise ModelError(f"Source '{text}' is of no known kind.", f"A source is {SUPPORTED_SOURCES}.")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:  # a name that is too long, a folder that may not be searched
        text = str(path)
        shown = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
        raise ModelError(
            f"Source '{shown}' can't be looked for: {error.strerror}.", f"A source is {SUPPORTED_SOURCES}."
        ) from error


def _factory(text: str, factory: FunctionSpec) -> RecognizedSource:
    if factory.file is None:
        return RecognizedSource(kind=SourceKind.TORCH_FACTORY, name=text, factory=text)
    if not factory.file.is_file():
        raise ModelError(f"Factory '{text}': there is no file '{factory.file}'.", f"A source is {SUPPORTED_SOURCES}.")
    return RecognizedSource(
        kind=SourceKind.TORCH_FACTORY,
        name=f"{factory.file.name}:{factory.function}",
        path=factory.file,
        factory=f"{factory.file.resolve()}:{factory.function}",
    )


def _recognize_folder(path: Path) -> RecognizedSource:
    if (path / "saved_model.pb").is_file():
        return RecognizedSource(kind=SourceKind.SAVED_MODEL, name=path.name, path=path)
    if (path / "saved_model.pbtxt").is_file():
        raise ModelError(
            f"SavedModel '{path}' is in text form (saved_model.pbtxt), which is not supported.",
            "Save it again with tf.saved_model.save, which writes saved_model.pb.",
        )
    raise ModelError(
        f"Folder '{path}' is not a SavedModel: it has no saved_model.pb.", f"A source is {SUPPORTED_SOURCES}."
    )


def _is_keras_h5(path: Path, head: bytes) -> SourceKind | None:
    del path
    return SourceKind.KERAS_H5 if head.startswith(_HDF5_MAGIC) else None


def _is_tflite(path: Path, head: bytes) -> SourceKind | None:
    # A flatbuffer's file identifier stands behind the offset of its root table.
    return SourceKind.TFLITE if head[4:8] == b"TFL3" or path.suffix.lower() == ".tflite" else None


def _is_ort(path: Path, head: bytes) -> SourceKind | None:
    if head[4:8] == b"ORTM" or path.suffix.lower() == ".ort":
        raise ModelError(
            f"Source '{path}' is an ONNX Runtime file (.ort): it is optimized for one processor and can't be turned "
            "back into a graph that passes may change.",
            "Give the ONNX file that it was made from.",
        )
    return None


def _is_zip_or_torch(path: Path, head: bytes) -> SourceKind | None:
    del head
    suffix = path.suffix.lower()
    if not zipfile.is_zipfile(path):
        if suffix in (".pt2", ".keras"):
            raise _damaged_archive(path, suffix)
        if suffix in (".pt", ".pth", ".th", ".ckpt", ".bin", ".pkl", ".safetensors"):
            raise refuse_torch_file(path)
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            first_offset = min((info.header_offset for info in archive.infolist()), default=0)
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
        raise _damaged_archive(path, suffix) from error
    # In a truncated archive the directory of an archive inside it may be found.
    if first_offset > 0:
        raise _damaged_archive(path, suffix)
    inner = {name.partition("/")[2] or name for name in names}
    if "config.json" in names and any(name.endswith(".weights.h5") for name in names):
        return SourceKind.KERAS_FILE
    if suffix == ".keras":
        raise ModelError(
            f"Source '{path}' is not a Keras model: its archive has no config.json with weights.", "Save it again."
        )
    if any(name.startswith("models/") for name in inner) or "serialized_exported_program.json" in names:
        return SourceKind.TORCH_EXPORTED
    if suffix == ".pt2":
        raise ModelError(
            f"Source '{path}' is not a PyTorch ExportedProgram: its archive has no models/*.json.",
            "Save it with torch.export.save.",
        )
    if "data.pkl" in inner or suffix in (".pt", ".pth", ".th", ".ckpt", ".bin"):
        raise refuse_torch_file(path)
    return None


def _damaged_archive(path: Path, suffix: str) -> ModelError:
    return ModelError(
        f"Source '{path}' is damaged: a {suffix} file is a zip archive, and this one is truncated or something else.",
        "Copy or save it again.",
    )


def _is_protobuf(path: Path, head: bytes) -> SourceKind | None:
    suffix = path.suffix.lower()
    if suffix == ".pb" and path.name == "saved_model.pb":
        raise ModelError(f"Source '{path}' is part of a SavedModel.", f"Give its folder: '{path.parent}'.")
    if suffix == ".pb" and not _starts_like_onnx(head):
        return SourceKind.FROZEN_GRAPH
    if suffix in (".onnx", ".pb", ".onnx_data") or _starts_like_onnx(head):
        return SourceKind.ONNX
    return None


def _starts_like_onnx(head: bytes) -> bool:
    # ModelProto begins with field 1 (ir_version, a varint up to 127 so far), and then field 2 (producer_name), 7
    # (graph) or 8 (opset_import), all length-delimited. A GraphDef begins with field 1 as a length-delimited node.
    return len(head) > 2 and head[0] == 0x08 and head[1] < 0x80 and head[2] in (0x12, 0x1A, 0x22, 0x3A, 0x42)


_RECOGNIZERS: tuple[Callable[[Path, bytes], SourceKind | None], ...] = (
    _is_keras_h5,
    _is_ort,
    _is_tflite,
    _is_protobuf,
    _is_zip_or_torch,
)
