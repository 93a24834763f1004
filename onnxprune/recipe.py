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

Besides passes, the list may hold blocks of passes that run several times around:

    { name = "repeat", times = 4, passes = [{ name = "prune", ratio = 0.5 }, "acme-finetune"] }
"""

from __future__ import annotations

import copy
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, Field, ValidationError

from onnxprune.contracts import CHECK_MARK, PATH_MARK, JsonObject, JsonValue, PassConfig
from onnxprune.data.preprocess import Preprocess
from onnxprune.errors import OutputError, UsageError, did_you_mean, quoted_list
from onnxprune.evaluate.budget import Budget
from onnxprune.plugins import find_pass, find_target, list_plugins

__all__ = [
    "ITERATION_MARK",
    "REPEAT",
    "SCHEMA",
    "DataOptions",
    "MeasureOptions",
    "Recipe",
    "Repeat",
    "RepeatConfig",
    "Step",
    "TargetStep",
    "decode_recipe",
    "decode_step",
    "overlay",
    "overlay_pruning",
    "overlay_quantization",
    "portable_settings",
    "read_recipe_file",
    "recipe_to_json",
]

SCHEMA = 1
REPEAT = "repeat"
"""The name of a block in the list of passes; no pass can have it."""
ITERATION_MARK = "@"
"""'prune@2' is pass 'prune' the second time around."""
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


class RepeatConfig(PassConfig):
    """A block of passes that runs several times around, such as pruning in steps with fine-tuning between."""

    passes: tuple[str | dict[str, Any], ...] = Field(
        min_length=1, description="What runs each time around: names, or tables."
    )
    times: int = Field(ge=1, le=1000, description="How many times around.")
    schedule: Literal["linear", "geometric"] = Field(
        default="linear",
        description="How the ratios of passes inside are reached, counted from the model before the block: 'linear' "
        "takes an equal part of it each time, 'geometric' an equal part of what is left.",
    )
    score_drop: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="Stop when the score falls by more than this below the source's, and go back to the model before "
        "that time around; needs an evaluator.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One pass of the pipeline; `step_id` is its name, or 'prune#2' for the second of a name."""

    step_id: str
    name: str
    config: PassConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeat:
    """Steps that run `times` times around; see `RepeatConfig`."""

    step_id: str
    times: int
    schedule: Literal["linear", "geometric"]
    score_drop: float | None
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetStep:
    """One target to build for."""

    name: str
    config: PassConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A checked recipe. Paths in `data` are absolute or function names."""

    seed: int
    steps: tuple[Step | Repeat, ...]
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
    _root_paths(tables.get("passes"), path.resolve().parent)
    return tables


def _root_paths(passes: Any, folder: Path) -> None:
    """Make the paths among the settings of passes absolute; what has a wrong form is left for `decode_recipe`."""
    for entry in passes if isinstance(passes, list) else ():
        if not isinstance(entry, dict):
            continue
        _root_paths(entry.get("passes"), folder)
        for key, kind in _path_keys(entry.get("name")).items():
            value = entry.get(key)
            if isinstance(value, str) and kind == "program":
                # Not resolved: an environment's interpreter is a link, and what it links to has none of its packages.
                entry[key] = os.path.abspath(folder / value)  # noqa: PTH100
            elif isinstance(value, str) and (kind == "file" or value.rpartition(":")[0].endswith(".py")):
                entry[key] = _from_folder(value, folder)


def _path_keys(pass_name: Any) -> dict[str, str]:
    """Settings of a pass that are paths, and of what."""
    return {key: str(value) for key, value in _marked(pass_name, PATH_MARK).items()}


def _marked(pass_name: Any, mark: str) -> dict[str, JsonValue]:
    """Settings of a pass whose field carries `mark`, and its value; none where there is no such pass."""
    if not isinstance(pass_name, str) or pass_name not in {plugin.name for plugin in list_plugins("pass")}:
        return {}
    fields = find_pass(pass_name).config_type.model_fields
    extras = {key: field.json_schema_extra for key, field in fields.items()}
    return {key: extra[mark] for key, extra in extras.items() if isinstance(extra, dict) and mark in extra}


def portable_settings(pass_name: str, settings: Mapping[str, JsonValue]) -> JsonObject:
    """The settings of a pass that decide, with paths cut to the name of the file: the same on every machine."""
    checks = _marked(pass_name, CHECK_MARK)
    paths = {key: settings.get(key) for key in _path_keys(pass_name)}
    portable = {**settings, **{key: Path(path).name for key, path in paths.items() if isinstance(path, str)}}
    return {key: value for key, value in portable.items() if key not in checks}


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
        known = {entry["id"]: entry for _, entry in _all_entries(_pass_entries(merged.get("passes", [])))}
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


def overlay_pruning(
    tables: Mapping[str, Any], *, latency_ratio: float | None, verify: bool, settings: Iterable[str] = ()
) -> JsonObject:
    """Lay the command line's options for filter pruning over recipe tables.

    Args:
        tables: A recipe's tables.
        latency_ratio: The target of the one pass `prune`, in place of the target that it has.
        verify: Hold what every pass `prune` makes against the masked original.
        settings: What `overlay` was given beside it ("prune.ratio=0.5").

    Raises:
        UsageError: There is no pass `prune`, or several where one is meant; or `settings` give it another target.
    """
    from onnxprune.passes.prune.config import TargetName

    merged: JsonObject = copy.deepcopy(dict(tables))
    entries = _pass_entries(merged.get("passes", []))
    own = [entry for _, entry in _all_entries(entries) if entry["name"] == "prune"]
    option = "--verify-pruning" if latency_ratio is None else "--latency-ratio"
    if not own:
        names = [entry["name"] for _, entry in _all_entries(entries)]
        raise UsageError(
            f"'{option}' is for the pass 'prune', and the run has {quoted_list(names) or 'no passes'}.",
            "Add it: --passes prune,...",
        )
    if latency_ratio is not None:
        if len(own) > 1:
            raise UsageError(
                f"'{option}' can't tell which of the passes {quoted_list(entry['id'] for entry in own)} is meant.",
                f"Write: --set '{own[-1]['id']}.latency_ratio={latency_ratio:g}'.",
            )
        for name in get_args(TargetName):
            if any(setting.split("=")[0].strip() == f"{own[0]['id']}.{name}" for setting in settings):
                raise UsageError(f"Give one target of '{own[0]['id']}', not '--latency-ratio' and '{name}'.")
            own[0].pop(name, None)
        own[0]["latency_ratio"] = latency_ratio
    for entry in own if verify else ():
        entry["verify_oracle"] = True
    merged["passes"] = entries
    return merged


def overlay_quantization(
    tables: Mapping[str, Any],
    *,
    max_drop: float | None,
    min_snr_db: float | None,
    settings: Iterable[str] = (),
) -> JsonObject:
    """Lay the command line's goal for int8 over recipe tables: it takes the place of a goal that the pass `quant` has.

    Args:
        tables: A recipe's tables.
        max_drop: Of the score; or None.
        min_snr_db: Of the outputs; or None.
        settings: What `overlay` was given beside it ("quant.max_drop=0.01").

    Raises:
        UsageError: Both are given; there is no pass `quant`, or several; or `settings` give it another goal.
    """
    goals = {"max_drop": max_drop, "min_snr_db": min_snr_db}
    options = {"max_drop": "--max-drop", "min_snr_db": "--min-snr"}
    asked = [name for name, value in goals.items() if value is not None]
    if len(asked) != 1:
        raise UsageError("'--max-drop' and '--min-snr' exclude each other.", "Give one goal.")
    (goal,) = asked
    merged: JsonObject = copy.deepcopy(dict(tables))
    entries = _pass_entries(merged.get("passes", []))
    own = [entry for _, entry in _all_entries(entries) if entry["name"] == "quant"]
    if not own:
        names = [entry["name"] for _, entry in _all_entries(entries)]
        raise UsageError(
            f"'{options[goal]}' is for the pass 'quant', and the run has {quoted_list(names) or 'no passes'}.",
            "Add it: --passes ...,quant",
        )
    if len(own) > 1:
        raise UsageError(
            f"'{options[goal]}' can't tell which of the passes {quoted_list(entry['id'] for entry in own)} is meant.",
            f"Write: --set '{own[-1]['id']}.{goal}={goals[goal]:g}'.",
        )
    for name in goals:
        if any(setting.split("=")[0].strip() == f"{own[0]['id']}.{name}" for setting in settings):
            raise UsageError(f"Give one goal of '{own[0]['id']}', not '{options[goal]}' and '{name}'.")
        own[0].pop(name, None)
    own[0][goal] = goals[goal]
    merged["passes"] = entries
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
    """The recipe's list of passes with every entry, those in blocks as well, a table that has a name and an id."""
    entries = _entry_tables(passes, place="passes")
    placed = list(_all_entries(entries))
    default_ids = _with_ids([entry["name"] for _, entry in placed])
    for (place, entry), default_id in zip(placed, default_ids, strict=True):
        if not isinstance(entry.setdefault("id", default_id), str) or not entry["id"]:
            raise UsageError(f"{place}: 'id' must be a name, got {entry['id']!r}.")
        if ITERATION_MARK in entry["id"]:
            raise UsageError(
                f"{place}: the id '{entry['id']}' holds '{ITERATION_MARK}', which stands before the number of an "
                f"iteration of '{REPEAT}'.",
                "Choose another id.",
            )
    return entries


