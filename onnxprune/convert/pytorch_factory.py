"""What a PyTorch factory may return.

    module                                              inputs come from --shape
    (module, example_inputs)
    (module, example_inputs, dynamic_shapes)
    {"module": ..., "example_inputs": ..., "dynamic_shapes": ..., "output_names": [...], "metadata": {...}}

`example_inputs` are the arguments of `forward`: one tensor, a tuple by position, or a mapping by name.
`dynamic_shapes` is what `torch.export.export` takes. `metadata` are texts that the ONNX model will carry; a list
becomes JSON. `module` may also be a `torch.export.ExportedProgram`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from onnxprune.errors import PluginError, did_you_mean, quoted_list

__all__ = ["TorchModel", "as_torch_model"]

_KEYS = ("module", "example_inputs", "dynamic_shapes", "output_names", "metadata")
_FORMS = (
    "Return an nn.Module, (module, example_inputs), (module, example_inputs, dynamic_shapes), or a dict with the keys "
    f"{', '.join(_KEYS)}."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchModel:
    """A module (or ExportedProgram) with what is needed to export it; `args` None: nothing is known about inputs."""

    module: Any
    args: tuple[Any, ...] | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dynamic_shapes: Any = None
    output_names: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)


def as_torch_model(returned: object, *, subject: str) -> TorchModel:
    """Read what a factory returned.

    Raises:
        PluginError: It has none of the forms at the top of this file.
    """
    fields = _fields(returned, subject)
    module = fields.get("module")
    if not _is_module(module):
        hint = _FORMS
        if isinstance(module, type):
            hint = f"That is the class itself: return an instance, '{module.__name__}()'. {_FORMS}"
        raise PluginError(f"{subject} returned {_name_of(module)} where an nn.Module belongs.", hint)
    output_names = fields.get("output_names") or ()
    if isinstance(output_names, str) or not all(isinstance(name, str) and name for name in output_names):
        raise PluginError(f"{subject}: 'output_names' must be a list of names, got {output_names!r}.")
    args, kwargs = split_arguments(fields.get("example_inputs"))
    return TorchModel(
        module=module,
        args=args,
        kwargs=kwargs,
        dynamic_shapes=fields.get("dynamic_shapes"),
        output_names=tuple(output_names),
        metadata=_metadata(fields.get("metadata"), subject),
    )


def split_arguments(example_inputs: object) -> tuple[tuple[Any, ...] | None, dict[str, Any]]:
    """Positional and keyword arguments of `forward`; positional None where nothing was given."""
    if example_inputs is None:
        return None, {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def _fields(returned: object, subject: str) -> dict[str, Any]:
    if isinstance(returned, Mapping):
        unknown = [str(key) for key in returned if key not in _KEYS]
        if "module" not in returned and unknown and all(_is_tensor(value) for value in returned.values()):
            raise PluginError(f"{subject} returned a state dict, not a module.", _FORMS)
        if unknown:
            raise PluginError(
                f"{subject} returned a dict with unknown keys {quoted_list(unknown)}.", did_you_mean(unknown[0], _KEYS)
            )
        return dict(returned)
    if isinstance(returned, tuple):
        if not 2 <= len(returned) <= 3:
            raise PluginError(f"{subject} returned a tuple of {len(returned)}.", _FORMS)
        return dict(zip(_KEYS, returned, strict=False))
    return {"module": returned}


def _metadata(metadata: object, subject: str) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise PluginError(f"{subject}: 'metadata' must be a dict, got {_name_of(metadata)}.")
    try:
        return {str(key): value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    except (TypeError, ValueError) as error:
        raise PluginError(f"{subject}: 'metadata' holds what is neither text nor JSON ({error}).") from error


def _is_module(value: object) -> bool:
    import torch

    return isinstance(value, torch.nn.Module | torch.export.ExportedProgram)


def _is_tensor(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _name_of(value: object) -> str:
    return "nothing (None)" if value is None else f"an object of type '{type(value).__name__}'"
