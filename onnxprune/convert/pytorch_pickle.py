"""What a PyTorch file holds, told without unpickling it.

`torch.save` writes three things under the same endings (.pt, .pth, .bin ...): a state dict, which is data; a whole
module, which is a pickle that imports and calls whatever it names; and, by `torch.jit.save`, a TorchScript program.
Only the first is ever loaded, and only by PyTorch's restricted unpickler (`weights_only=True`).
"""

from __future__ import annotations

import enum
import pickletools
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from onnxprune.errors import ModelError, quoted_list

__all__ = ["TorchContent", "TorchFile", "damaged_file", "inspect_torch_file", "refuse_torch_file"]

FACTORY_HINT = (
    "Write a function that returns the module with its structure only, and give the numbers as a state dict: "
    "'net.py:make_model --weights weights.pth', with weights.pth from torch.save(model.state_dict(), 'weights.pth')."
)
# What torch.save writes for tensors and containers of numbers; anything else is a class or function to call.
_DATA_MODULES = ("torch", "torch._utils", "torch.storage", "torch.nn.parameter", "torch.serialization", "collections")
_NUMPY_DATA = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy.dtypes", "_codecs")
_BUILTIN_DATA = ("set", "frozenset", "complex", "bytearray", "list", "dict", "tuple", "int", "float", "bool", "str")
# A legacy file is a sequence of pickles (magic number, protocol, system, object, storage keys) and then raw storages.
_LEGACY_PICKLES = 5


class TorchContent(enum.Enum):
    """What is in a PyTorch file."""

    STATE_DICT = "state dict"
    CODE = "pickled code"
    TORCHSCRIPT = "TorchScript"
    EXPORTED = "ExportedProgram"
    SAFETENSORS = "safetensors"
    DAMAGED = "damaged"


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchFile:
    """`globals_called` are the classes and functions, beside tensors and containers, that a pickle would call."""

    content: TorchContent
    globals_called: tuple[str, ...] = ()


def inspect_torch_file(path: Path) -> TorchFile:
    """Look at `path` without running anything in it."""
    try:
        with path.open("rb") as file:
            head = file.read(16)
            file.seek(0)
            if zipfile.is_zipfile(path):
                return _inspect_zip(path)
            if _is_safetensors(head):
                return TorchFile(content=TorchContent.SAFETENSORS)
            if head[:1] != b"\x80":
                return TorchFile(content=TorchContent.DAMAGED)
            return _classify(_globals(file, _LEGACY_PICKLES))
    except (OSError, zipfile.BadZipFile, *_PICKLE_ERRORS):
        return TorchFile(content=TorchContent.DAMAGED)


def refuse_torch_file(path: Path) -> ModelError:
    """The error that says why `path` can't be a source by itself, and what can."""
    found = inspect_torch_file(path)
    match found.content:
        case TorchContent.STATE_DICT | TorchContent.SAFETENSORS:
            return ModelError(
                f"Source '{path}' is a bare state dict: it has the weights of a PyTorch model, but not its structure.",
                f"Give the structure as a factory, and this file as its weights: 'net.py:make_model --weights {path}'. "
                "The function returns the nn.Module.",
            )
        case TorchContent.TORCHSCRIPT:
            return ModelError(
                f"Source '{path}' is a TorchScript file. PyTorch's exporter no longer reads TorchScript, and loading "
                "one runs its code.",
                FACTORY_HINT,
            )
        case TorchContent.CODE:
            return ModelError(
                f"Source '{path}' is a pickled whole module (or carries code): reading it would call "
                f"{quoted_list(found.globals_called)}. Pickles that call anything are not opened.",
                FACTORY_HINT,
            )
        case TorchContent.EXPORTED:
            return ModelError(f"Source '{path}' is a PyTorch ExportedProgram.", "Give it as the source.")
        case TorchContent.DAMAGED:
            return damaged_file(path)


def damaged_file(path: Path) -> ModelError:
    """The error for a file that is neither a zip archive, nor a pickle, nor safetensors."""
    return ModelError(f"'{path}' is damaged: it is truncated, or not written by PyTorch.", "Download or copy it again.")


def _inspect_zip(path: Path) -> TorchFile:
    with zipfile.ZipFile(path) as archive:
        # Everything lies in one folder named after the file.
        names = {name.partition("/")[2] or name: name for name in archive.namelist()}
        if any(name.startswith("models/") for name in names) or "serialized_exported_program.json" in names:
            return TorchFile(content=TorchContent.EXPORTED)
        if "constants.pkl" in names or any(name.startswith("code/") for name in names):
            return TorchFile(content=TorchContent.TORCHSCRIPT)
        if "data.pkl" not in names:
            return TorchFile(content=TorchContent.DAMAGED)
        with archive.open(names["data.pkl"]) as member:
            return _classify(_globals(member, 1))


def _is_safetensors(head: bytes) -> bool:
    # Eight bytes with the length of the JSON header, and then that header.
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32


def _globals(stream: IO[bytes], num_pickles: int) -> list[str]:
    """The dotted names that the first pickles of `stream` would import, in order."""
    found: list[str] = []
    for _ in range(num_pickles):
        strings: list[str] = []
        for opcode, argument, _position in pickletools.genops(stream):
            if opcode.name in ("GLOBAL", "INST"):
                found.append(str(argument).replace(" ", ".", 1))
            elif opcode.name == "STACK_GLOBAL":
                # Its two operands are the last strings that were pushed, unless the pickle is built to hide them.
                found.append(".".join(strings[-2:]) or "a hidden name")
            elif isinstance(argument, str):
                strings.append(argument)
        if num_pickles > 1 and not _another_pickle_follows(stream):
            break
    return found


def _another_pickle_follows(stream: IO[bytes]) -> bool:
    position = stream.tell()
    following = stream.read(1)
    stream.seek(position)
    return following == b"\x80"


def _classify(names: list[str]) -> TorchFile:
    # Protocol 2 spells modules as Python 2 did.
    spelled = (name.replace("__builtin__.", "builtins.", 1) for name in names)
    called = tuple(dict.fromkeys(name for name in spelled if not _is_data(name)))
    return TorchFile(content=TorchContent.CODE if called else TorchContent.STATE_DICT, globals_called=called)


def _is_data(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    if module == "builtins":
        return attribute in _BUILTIN_DATA
    if module == "torch":
        # Storages and element types (FloatStorage, float32, Size, device), never torch.load or torch.hub.
        return attribute.endswith("Storage") or attribute in _TORCH_DATA
    if module == "torch._utils":
        return attribute.startswith("_rebuild_")
    return module in _DATA_MODULES or module in _NUMPY_DATA


_TORCH_DATA = frozenset({
    "Size", "device", "Tensor", "dtype", "layout", "strided", "per_tensor_affine", "per_channel_affine", "float16",
    "float32", "float64", "bfloat16", "half", "float", "double", "int8", "int16", "int32", "int64", "uint8", "bool",
    "long", "int", "short", "complex64", "complex128",
})  # fmt: skip
_PICKLE_ERRORS = (ValueError, IndexError, KeyError, EOFError, UnicodeDecodeError, OverflowError, MemoryError)