def _entry_tables(passes: Any, *, place: str) -> list[JsonObject]:
    if not isinstance(passes, list | tuple):
        raise UsageError(
            f"'{place}' must be a list, got {type(passes).__name__}.", 'Write: passes = ["simplify", "quant"].'
        )
    entries: list[JsonObject] = []
    for index, entry in enumerate(passes):
        if isinstance(entry, str):
            entry = {"name": entry}
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise UsageError(
                f"{place}[{index}]: needs a name.", 'Write: passes = ["simplify", { name = "prune", ratio = 0.5 }].'
            )
        entry = dict(entry)
        if entry["name"] == REPEAT and "passes" in entry:
            inner = f"{place}[{index}].passes"
            entry["passes"] = _entry_tables(entry["passes"], place=inner)
            for number, nested in enumerate(entry["passes"]):
                if nested["name"] == REPEAT:
                    raise UsageError(
                        f"{inner}[{number}]: a '{REPEAT}' inside a '{REPEAT}' is not possible.",
                        "Write the blocks one after the other, or raise `times`.",
                    )
        entries.append(entry)
    return entries


def _all_entries(entries: Sequence[JsonObject], *, place: str = "passes") -> Iterator[tuple[str, JsonObject]]:
    """Every entry with its place: those of a block come after the block's own."""
    for index, entry in enumerate(entries):
        yield f"{place}[{index}]", entry
        if entry["name"] == REPEAT:
            yield from _all_entries(entry.get("passes", ()), place=f"{place}[{index}].passes")


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
    for _, entry in _all_entries(entries):
        if entry["id"] == parts[0] and len(parts) == 2:
            entry[parts[1]] = value
            tables["passes"] = entries
            return
    places = [entry["id"] for _, entry in _all_entries(entries)] + list(targets) + list(SECTIONS)
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

    entries = _pass_entries(tables.get("passes", []))
    steps = tuple(_decode_entry(entry, place=f"{where}, passes[{index}]") for index, entry in enumerate(entries))
    ids = [entry["id"] for _, entry in _all_entries(entries)]
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
        steps=steps,
        targets=tuple(targets),
        data=data,
        preprocess=preprocess,
        measure=measure,
        budget=budget,
    )


