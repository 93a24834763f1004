"""What the user asked for: read from TOML and the command line, checked, frozen.

A recipe file holds plain tables; command line options are laid over them *before* anything is checked, so that there
is one check with one kind of message:

    schema = 1
    passes = ["simplify", { name = "prune", ratio = 0.3 }, "quant"]

    [targets.ort-mobile]
    platform = "arm64"

    [data]
    calibration = "images/"

    [budget]
    score_drop = 0.01
"""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from onnxprune.contracts import JsonObject, PassConfig
from onnxprune.data.preprocess import Preprocess
from onnxprune.errors import OutputError, UsageError, did_you_mean
from onnxprune.evaluate.budget import Budget
from onnxprune.plugins import find_pass, find_target

__all__ = [
    "SCHEMA",
    "DataOptions",
    "MeasureOptions",
    "Recipe",
    "Step",
    "TargetStep",
    "decode_recipe",
    "overlay",
    "read_recipe_file",
    "recipe_to_json",
]

SCHEMA = 1
ModelT = TypeVar("ModelT", bound=BaseModel)


class DataOptions(PassConfig):
    """Where samples come from."""

    calibration: str | None = Field(
        default=None,
        description="Unlabelled samples: a folder of images, .npz, .npy, or module:function. A path counts from "
        "the recipe.",
    )
    calibration_samples: int = Field(default=128, ge=1, description="At most this many calibration samples are used.")
    eval: str | None = Field(
        default=None,
        description="Labelled samples (image folder or .npz), or module:function(runner) -> score.",
    )
    eval_samples: int | None = Field(default=None, ge=1, description="At most this many evaluation samples are used.")


