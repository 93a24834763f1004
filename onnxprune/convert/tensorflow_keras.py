"""Keras files: looked at as data first, then loaded in safe mode, Keras-2 files after a rewrite of their config."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxprune.errors import ModelError, quoted_list

__all__ = ["LoadedKeras", "load_keras_file", "rewrite_keras2_config"]

_TRUST_HINT = "Give --trust-source if you trust whoever made the file: its code will then run."
_OBJECT_HINT = (
    "Load the model in Python, where its classes are known, and convert the object: onnxprune.convert(model); "
    "or save it as a SavedModel with model.export(folder), and convert the folder."
)
_KERAS_PACKAGES = ("keras", "builtins", "tensorflow.keras", "tensorflow.python.keras", "tf_keras")

# A Keras weights file is not compressed much; an archive that grows more than this is made to fill a disk.
_MAX_EXPANSION = 100
_MAX_SLACK_BYTES = 64 << 20


class _Any:
    """Stands for: every value, because inference doesn't depend on it."""


_ANY = _Any()
# What Keras 2 wrote into the config of a layer and Keras 3 refuses to read, and the value with which it says nothing.
# Tried with Keras 3.15 on configs as Keras 2.4 to 2.15 write them.
_KEYS_OF_KERAS_2: dict[tuple[str, ...], Mapping[str, object]] = {
    ("DepthwiseConv1D", "DepthwiseConv2D"): {"groups": 1},
    ("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"): {"groups": 1},
    ("SeparableConv1D", "SeparableConv2D"): {
        "groups": 1,
        "kernel_initializer": _ANY,
        "kernel_regularizer": _ANY,
        "kernel_constraint": _ANY,
    },
    ("LSTM", "GRU", "SimpleRNN"): {"time_major": False},
    ("SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D"): {"noise_shape": None, "trainable": _ANY},
    ("MultiHeadAttention",): {"query_shape": _ANY, "key_shape": _ANY, "value_shape": _ANY},
}
_WRAPPERS = ("Bidirectional", "TimeDistributed")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedKeras:
    """A Keras model, and what had to be done to load it."""

    model: Any
    notes: tuple[str, ...] = ()


def load_keras_file(path: Path, folder: Path, *, trust_source: bool) -> LoadedKeras:
    """Load a `.keras` or `.h5` file without running code that it brings along, unless it is trusted.

    Args:
        path: The file.
        folder: For a rewritten copy; the file itself stays as it is.
        trust_source: Lambda layers may run their code.

    Raises:
        ModelError: It is damaged, brings code, or uses classes that Keras does not have.
    """
    is_archive = zipfile.is_zipfile(path)
    config = _read_archive_config(path) if is_archive else _read_h5_config(path, trust_source=trust_source)
    if not trust_source:
        _refuse_code(path, config)
    rewritten, dropped = rewrite_keras2_config(config)
    notes: tuple[str, ...] = ()
    if rewritten != config:
        copy = folder / ("rewritten.keras" if is_archive else "rewritten.h5")
        (_rewrite_archive if is_archive else _rewrite_h5)(path, copy, rewritten)
        notes = (f"Written by Keras 2: {quoted_list(dropped)} left out of the config, which Keras 3 does not read.",)
    else:
        # Keras goes by the ending, and ours by the content.
        copy = folder / ("model.keras" if is_archive else "model.h5")
        copy.symlink_to(path)
    return LoadedKeras(model=_load(copy, shown_as=path, trust_source=trust_source), notes=notes)


def _read_archive_config(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            for info in infos:
                parts = info.filename.split("/")
                if info.filename.startswith("/") or ".." in parts or "\\" in info.filename:
                    raise ModelError(
                        f"Source '{path}' is refused: its member {info.filename!r} would be written outside its folder."
                    )
            if sum(info.file_size for info in infos) > _MAX_EXPANSION * path.stat().st_size + _MAX_SLACK_BYTES:
                raise ModelError(f"Source '{path}' is refused: it unpacks to far more than a model.")
            damaged = archive.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(f"member '{damaged}' fails its checksum")
            return json.loads(archive.read("config.json"))
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, EOFError, RecursionError) as error:
        raise _damaged(path, error) from error


def _read_h5_config(path: Path, *, trust_source: bool) -> Any:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            if not trust_source:
                _refuse_links(path, file)
            text = file.attrs.get("model_config")
            has_weights = "layer_names" in file.attrs or "model_weights" in file or "layers" in file
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise _damaged(path, error) from error
    if text is None:
        if has_weights:
            raise ModelError(
                f"Source '{path}' has weights only, no structure of a model.",
                "Save the whole model (model.save('model.keras')), or load the weights in Python and convert the "
                "object.",
            )
        raise ModelError(f"Source '{path}' is an HDF5 file, but not a Keras model: it has no 'model_config'.")
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ModelError:
    reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
    return ModelError(f"Source '{path}' is damaged: {reason}.", "Copy it again, or save it anew.")


