"""Example inputs for a module: given ones, or made from `--shape`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from onnxprune.contracts import TensorSpec
from onnxprune.convert.pytorch_factory import TorchModel
from onnxprune.convert.request import Dimension
from onnxprune.errors import ModelError, UsageError, did_you_mean, quoted_list
from onnxprune.runtime.feeds import random_feeds

if TYPE_CHECKING:
    import torch

__all__ = ["argument_names", "with_example_inputs"]

# Exporting with a size of 0 or 1 would make the axis static, whatever was asked for.
_DYNAMIC_BATCH = 2
# Large enough for a network that halves its maps five times.
_DYNAMIC_SIZE = 64


def with_example_inputs(model: TorchModel, shapes: Mapping[str, tuple[Dimension, ...]], *, seed: int) -> TorchModel:
    """`model` with example inputs for every argument of `forward` that needs one.

    Shapes make seeded example inputs where the model brings none, and must agree with those it brings. An axis that
    is given by name ('batch') is exported as dynamic.

    Raises:
        UsageError: A shape is given for no argument of `forward`, or contradicts the example inputs.
        ModelError: Neither shapes nor example inputs are known.
    """
    names = argument_names(model.module)
    for name in shapes:
        if name not in names:
            raise UsageError(f"--shape names '{name}', which is no argument of forward.", did_you_mean(name, names))
    if model.args is not None:
        return _reshaped(model, names, shapes, seed=seed) if shapes else model
    required = _required_arguments(model.module)
    missing = [name for name in required if name not in shapes]
    if missing or not shapes:
        raise ModelError(
            f"'{type(model.module).__name__}' needs example inputs: nothing says what shape "
            f"{quoted_list(missing or names)} of its forward has.",
            f"Give {_shape_hint(model.module, missing or names)}, or let the factory return (module, example_inputs).",
        )
    dtype = _input_dtype(model.module)
    tensors = {name: _tensor(name, shapes[name], dtype, seed) for name in names if name in shapes}
    return replace(model, args=(), kwargs=tensors, dynamic_shapes=_dynamic_shapes(shapes, model.dynamic_shapes))


def argument_names(module: torch.nn.Module) -> list[str]:
    """Names of the arguments of `forward`, in order."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind not in kinds]


def _required_arguments(module: torch.nn.Module) -> list[str]:
    parameters = inspect.signature(module.forward).parameters
    return [name for name in argument_names(module) if parameters[name].default is inspect.Parameter.empty]


def _reshaped(
    model: TorchModel, names: Sequence[str], shapes: Mapping[str, tuple[Dimension, ...]], *, seed: int
) -> TorchModel:
    """`model` with its example inputs brought to `shapes`."""
    import torch

    bound = dict(zip(names, model.args or (), strict=False)) | dict(model.kwargs)
    for name, shape in shapes.items():
        example = bound.get(name)
        if not isinstance(example, torch.Tensor):
            raise UsageError(
                f"--shape names '{name}', but its example input is of type '{type(example).__name__}', not a tensor."
            )
        if example.ndim != len(shape):
            raise UsageError(
                f"--shape gives '{name}' {len(shape)} axes, but its example input has {example.ndim} "
                f"({'x'.join(map(str, example.shape))})."
            )
        sizes = tuple(
            dim if isinstance(dim, int) else max(int(old), _DYNAMIC_BATCH)
            for dim, old in zip(shape, example.shape, strict=True)
        )
        if sizes != tuple(example.shape):
            bound[name] = (
                _tensor(name, sizes, example.dtype, seed) if example.dtype.is_floating_point else _tiled(example, sizes)
            )
    has_names = any(isinstance(dim, str) for shape in shapes.values() for dim in shape)
    return replace(
        model,
        args=(),
        kwargs=bound,
        dynamic_shapes=_dynamic_shapes(shapes, None) if has_names else model.dynamic_shapes,
    )


def _tiled(example: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    import numpy as np
    import torch

    return torch.from_numpy(np.resize(example.numpy(), sizes))


def _tensor(name: str, shape: tuple[Dimension, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    import torch

    sizes = tuple(
        dim if isinstance(dim, int) else (_DYNAMIC_BATCH if axis == 0 else _DYNAMIC_SIZE)
        for axis, dim in enumerate(shape)
    )
    numpy_name = "float32" if dtype.is_floating_point else str(dtype).removeprefix("torch.")
    spec = TensorSpec(name=name, dtype=numpy_name, shape=sizes)
    return torch.from_numpy(random_feeds([spec], seed=seed)[name]).to(dtype)


def _dynamic_shapes(shapes: Mapping[str, tuple[Dimension, ...]], given: Any) -> Any:
    import torch

    dims: dict[str, Any] = {}
    for shape in shapes.values():
        for dim in shape:
            if isinstance(dim, str):
                dims.setdefault(dim, torch.export.Dim(dim))
    if not dims:
        return given
    return {
        name: {axis: dims[dim] for axis, dim in enumerate(shape) if isinstance(dim, str)}
        for name, shape in shapes.items()
    }


def _input_dtype(module: torch.nn.Module) -> torch.dtype:
    """Indices for a network that begins with a table of embeddings, else the type of its weights."""
    import torch

    leaves = [child for child in module.modules() if not any(True for _ in child.children())]
    if leaves and isinstance(leaves[0], torch.nn.Embedding | torch.nn.EmbeddingBag):
        return torch.int64
    floats = [p.dtype for p in module.parameters() if p.dtype.is_floating_point]
    return floats[0] if floats else torch.float32


def _shape_hint(module: torch.nn.Module, names: Sequence[str]) -> str:
    """A --shape option with what the first layer tells about it."""
    import torch

    shape = "1,..."
    for child in module.modules():
        if isinstance(child, torch.nn.Conv1d):
            shape = f"1,{child.in_channels},LENGTH"
        elif isinstance(child, torch.nn.Conv2d):
            shape = f"1,{child.in_channels},HEIGHT,WIDTH"
        elif isinstance(child, torch.nn.Linear):
            shape = f"1,{child.in_features}"
        else:
            continue
        break
    return " ".join(f"--shape {name}={shape}" for name in names)
