"""What a source answers to given inputs, carried from the process that runs the source to the one that compares."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxprune.errors import ModelError

__all__ = ["ForeignConversion", "ReferenceCase", "load_conversion", "model_path_in", "save_conversion"]

_ARRAYS = "reference.npz"
_FACTS = "conversion.json"
_MODEL = "model.onnx"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceCase:
    """Inputs by name, and what the source makes of them."""

    feeds: Mapping[str, npt.NDArray[Any]]
    outputs: Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignConversion:
    """Everything about a conversion but the graph itself.

    Without `cases`, `not_compared_reason` says why. `is_deterministic` is False when the source gave different
    outputs for the same inputs.
    """

    cases: tuple[ReferenceCase, ...]
    not_compared_reason: str = ""
    is_deterministic: bool = True
    is_quantized: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def model_path_in(folder: Path) -> Path:
    """Where a converter writes its model inside its job folder."""
    return folder / _MODEL


def save_conversion(conversion: ForeignConversion, folder: Path) -> None:
    """Write `conversion` into `folder` in plain files: JSON and arrays, never pickles."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    cases = []
    for number, case in enumerate(conversion.cases):
        names: dict[str, list[str]] = {}
        for part, values in (("feeds", case.feeds), ("outputs", case.outputs)):
            names[part] = list(values)
            arrays.update({f"{number}_{part}_{i}": _plain(array) for i, array in enumerate(values.values())})
        cases.append(names)
    np.savez(folder / _ARRAYS, allow_pickle=False, **arrays)
    facts = {name: value for name, value in asdict(conversion).items() if name != "cases"}
    (folder / _FACTS).write_text(json.dumps({"cases": cases, **facts}), encoding="utf-8")


def load_conversion(folder: Path) -> ForeignConversion:
    """Read what `save_conversion` wrote.

    Raises:
        ModelError: The converter ended without writing it.
    """
    try:
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        with np.load(folder / _ARRAYS, allow_pickle=False) as arrays:
            cases = tuple(_case(arrays, number, names) for number, names in enumerate(facts.pop("cases")))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"The converter ended without a readable result ({error}).") from error
    facts["notes"] = tuple(facts["notes"])
    return ForeignConversion(cases=cases, **facts)


def _case(arrays: Mapping[str, npt.NDArray[Any]], number: int, names: Mapping[str, Sequence[str]]) -> ReferenceCase:
    def part(key: str) -> dict[str, npt.NDArray[Any]]:
        return {name: _from_plain(arrays[f"{number}_{key}_{i}"]) for i, name in enumerate(names[key])}

    return ReferenceCase(feeds=part("feeds"), outputs=part("outputs"))


def _plain(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    # Strings are Python objects in ONNX Runtime and TensorFlow; .npz files would hold them as pickles.
    return array.astype(str) if array.dtype.kind in "OS" else array


def _from_plain(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return array.astype(object) if array.dtype.kind == "U" else array