class MeasureOptions(PassConfig):
    """What is measured of every artifact."""

    latency: bool = Field(default=True, description="Time source and artifact, interleaved.")
    load: bool = Field(default=True, description="Load time and peak memory, in a process of its own.")
    fidelity: bool = Field(default=True, description="Compare the artifact's outputs with the source's.")
    score: bool = Field(default=True, description="Run the evaluator on source and artifact.")
    threads: int = Field(default=1, ge=1, description="Threads for timed runs.")
    min_seconds: float = Field(default=1.0, gt=0, description="Time at least this long for each model.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One pass of the pipeline; `step_id` is its name, or 'prune#2' for the second of a name."""

    step_id: str
    name: str
    config: PassConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetStep:
    """One target to build for."""

    name: str
    config: PassConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A checked recipe. Paths in `data` are absolute or function names."""

    seed: int
    steps: tuple[Step, ...]
    targets: tuple[TargetStep, ...]
    data: DataOptions
    preprocess: Preprocess
    measure: MeasureOptions
    budget: Budget


SECTIONS: dict[str, type[BaseModel]] = {
    "data": DataOptions,
    "preprocess": Preprocess,
    "measure": MeasureOptions,
    "budget": Budget,
}
DEFAULT_TARGETS: dict[str, dict[str, Any]] = {"onnx": {}}
TOP_LEVEL_KEYS = ("schema", "seed", "passes", "targets", *SECTIONS)


def read_recipe_file(path: Path) -> JsonObject:
    """The tables of a recipe file, unchecked but for being TOML; data paths made absolute."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"Recipe '{path}' does not exist.") from None
    except OSError as error:
        raise OutputError(f"Recipe '{path}' can't be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"Recipe '{path}' is not valid TOML: {error}.") from error
    data = tables.get("data")
    if isinstance(data, dict):
        for key in ("calibration", "eval"):
            if isinstance(data.get(key), str):
                data[key] = _from_folder(data[key], path.resolve().parent)
    return tables


def _from_folder(spec: str, folder: Path) -> str:
    """`spec` with a relative file path in front of an optional ':function' made absolute."""
    file_part, colon, function = spec.rpartition(":")
    if colon and file_part.endswith(".py"):
        return f"{(folder / file_part).resolve()}:{function}"
    candidate = folder / spec
    return str(candidate.resolve()) if not colon or candidate.exists() else spec


def overlay(
    tables: Mapping[str, Any],
    *,
    passes: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    settings: Iterable[str] = (),
    sections: Mapping[str, Mapping[str, Any]] | None = None,
) -> JsonObject:
    """Lay command line options over recipe tables.

    Args:
        tables: A recipe's tables.
        passes: Names or ids; they replace the recipe's list, and keep the recipe's configuration of the same id.
        targets: Names; likewise.
        settings: "prune.ratio=0.5", "targets.ort-mobile.platform=arm64", "seed=3": the value is TOML, or a bare word.
        sections: Values for whole sections, such as {"data": {"calibration": "images/"}}; None values are left out.
    """
    check_form(tables)
    merged: JsonObject = copy.deepcopy(dict(tables))
    if not merged.get("targets"):
        merged["targets"] = copy.deepcopy(DEFAULT_TARGETS)
    if passes is not None:
        known = {entry["id"]: entry for entry in _pass_entries(merged.get("passes", []))}
        merged["passes"] = [known.get(name, {"name": name.partition("#")[0], "id": name}) for name in _with_ids(passes)]
    if targets is not None:
        configured = merged.get("targets", {})
        merged["targets"] = {name: configured.get(name, {}) for name in targets}
    for section, values in (sections or {}).items():
        given = {key: value for key, value in values.items() if value is not None}
        if given:
            merged[section] = {**merged.get(section, {}), **given}
    for setting in settings:
        _apply_setting(merged, setting)
    return merged


def check_form(tables: Mapping[str, Any], *, where: str = "Recipe") -> None:
    """Refuse what is not even of the right kind: `passes` is a list, everything else but seed and schema a table."""
    for key in ("targets", *SECTIONS):
        if not isinstance(tables.get(key, {}), dict):
            raise UsageError(
                f"{where}: '{key}' must be a table, got {tables[key]!r}.",
                "Write: [targets.ort-mobile]." if key == "targets" else f"Write: [{key}].",
            )
    for name, table in tables.get("targets", {}).items():
        if not isinstance(table, dict):
            raise UsageError(f"{where}: 'targets.{name}' must be a table, got {table!r}.", f"Write: [targets.{name}].")
    _pass_entries(tables.get("passes", []))


def _with_ids(names: Sequence[str]) -> list[str]:
    seen: dict[str, int] = {}
    ids = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        ids.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return ids


def _pass_entries(passes: Any) -> list[JsonObject]:
    """The recipe's list of passes with every entry a table that has a name and an id."""
    if not isinstance(passes, list):
        raise UsageError(
            f"'passes' must be a list, got {type(passes).__name__}.", 'Write: passes = ["simplify", "quant"].'
        )
    entries: list[JsonObject] = []
    for index, entry in enumerate(passes):
        if isinstance(entry, str):
            entry = {"name": entry}
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise UsageError(
                f"passes[{index}]: needs a name.", 'Write: passes = ["simplify", { name = "prune", ratio = 0.5 }].'
            )
        entries.append(dict(entry))
    ids = _with_ids([entry["name"] for entry in entries])
    for index, (entry, default_id) in enumerate(zip(entries, ids, strict=True)):
        if not isinstance(entry.setdefault("id", default_id), str) or not entry["id"]:
            raise UsageError(f"passes[{index}]: 'id' must be a name, got {entry['id']!r}.")
    return entries


def _apply_setting(tables: JsonObject, setting: str) -> None:
    key, equals, text = setting.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UsageError(f"Setting '{setting}' has no value.", "Write: --set prune.ratio=0.5.")
    value = _toml_value(text.strip())
    if parts[0] in ("seed", "schema") and len(parts) == 1:
        tables[parts[0]] = value
        return
    if parts[0] in SECTIONS and len(parts) == 2:
        tables.setdefault(parts[0], {})[parts[1]] = value
        return
    if parts[0] == "targets" and len(parts) >= 3:
        parts = parts[1:]
    targets = tables["targets"]
    if parts[0] in targets and len(parts) == 2:
        targets[parts[0]] = {**targets[parts[0]], parts[1]: value}
        return
    entries = _pass_entries(tables.get("passes", []))
    for entry in entries:
        if entry["id"] == parts[0] and len(parts) == 2:
            entry[parts[1]] = value
            tables["passes"] = entries
            return
    places = [entry["id"] for entry in entries] + list(targets) + list(SECTIONS)
    raise UsageError(
        f"Setting '{setting}': the run has no pass, target or section '{parts[0]}' with a key '{'.'.join(parts[1:])}'.",
        did_you_mean(parts[0], places),
    )


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def decode_recipe(tables: Mapping[str, Any], *, origin: str = "the command line") -> Recipe:
    """Check recipe tables and freeze them.

    Args:
        tables: As read from TOML or JSON.
        origin: What to call the recipe in messages.

    Raises:
        UsageError: An unknown key, pass or target, or a value out of range; the message says where.
    """
    where = f"Recipe '{origin}'" if origin != "the command line" else "Recipe"
    for key in tables:
        if key not in TOP_LEVEL_KEYS:
            raise UsageError(f"{where}: unknown key '{key}'.", did_you_mean(key, TOP_LEVEL_KEYS))
    check_form(tables, where=where)
    schema = tables.get("schema", SCHEMA)
    if schema != SCHEMA:
        raise UsageError(f"{where}: schema {schema!r} is not known.", f"This version reads schema {SCHEMA}.")
    seed = tables.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise UsageError(f"{where}: 'seed' must be a whole number of at least 0, got {seed!r}.")

    steps = []
    for index, entry in enumerate(_pass_entries(tables.get("passes", []))):
        place = f"{where}, passes[{index}]"
        config_table = {key: value for key, value in entry.items() if key not in ("name", "id")}
        pass_class = find_pass(entry["name"])
        config = _decode_section(pass_class.config_type, config_table, place=place, owner=f"pass '{entry['name']}'")
        steps.append(Step(step_id=entry["id"], name=entry["name"], config=config))
    ids = [step.step_id for step in steps]
    for step_id in ids:
        if ids.count(step_id) > 1:
            raise UsageError(f"{where}: two passes have the id '{step_id}'.", "Give each pass an id of its own.")

    targets = []
    for name, table in (tables.get("targets") or DEFAULT_TARGETS).items():
        target_class = find_target(name)
        config = _decode_section(
            target_class.config_type, table, place=f"{where}, targets.{name}", owner=f"target '{name}'"
        )
        targets.append(TargetStep(name=name, config=config))

    decoded = {
        name: _decode_section(section, tables.get(name, {}), place=f"{where}, [{name}]", owner=f"section '{name}'")
        for name, section in SECTIONS.items()
    }
    data, preprocess, measure, budget = (decoded[name] for name in SECTIONS)
    # The table SECTIONS is the only place that pairs names and types; mypy can't follow it.
    if not (
        isinstance(data, DataOptions)
        and isinstance(preprocess, Preprocess)
        and isinstance(measure, MeasureOptions)
        and isinstance(budget, Budget)
    ):
        raise TypeError("SECTIONS and Recipe disagree")
    return Recipe(
        seed=seed,
        steps=tuple(steps),
        targets=tuple(targets),
        data=data,
        preprocess=preprocess,
        measure=measure,
        budget=budget,
    )


def _decode_section(section: type[ModelT], table: Mapping[str, Any], *, place: str, owner: str) -> ModelT:
    try:
        return section.model_validate(table)
    except ValidationError as error:
        raise UsageError(*_describe(error, section, place=place, owner=owner)) from None


def _describe(error: ValidationError, section: type[BaseModel], *, place: str, owner: str) -> tuple[str, str]:
    """The first validation error as a message and a hint."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = list(section.model_fields)
        return f"{place}: unknown key '{key}' for {owner}.", did_you_mean(key, known).replace("Known:", "Known keys:")
    reason = first["msg"].removeprefix("Value error, ")
    reason = reason[:1].lower() + reason[1:]
    if not key:
        return f"{place}: {owner}: {reason.rstrip('.')}.", ""
    return f"{place}: '{key}' for {owner}: {reason.rstrip('.')}, got {first['input']!r}.", ""


def recipe_to_json(recipe: Recipe) -> JsonObject:
    """The recipe as tables that `decode_recipe` reads back, every default written out."""
    return {
        "schema": SCHEMA,
        "seed": recipe.seed,
        "passes": [
            {"name": step.name, "id": step.step_id, **step.config.model_dump(mode="json")} for step in recipe.steps
        ],
        "targets": {step.name: step.config.model_dump(mode="json") for step in recipe.targets},
        **{name: getattr(recipe, name).model_dump(mode="json") for name in SECTIONS},
    }
