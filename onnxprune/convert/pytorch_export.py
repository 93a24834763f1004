"""A PyTorch module with example inputs -> ONNX graph and reference outputs, through `torch.export`."""

from __future__ import annotations

import logging
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.convert.extras import installed_versions
from onnxprune.convert.pytorch_factory import TorchModel
from onnxprune.convert.reference import ForeignConversion, ReferenceCase
from onnxprune.convert.request import Dimension
from onnxprune.convert.shapes import check_shapes
from onnxprune.data.user_code import call_user_code
from onnxprune.errors import ModelError, PluginError, UsageError, quoted_list

if TYPE_CHECKING:
    import torch

__all__ = ["export_torch_model"]

# The opset for which PyTorch's operators are written; a higher one only adds a version conversion.
EXPORT_OPSET = 18
# Stack traces and graph signatures name files of this machine; module paths are all that is needed.
_KEPT_METADATA = "pkg.torch.onnx.name_scopes"
_MAX_REASON_LENGTH = 400


def export_torch_model(
    model: TorchModel,
    *,
    input_names: Sequence[str] = (),
    output_names: Sequence[str] = (),
    shapes: Mapping[str, tuple[Dimension, ...]] | None = None,
    seed: int,
) -> tuple[ir.Model, ForeignConversion]:
    """Convert `model`, whose example inputs are known, in inference mode.

    Axes that `shapes` fixes have that size in the reference, but are left as they are in the graph.

    Returns:
        The graph as the exporter made it, with good names and without foreign metadata; and what the source answers
        to its example inputs, to seeded inputs, and to other sizes of the dynamic axes.

    Raises:
        PluginError: The module fails on its example inputs.
        ModelError: It is exported in training mode, or the exporter can't convert it.
        UsageError: The number of names is not the number of inputs or outputs, or `shapes` don't fit the inputs.
    """
    run = _inference_function(model)
    with _quiet(), _inference_mode(model.module):
        try:
            # Before the exporter, so that an error of the module itself is told apart from one of the exporter.
            outputs = call_user_code(
                lambda: run(model.args or (), model.kwargs), spec=_class_name(model.module), what="Module"
            )
        except PluginError as error:
            raise PluginError(
                f"{error.message} It was run on its example inputs.", "Check their shapes and types (--shape)."
            ) from error
        graph_model = _export(model)
        paths = [(path, leaf) for path, leaf in _leaves(outputs) if _is_tensor(leaf)]
        _name_values(
            graph_model, input_names, output_names or model.output_names or _default_output_names([p for p, _ in paths])
        )
        _strip_metadata(graph_model)
        check_shapes(graph_model.graph.inputs, shapes or {})
        conversion = _reference(model, run, graph_model, shapes or {}, seed=seed)
    return graph_model, conversion


def _class_name(module: Any) -> str:
    return type(module).__name__


def _is_tensor(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _is_exported(module: object) -> bool:
    import torch

    return isinstance(module, torch.export.ExportedProgram)


def _inference_function(model: TorchModel) -> Callable[[tuple[Any, ...], Mapping[str, Any]], Any]:
    if _is_exported(model.module):
        _check_inference_mode(model.module)
        # Guards would refuse other sizes of an axis that was exported as static; sizes are checked by ONNX Runtime.
        module = model.module.module(check_guards=False)
    else:
        module = model.module
    return lambda args, kwargs: module(*args, **kwargs)


def _check_inference_mode(program: Any) -> None:
    """Refuse a program in which BatchNorm or Dropout were recorded in training mode."""
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        for position, argument in enumerate(schema.arguments if schema is not None else ()):
            if argument.name not in ("training", "train"):
                continue
            value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            if value is True:
                raise ModelError(
                    f"The ExportedProgram was exported in training mode: '{node.name}' ({node.target}) would give "
                    "other outputs for every batch.",
                    "Call model.eval() before torch.export.export.",
                )


@contextmanager
def _inference_mode(module: Any) -> Iterator[None]:
    """Put every submodule into eval mode, and bring each back to the mode it had."""
    import torch

    if not isinstance(module, torch.nn.Module):
        with torch.no_grad():
            yield
        return
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for child, mode in modes:
            child.training = mode


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings about packages that are not installed and its own deprecations."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _export(model: TorchModel) -> ir.Model:
    import torch

    try:
        program = torch.onnx.export(
            model.module,
            () if _is_exported(model.module) else (model.args or ()),
            kwargs=None if _is_exported(model.module) else (dict(model.kwargs) or None),
            dynamic_shapes=None if _is_exported(model.module) else model.dynamic_shapes,
            opset_version=EXPORT_OPSET,
            dynamo=True,
            verbose=False,
        )
    except Exception as error:  # runs the user's forward, fails in any way (docs/adr/0007)
        raise ModelError(
            f"PyTorch's exporter can't convert '{_class_name(model.module)}': {_reason(error)}",
            "Only what torch.export can trace becomes a graph: write the offending part without data-dependent Python, "
            "or fix the axis that it depends on.",
        ) from error
    assert program is not None, "torch.onnx.export(dynamo=True) without a file returns a program"  # noqa: S101
    exported: ir.Model = program.model
    return exported


def _reason(error: BaseException) -> str:
    """The innermost cause on one line: the exporter wraps it in several pages of advice."""
    seen = {id(error)}
    while (cause := error.__cause__ or error.__context__) is not None and id(cause) not in seen:
        error = cause
        seen.add(id(error))
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:4]) or type(error).__name__
    if len(text) > _MAX_REASON_LENGTH:
        text = f"{text[:_MAX_REASON_LENGTH]}..."
    return f"{type(error).__name__}: {text.rstrip('.')}."


