"""PyTorch sources: what runs in the child process for files and factories, and in this one for objects."""

from __future__ import annotations

import inspect
import io
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from onnxprune.contracts import JsonObject
from onnxprune.convert.labels import is_label_file, labels_from_lines
from onnxprune.convert.pytorch_archive import check_exported_archive, copy_archive, read_extra_texts
from onnxprune.convert.pytorch_examples import argument_names, with_example_inputs
from onnxprune.convert.pytorch_export import export_torch_model
from onnxprune.convert.pytorch_factory import TorchModel, as_torch_model, split_arguments
from onnxprune.convert.pytorch_weights import load_weights, read_state_dict
from onnxprune.convert.reference import ForeignConversion, model_path_in, save_conversion
from onnxprune.convert.request import Dimension, SourceRequest
from onnxprune.data.user_code import call_user_code, load_callable
from onnxprune.errors import ModelError, PluginError, UsageError, quoted_list
from onnxprune.graph.io import save_model

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["convert_exported", "convert_factory", "convert_object"]


def convert_factory(arguments: JsonObject, folder: Path) -> None:
    """Call the factory, load its weights and export it into `folder` (runs in the child process)."""
    spec = arguments["factory"]
    subject = f"Factory '{spec}'"
    try:
        factory = load_callable(spec, what="Factory")
        _check_takes_no_arguments(factory, subject)
        _seed(arguments["seed"])
        returned = call_user_code(factory, spec=spec, what="Factory")
    except PluginError as error:
        # The traceback stays in this process: the message has its last line and its place.
        raise PluginError(error.message, "Call the function in Python to see the whole traceback.") from error
    model = as_torch_model(returned, subject=subject)
    notes: tuple[str, ...] = ()
    if arguments["weights"] is not None:
        if _is_exported(model.module):
            raise UsageError("--weights does not go with a factory that returns an ExportedProgram.")
        path = Path(arguments["weights"])
        state_dict = read_state_dict(path)
        notes = load_weights(model.module, state_dict, path=path)
        model = replace(model, metadata={**state_dict.metadata, **model.metadata})
    _finish(model, arguments, folder, notes=notes)


def _seed(seed: int) -> None:
    """A module without weights has random ones, but the same in every run."""
    import torch

    torch.manual_seed(seed)


def _check_takes_no_arguments(function: Callable[..., Any], subject: str) -> None:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # built-ins may have no signature
        return
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in kinds]
    if required:
        raise PluginError(
            f"{subject} needs the arguments {quoted_list(required)}, but is called without any.",
            "Give them default values, or write a function without arguments that calls it.",
        )


def convert_exported(arguments: JsonObject, folder: Path) -> None:
    """Load a `.pt2` after the safety check and export it into `folder` (runs in the child process)."""
    path = Path(arguments["path"])
    if arguments["trust_source"]:
        program = _load_exported(path, shown_as=path)
    else:
        pickle_members = check_exported_archive(path)
        checked = folder / "checked.pt2"
        copy_archive(path, checked)
        _check_pickles(checked, pickle_members, shown_as=path)
        program = _load_exported(checked, shown_as=path)
        checked.unlink()
    metadata: dict[str, str] = {}
    for name, text in read_extra_texts(path).items():
        metadata |= labels_from_lines(text) if is_label_file(name) else {name: text}
    _finish(TorchModel(module=program, metadata=metadata), arguments, folder)


def convert_object(source: Any, request: SourceRequest) -> tuple[ir.Model, ForeignConversion]:
    """Export a module or ExportedProgram that the caller holds; it stays as it was."""
    if request.example_inputs is not None and _is_exported(source):
        raise UsageError("An ExportedProgram has its inputs already: leave 'example_inputs' out.")
    args, kwargs = split_arguments(request.example_inputs)
    model = TorchModel(module=source, args=args, kwargs=kwargs, dynamic_shapes=request.dynamic_shapes)
    return _export(model, request.shapes, inputs=request.inputs, outputs=request.outputs, seed=request.seed)


def _finish(model: TorchModel, arguments: JsonObject, folder: Path, *, notes: tuple[str, ...] = ()) -> None:
    shapes = {name: tuple(shape) for name, shape in arguments["shapes"].items()}
    graph_model, conversion = _export(
        model, shapes, inputs=arguments["inputs"], outputs=arguments["outputs"], seed=arguments["seed"]
    )
    save_conversion(replace(conversion, notes=(*notes, *conversion.notes)), folder)
    save_model(graph_model, model_path_in(folder))


def _export(
    model: TorchModel,
    shapes: Mapping[str, tuple[Dimension, ...]],
    *,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    seed: int,
) -> tuple[ir.Model, ForeignConversion]:
    if _is_exported(model.module):
        args, kwargs = _exported_inputs(model.module)
        model = replace(model, args=args, kwargs=kwargs)
    else:
        # Names of inputs are names of arguments, unless the caller renames them.
        names = argument_names(model.module)
        renamed = dict(zip(inputs, names, strict=False))
        model = with_example_inputs(
            model, {renamed.get(name, name): shape for name, shape in shapes.items()}, seed=seed
        )
    return export_torch_model(model, input_names=inputs, output_names=outputs, shapes=shapes, seed=seed)


def _is_exported(module: object) -> bool:
    import torch

    return isinstance(module, torch.export.ExportedProgram)


def _exported_inputs(program: ExportedProgram) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if program.example_inputs is None:
        raise ModelError(
            "The ExportedProgram carries no example inputs.", "Save it with the inputs that it was exported with."
        )
    args, kwargs = program.example_inputs
    return tuple(args), dict(kwargs)


def _check_pickles(archive: Path, members: tuple[str, ...], *, shown_as: Path) -> None:
    """Every pickle must load under the restricted unpickler, which calls nothing but tensor constructors."""
    import torch

    with zipfile.ZipFile(archive) as file:
        for member in members:
            data = file.read(member)
            try:
                torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            except pickle.UnpicklingError as error:
                reason = str(error).strip().splitlines()
                raise ModelError(
                    f"Source '{shown_as}' is refused: '{member}' is a pickle that calls more than tensors need, and "
                    f"PyTorch would run it ({reason[0] if reason else 'unreadable'}).",
                    "Export the model again yourself, or give --trust-source if you trust whoever made the file.",
                ) from error
            except (RuntimeError, ValueError, EOFError, OSError, KeyError, AttributeError, TypeError) as error:
                raise ModelError(
                    f"Source '{shown_as}' is refused: '{member}' can't be read as tensors ({type(error).__name__}).",
                    "Save it again with torch.export.save.",
                ) from error


def _load_exported(path: Path, *, shown_as: Path) -> ExportedProgram:
    import torch

    try:
        return torch.export.load(path)
    except Exception as error:  # a file may break the loader in any way (docs/adr/0007)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ModelError(
            f"Source '{shown_as}' can't be loaded by PyTorch {torch.__version__}: "
            f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}.",
            "An ExportedProgram is read by the PyTorch version that wrote it or a newer one.",
        ) from error
