"""Reading state dicts, and putting them into a module."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxprune.convert.labels import labels_metadata
from onnxprune.convert.pytorch_pickle import FACTORY_HINT, TorchContent, damaged_file, inspect_torch_file
from onnxprune.errors import ModelError, quoted_list

if TYPE_CHECKING:
    import torch

__all__ = ["StateDict", "load_weights", "read_state_dict"]

# Where checkpoints keep the weights, the likeliest first; training frameworks store them beside optimizer and epoch.
_WEIGHT_KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "params", "weights", "ema")
_LABEL_KEYS = ("classes", "labels", "class_names", "names", "class_to_idx")
# DataParallel, torch.compile, and the attribute under which Lightning modules and wrappers keep their network.
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.")


@dataclass(frozen=True, slots=True, kw_only=True)
class StateDict:
    """Weights by name, and what else the file says about the model."""

    tensors: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_state_dict(path: Path) -> StateDict:
    """The state dict in `path` (torch.save or safetensors), without running anything.

    Raises:
        ModelError: The file is damaged, holds code, or holds no state dict.
    """
    found = inspect_torch_file(path)
    match found.content:
        case TorchContent.SAFETENSORS:
            return _read_safetensors(path)
        case TorchContent.DAMAGED:
            raise damaged_file(path)
        case TorchContent.CODE:
            raise ModelError(
                f"Weights '{path}' are a pickled whole module (or carry code): reading them would call "
                f"{quoted_list(found.globals_called)}. Only state dicts are read.",
                "Save the state dict where you trust the file: torch.save(model.state_dict(), 'weights.pth').",
            )
        case TorchContent.TORCHSCRIPT:
            raise ModelError(f"Weights '{path}' are a TorchScript program, not a state dict.", FACTORY_HINT)
        case TorchContent.EXPORTED:
            raise ModelError(
                f"Weights '{path}' are an ExportedProgram, which has a structure of its own.",
                f"Give it as the source, without a factory: '{path}'.",
            )
        case TorchContent.STATE_DICT:
            return _read_pickle(path)


def _read_pickle(path: Path) -> StateDict:
    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"Weights '{path}' can't be read with weights_only=True: {_first_line(error)}.",
            "Save the state dict alone: torch.save(model.state_dict(), 'weights.pth').",
        ) from error
    except (RuntimeError, ValueError, EOFError, OSError, KeyError, AttributeError, TypeError) as error:
        raise damaged_file(path) from error
    return _find_weights(loaded, path)


def _read_safetensors(path: Path) -> StateDict:
    import safetensors
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = {key: value for key, value in (file.metadata() or {}).items() if key != "format"}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"Weights '{path}' are damaged: {_first_line(error)}.", "Copy the file again.") from error
    return StateDict(tensors=tensors, metadata=metadata)


def _find_weights(loaded: object, path: Path) -> StateDict:
    if _is_state_dict(loaded):
        return StateDict(tensors=_tensors(loaded))
    if not isinstance(loaded, Mapping):
        raise ModelError(
            f"Weights '{path}' hold an object of type '{type(loaded).__name__}', not a state dict.",
            "Save one with torch.save(model.state_dict(), 'weights.pth').",
        )
    metadata = _labels(loaded)
    for key in _WEIGHT_KEYS:
        if _is_state_dict(loaded.get(key)):
            notes = (f"The weights are those under '{key}' in the checkpoint.",)
            return StateDict(tensors=_tensors(loaded[key]), metadata=metadata, notes=notes)
    raise ModelError(
        f"Weights '{path}' hold a dict without a state dict: its keys are {quoted_list(map(str, loaded))}.",
        f"Looked for tensors at the top and under {', '.join(_WEIGHT_KEYS)}.",
    )


def _is_state_dict(value: object) -> bool:
    import torch

    if not isinstance(value, Mapping) or not value:
        return False
    # Some state dicts carry extra state (a dict, a version number) beside their tensors.
    is_named = all(isinstance(key, str) for key in value)
    return is_named and any(isinstance(item, torch.Tensor) for item in value.values())


def _tensors(state_dict: Any) -> dict[str, torch.Tensor]:
    import torch

    return {key: value for key, value in state_dict.items() if isinstance(value, torch.Tensor)}


def _labels(checkpoint: Mapping[Any, Any]) -> dict[str, str]:
    """Class names that a checkpoint carries."""
    for key in _LABEL_KEYS:
        value = checkpoint.get(key)
        if isinstance(value, Mapping):
            # {'cat': 0, 'dog': 1} or {0: 'cat', 1: 'dog'}
            by_index = {i: name for name, i in value.items()} if key == "class_to_idx" else dict(value)
            value = [by_index[i] for i in sorted(by_index)] if all(isinstance(i, int) for i in by_index) else None
        if isinstance(value, list | tuple) and value and all(isinstance(name, str) for name in value):
            return labels_metadata(value)
    return {}


def load_weights(module: torch.nn.Module, state_dict: StateDict, *, path: Path) -> tuple[str, ...]:
    """Put every tensor of `state_dict` into `module`, and return notes about it.

    Prefixes that wrappers leave in front of all names ('module.') are taken off when that makes more names match.

    Raises:
        ModelError: Names or shapes don't match; lists them.
    """
    import torch

    expected = module.state_dict()
    prefix = _best_prefix(state_dict.tensors, expected)
    tensors = {
        name.removeprefix(prefix): value for name, value in state_dict.tensors.items() if name.startswith(prefix)
    }
    counters = {name for name in expected if name.endswith("num_batches_tracked")}
    # BatchNorm counts its batches since PyTorch 0.4.1; the count is of no use in inference.
    missing = [name for name in expected if name not in tensors and name not in counters]
    unexpected = [name for name in tensors if name not in expected]
    unexpected += [name for name in state_dict.tensors if not name.startswith(prefix)]
    misshapen = [
        f"{name} ({_shape(tensors[name])} in the file, {_shape(value)} in the module)"
        for name, value in expected.items()
        if name in tensors and isinstance(value, torch.Tensor) and tensors[name].shape != value.shape
    ]
    findings = [
        f"{count} {what}: {quoted_list(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if (count := len(names))
    ]
    if findings:
        raise ModelError(
            f"Weights '{path}' do not fit the module '{type(module).__name__}': {'; '.join(findings)}.",
            "Build the module with the sizes that the weights were trained with.",
        )
    module.load_state_dict(tensors, strict=False)
    notes = [f"The prefix '{prefix}' was taken off the names of the weights."] if prefix else []
    changed = [name for name, value in expected.items() if name in tensors and tensors[name].dtype != value.dtype]
    if changed:
        example = changed[0]
        notes.append(
            f"{len(changed)} weights were converted to the module's element type "
            f"('{example}': {tensors[example].dtype} to {expected[example].dtype})."
        )
    return (*state_dict.notes, *notes)


def _best_prefix(tensors: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """The prefix whose removal makes the most names match; "" where none makes more match than there are now."""
    candidates = {""}
    for name in tensors:
        prefix = ""
        while any(name.startswith(prefix + known) for known in _PREFIXES):
            prefix += next(known for known in _PREFIXES if name.startswith(prefix + known))
            candidates.add(prefix)

    def matches(prefix: str) -> int:
        return sum(name.startswith(prefix) and name[len(prefix) :] in expected for name in tensors)

    return max(sorted(candidates, key=len), key=matches)


def _shape(tensor: Any) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