def _leaves(value: Any) -> list[tuple[tuple[Any, ...], Any]]:
    import torch.utils._pytree as pytree

    leaves, _ = pytree.tree_flatten_with_path(value)
    return [(tuple(path), leaf) for path, leaf in leaves]


def _default_output_names(paths: Sequence[tuple[Any, ...]]) -> list[str]:
    """Names from the structure that `forward` returns: dict keys and field names, or 'output', 'output_0' ..."""
    if len(paths) == 1 and not any(hasattr(step, "key") or hasattr(step, "name") for step in paths[0]):
        return ["output"]
    names = []
    for path in paths:
        words = [str(getattr(step, "key", getattr(step, "name", getattr(step, "idx", step)))) for step in path]
        names.append("_".join(words) if any(not word.isdigit() for word in words) else "_".join(["output", *words]))
    return names


def _name_values(model: ir.Model, input_names: Sequence[str], output_names: Sequence[str]) -> None:
    graph = model.graph
    for what, values, names in (("input", graph.inputs, input_names), ("output", graph.outputs, output_names)):
        if names and len(names) != len(values):
            raise UsageError(
                f"{len(names)} {what} names are given ({quoted_list(names)}), but the model has {len(values)} {what}s."
            )
        if len(set(names)) != len(names):
            raise UsageError(f"The {what} names {quoted_list(names)} are not all different.")
    wanted = dict(zip(graph.outputs, output_names, strict=False)) | dict(zip(graph.inputs, input_names, strict=False))
    taken = set(wanted.values())
    inner = [value for node in graph.all_nodes() for value in node.outputs]
    for value in (*graph.inputs, *inner, *graph.initializers.values()):
        if value not in wanted and value.name in taken:
            value.name = f"{value.name}__inner"
    for value, name in wanted.items():
        value.name = name


def _strip_metadata(model: ir.Model) -> None:
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        scopes = node.metadata_props.get(_KEPT_METADATA)
        node.metadata_props.clear()
        node.doc_string = None
        if scopes is not None:
            node.metadata_props[_KEPT_METADATA] = scopes
        for output in node.outputs:
            output.metadata_props.clear()