def decode_step(name: str, config: Mapping[str, Any]) -> Step:
    """One configured pass, for those who run it without a recipe; raises as `decode_recipe` does."""
    return _decode_pass({"name": name, "id": name, **config}, place=f"Pass '{name}'")


def _decode_entry(entry: JsonObject, *, place: str) -> Step | Repeat:
    if entry["name"] != REPEAT:
        return _decode_pass(entry, place=place)
    table = {key: value for key, value in entry.items() if key not in ("name", "id")}
    config = _decode_section(RepeatConfig, table, place=place, owner=f"'{REPEAT}'")
    steps = tuple(
        _decode_pass(inner, place=f"{place}.passes[{number}]") for number, inner in enumerate(entry["passes"])
    )
    return Repeat(
        step_id=entry["id"],
        times=config.times,
        schedule=config.schedule,
        score_drop=config.score_drop,
        steps=steps,
    )


def _decode_pass(entry: JsonObject, *, place: str) -> Step:
    table = {key: value for key, value in entry.items() if key not in ("name", "id")}
    pass_class = find_pass(entry["name"])
    config = _decode_section(pass_class.config_type, table, place=place, owner=f"pass '{entry['name']}'")
    return Step(step_id=entry["id"], name=entry["name"], config=config)


def _decode_section(section: type[ModelT], table: Mapping[str, Any], *, place: str, owner: str) -> ModelT:
    try:
        return section.model_validate(table)
    except ValidationError as error:
        raise UsageError(*_describe(error, section, place=place, owner=owner)) from None


def _describe(error: ValidationError, section: type[BaseModel], *, place: str, owner: str) -> tuple[str, str]:
    """The first validation error as a message and a hint: a misspelt key before the one that is missing for it."""
    errors = error.errors()
    first = next((found for found in errors if found["type"] == "extra_forbidden"), errors[0])
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = list(section.model_fields)
        return f"{place}: unknown key '{key}' for {owner}.", did_you_mean(key, known).replace("Known:", "Known keys:")
    if first["type"] == "missing":
        return f"{place}: {owner} needs '{key}'.", "Known keys: " + ", ".join(section.model_fields) + "."
    if first["type"] == "too_short":
        return f"{place}: '{key}' for {owner} is empty.", ""
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
        "passes": [_step_to_json(step) for step in recipe.steps],
        "targets": {step.name: step.config.model_dump(mode="json") for step in recipe.targets},
        **{name: getattr(recipe, name).model_dump(mode="json") for name in SECTIONS},
    }


def _step_to_json(step: Step | Repeat) -> JsonObject:
    if isinstance(step, Step):
        return {"name": step.name, "id": step.step_id, **step.config.model_dump(mode="json")}
    return {
        "name": REPEAT,
        "id": step.step_id,
        "times": step.times,
        "schedule": step.schedule,
        "score_drop": step.score_drop,
        "passes": [_step_to_json(inner) for inner in step.steps],
    }