def _refuse_links(path: Path, file: Any) -> None:
    """Refuse links and datasets that take their values from other files."""
    import h5py

    def look(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and (item.external or item.is_virtual):
            raise ModelError(f"Source '{path}' is refused: its weight '{name}' is to be read from another file.")

    file.visititems(look)

    def links(group: Any) -> Iterator[str]:
        for name in group:
            link = group.get(name, getlink=True)
            if isinstance(link, h5py.ExternalLink):
                yield f"{group.name}/{name}"
            elif isinstance(group.get(name), h5py.Group):
                yield from links(group[name])

    for name in links(file):
        raise ModelError(f"Source '{path}' is refused: '{name}' is a link into another file.")


def _objects(config: Any) -> Iterator[dict[str, Any]]:
    """Every object of a Keras config that names a class or is a marshalled value, from the outside in."""
    pending = [config]
    while pending:
        item = pending.pop(0)
        if isinstance(item, dict):
            if "class_name" in item:
                yield item
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)


def _refuse_code(path: Path, config: Any) -> None:
    for item in _objects(config):
        class_name, module = item["class_name"], item.get("module")
        name = _layer_name(item)
        if class_name in ("Lambda", "__lambda__"):
            where = f"layer '{name}' is a Lambda" if name else "it holds a Lambda function"
            raise ModelError(
                f"Source '{path}' is refused: {where}, whose Python code would run here.",
                f"{_TRUST_HINT} Better, replace it by a layer or an operation of Keras.",
            )
        is_keras = module is None or str(module).split(".")[0] in ("keras", "builtins", "keras_hub", "tf_keras")
        if not is_keras and not str(module).startswith(_KERAS_PACKAGES):
            raise ModelError(
                f"Source '{path}' uses the class '{class_name}' of '{module}', which is not part of Keras"
                + (f" (layer '{name}')." if name else "."),
                _OBJECT_HINT,
            )


def _layer_name(item: Mapping[str, Any]) -> str:
    config = item.get("config")
    name = config.get("name") if isinstance(config, dict) else None
    return name if isinstance(name, str) else ""


def rewrite_keras2_config(config: Any) -> tuple[Any, list[str]]:
    """`config` as Keras 3 reads it, and what was left out, as 'Layer.key'. `config` itself is not changed.

    Only keys with a value that says nothing (one group, no time-major layout) are left out: a file that means
    something by them stays as it is, and Keras refuses it.
    """
    rewritten = json.loads(json.dumps(config))
    dropped: list[str] = []
    for item in _objects(rewritten):
        settings = item.get("config")
        if not isinstance(settings, dict):
            continue
        class_name = item["class_name"]
        for classes, keys in _KEYS_OF_KERAS_2.items():
            if class_name not in classes:
                continue
            for key, neutral in keys.items():
                if key in settings and (neutral is _ANY or settings[key] == neutral) and _is_of_keras_2(item):
                    del settings[key]
                    dropped.append(f"{class_name}.{key}")
        inner = settings.get("layer")
        if class_name in _WRAPPERS and isinstance(inner, dict) and "module" not in inner:
            inner |= {"module": "keras.layers", "registered_name": None}
    return rewritten, list(dict.fromkeys(dropped))


def _is_of_keras_2(item: Mapping[str, Any]) -> bool:
    # Keras 3 writes build shapes beside a layer's config, and reads 'trainable' of layers it wrote itself.
    return "build_config" not in item or "groups" in item["config"] or "time_major" in item["config"]


def _rewrite_archive(path: Path, copy: Path, config: Any) -> None:
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(copy, "w") as target:
        for info in source.infolist():
            if info.filename == "config.json":
                target.writestr("config.json", json.dumps(config))
            else:
                with source.open(info) as reader, target.open(info.filename, "w", force_zip64=True) as writer:
                    shutil.copyfileobj(reader, writer, 1 << 20)


def _rewrite_h5(path: Path, copy: Path, config: Any) -> None:
    import h5py

    shutil.copyfile(path, copy)
    with h5py.File(copy, "r+") as file:
        file.attrs["model_config"] = json.dumps(config)


def _load(copy: Path, *, shown_as: Path, trust_source: bool) -> Any:
    import keras

    try:
        return keras.models.load_model(copy, compile=False, safe_mode=not trust_source)
    except Exception as error:  # a file may break the loader in any way (docs/adr/0007)
        text = " ".join(str(error).replace(str(copy), shown_as.name).split())
        reason = text if len(text) <= 300 else f"{text[:200]} ... {text[-90:]}"
        raise ModelError(
            f"Keras {keras.__version__} can't load '{shown_as}': {type(error).__name__}: {reason}", _OBJECT_HINT
        ) from error