def _reference(
    model: TorchModel,
    run: Callable[[tuple[Any, ...], Mapping[str, Any]], Any],
    graph_model: ir.Model,
    shapes: Mapping[str, tuple[Dimension, ...]],
    *,
    seed: int,
) -> ForeignConversion:
    """Run the source on its example inputs, on seeded inputs, and with other sizes of the dynamic axes."""
    import torch
    import torch.utils._pytree as pytree

    leaves, structure = pytree.tree_flatten((model.args or (), dict(model.kwargs)))
    positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    inputs, outputs = list(graph_model.graph.inputs), list(graph_model.graph.outputs)
    if len(positions) != len(inputs):
        raise ModelError(
            f"The exporter gave the graph {len(inputs)} inputs ({quoted_list(str(value.name) for value in inputs)}), "
            f"but forward gets {len(positions)} tensors.",
            "Give tensors only, each of them once.",
        )
    if any(leaves[i].dtype == torch.bfloat16 for i in positions):
        return ForeignConversion(
            cases=(), not_compared_reason="its inputs are bfloat16", metadata=model.metadata, versions=_versions()
        )

    def case(tensors: Sequence[torch.Tensor]) -> ReferenceCase:
        filled = list(leaves)
        for position, tensor in zip(positions, tensors, strict=True):
            # Some modules change their inputs in place.
            filled[position] = tensor.clone()
        args, kwargs = pytree.tree_unflatten(filled, structure)
        answers = [leaf for _, leaf in _leaves(run(args, kwargs)) if isinstance(leaf, torch.Tensor)]
        return ReferenceCase(
            feeds={str(value.name): _array(t) for value, t in zip(inputs, tensors, strict=True)},
            outputs={str(value.name): _array(t) for value, t in zip(outputs, answers, strict=True)},
        )

    fixed = [_fixed_sizes(shapes.get(str(value.name)), leaves[i]) for i, value in zip(positions, inputs, strict=True)]
    examples = [_sized(leaves[i], sizes) for i, sizes in zip(positions, fixed, strict=True)]
    names = [str(value.name) for value in inputs]
    seeded = [_seeded(t, name, seed) for t, name in zip(examples, names, strict=True)]
    cases = [case(examples), case(seeded)]
    again = case(seeded)
    resized = _resized(graph_model, seeded, shapes)
    if resized is not None:
        try:
            cases.append(case(resized))
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
            # Dynamic, but not by any number: sizes that the network itself refuses prove nothing.
            resized = None
    return ForeignConversion(
        cases=tuple(cases),
        is_deterministic=_all_equal(cases[1], again),
        metadata=model.metadata,
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    return installed_versions(("torch", "onnxscript", "onnx"))


def _array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    import torch

    plain = tensor.detach().cpu()
    if plain.dtype == torch.bfloat16:
        plain = plain.float()
    return np.array(plain.numpy())


def _seeded(example: torch.Tensor, name: str, seed: int) -> torch.Tensor:
    """Random values where they can't be out of range: floats. Indices and masks stay as the example has them."""
    import torch

    if not example.dtype.is_floating_point:
        return example
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return torch.from_numpy(rng.standard_normal(tuple(example.shape))).to(example.dtype)


def _fixed_sizes(shape: tuple[Dimension, ...] | None, example: torch.Tensor) -> tuple[int, ...]:
    asked = shape or tuple(example.shape)
    return tuple(dim if isinstance(dim, int) else size for dim, size in zip(asked, example.shape, strict=True))


def _sized(tensor: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """`tensor`, repeated or cut to `sizes`."""
    import torch

    if sizes == tuple(tensor.shape):
        return tensor
    return torch.from_numpy(np.resize(_array(tensor), sizes)).to(tensor.dtype)


def _resized(
    graph_model: ir.Model, tensors: Sequence[torch.Tensor], shapes: Mapping[str, tuple[Dimension, ...]]
) -> list[torch.Tensor] | None:
    """`tensors` with one more index on each axis that stays dynamic; None where none does."""
    resized = []
    for value, tensor in zip(graph_model.graph.inputs, tensors, strict=True):
        dims = value.shape.dims if value.shape is not None else tuple(tensor.shape)
        asked = shapes.get(str(value.name)) or dims
        sizes = tuple(
            size if isinstance(dim, int) or isinstance(wanted, int) else size + 1
            for dim, wanted, size in zip(dims, asked, tensor.shape, strict=True)
        )
        resized.append(_sized(tensor, sizes))
    return resized if any(new is not old for new, old in zip(resized, tensors, strict=True)) else None


def _all_equal(one: ReferenceCase, other: ReferenceCase) -> bool:
    return all(
        np.array_equal(value, other.outputs[name], equal_nan=True)
        for name, value in one.outputs.items()
        if value.dtype.kind != "f"
    ) and all(
        np.allclose(value, other.outputs[name], rtol=1e-4, atol=1e-5, equal_nan=True)
        for name, value in one.outputs.items()
        if value.dtype.kind == "f"
    )
