"""Results of passes on disk, found again by the hash of everything that they came from.

An entry's key is a chain: source content -> pass, configuration, data and versions -> next pass ... A rerun, or a run
after a kill, takes every entry up to the first pass that differs.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from onnxprune.contracts import JsonValue, ModelState, PassReport, QuantizationPlan
from onnxprune.errors import ModelError, UsageError, disk_errors
from onnxprune.graph.canonical import canonicalize
from onnxprune.graph.io import load_model, save_model
from onnxprune.ops.shapes import SHAPES

__all__ = ["CachedPass", "PassCache", "chain_key", "file_hash"]


ENTRY_FILE = "entry.json"
_ENTRY_NAME = re.compile(r"[0-9a-f]{64}")


def chain_key(previous: str, **parts: JsonValue) -> str:
    """The key of what follows from `previous` with `parts` (plain JSON values)."""
    text = json.dumps({"previous": previous, **parts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def file_hash(path: Path) -> str:
    """sha256 (hex) of a file's content."""
    with disk_errors(f"Reading '{path}'"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedPass:
    """What one pass left behind.

    `model_key` is the key of the entry that holds the model's file; None: it is the source's own model, which no pass
    has changed yet.
    """

    state: ModelState
    report: PassReport
    plan: JsonValue
    model_key: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    source_hash: str
    model_key: str | None
    report: PassReport
    plan: JsonValue
    quantization: QuantizationPlan | None


class PassCache:
    """Entries in a folder of their own, one folder a key."""

    def __init__(self, folder: Path, *, source_hash: str) -> None:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"The cache '{folder}' is a file, not a folder.", "Name a folder with --cache.")
        self._folder = folder
        self._source_hash = source_hash

    def get(self, key: str, *, before: ModelState, before_model_key: str | None) -> CachedPass | None:
        """The entry for `key`, whose pass got `before`; None where there is no entry that can be read."""
        try:
            entry = TypeAdapter(_Entry).validate_json((self._folder / key / ENTRY_FILE).read_bytes())
            if entry.model_key == before_model_key:
                model = before.model
            else:
                path = self._folder / str(entry.model_key) / "model.onnx"
                model = canonicalize(load_model(path), shape_rules=SHAPES)
        except (OSError, ValidationError, ModelError):
            return None
        return CachedPass(
            state=ModelState(model=model, quantization=entry.quantization),
            report=replace(entry.report, resumed=True),
            plan=entry.plan,
            model_key=entry.model_key,
        )

    def put(
        self,
        key: str,
        *,
        before: ModelState,
        before_model_key: str | None,
        state: ModelState,
        report: PassReport,
        plan: JsonValue,
    ) -> CachedPass:
        """Keep what a pass made of `before`. A pass that left the model alone shares the earlier file."""
        unchanged = state.model is before.model
        model_key = before_model_key if unchanged else key
        with disk_errors(f"Writing the cache '{self._folder}'"):
            self._folder.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=".partial-", dir=self._folder))
            try:
                if not unchanged:
                    save_model(state.model, staging / "model.onnx")
                entry = _Entry(
                    source_hash=self._source_hash,
                    model_key=model_key,
                    report=report,
                    plan=plan,
                    quantization=state.quantization,
                )
                (staging / ENTRY_FILE).write_bytes(to_json(entry, inf_nan_mode="strings"))
                place = self._folder / key
                shutil.rmtree(place, ignore_errors=True)
                staging.rename(place)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
        return CachedPass(state=state, report=report, plan=plan, model_key=model_key)

    def keep_only(self, keys: Collection[str]) -> None:
        """Delete this source's entries but those of `keys`; what else lies in the folder is not ours to delete."""
        if not self._folder.is_dir():
            return
        for item in self._folder.iterdir():
            if _ENTRY_NAME.fullmatch(item.name) and item.name not in keys and self._is_of_this_source(item):
                shutil.rmtree(item, ignore_errors=True)

    def _is_of_this_source(self, entry_folder: Path) -> bool:
        try:
            entry = TypeAdapter(_Entry).validate_json((entry_folder / ENTRY_FILE).read_bytes())
        except (OSError, ValidationError):
            return False
        return entry.source_hash == self._source_hash
