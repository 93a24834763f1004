"""`plan.lock.json`: every decision of a run, so that another run repeats it exactly."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from onnxprune.contracts import JsonObject, JsonValue, Placement
from onnxprune.errors import OutputError, UsageError, quoted_list
from onnxprune.recipe import REPEAT, Recipe, portable_settings, recipe_to_json

__all__ = [
    "LOCK_NAME",
    "LOCK_SCHEMA",
    "PlanLock",
    "PlannedPass",
    "check_lock",
    "decisive_tables",
    "placements_for",
    "read_lock",
    "render_lock",
]

LOCK_NAME = "plan.lock.json"
LOCK_SCHEMA = 1
DECIDE_ANEW = "Run without --plan to decide anew."


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedPass:
    """One pass's decisions, as `plan_to_json` wrote them."""

    step_id: str
    name: str
    plan: JsonValue


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanLock:
    """All decisions of one run. `recipe` says all that shapes the artifact: `--plan` needs no recipe beside it."""

    schema: int
    source_hash: str
    recipe: JsonObject
    passes: tuple[PlannedPass, ...]
    placements: Mapping[str, Placement] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def plan_of(self, step_id: str) -> JsonValue | None:
        """The decisions of one pass, or None where the lock has none."""
        return next((entry.plan for entry in self.passes if entry.step_id == step_id), None)


def decisive_tables(recipe: Recipe) -> JsonObject:
    """The parts of a recipe that shape the artifact; data, budgets and measuring belong to the run, not to the plan."""
    tables = recipe_to_json(recipe)
    tables["passes"] = [_portable(entry) for entry in tables["passes"]]
    return {key: tables[key] for key in ("schema", "seed", "passes", "targets", "preprocess")}


def _portable(entry: JsonObject) -> JsonObject:
    if entry["name"] == REPEAT:
        return {**entry, "passes": [_portable(inner) for inner in entry["passes"]]}
    return portable_settings(entry["name"], entry)


def check_lock(lock: PlanLock, *, source_hash: str, recipe: Recipe) -> None:
    """Refuse to combine a lock with what it was not made for.

    Raises:
        UsageError: It was made from another model, for other passes, or for other settings of them.
    """
    if lock.source_hash != source_hash:
        raise UsageError(
            f"The plan was made from another model (source hash {lock.source_hash[:12]}..., this one has "
            f"{source_hash[:12]}...).",
            DECIDE_ANEW,
        )
    tables = decisive_tables(recipe)
    before_entries, now_entries = list(_entries(lock.recipe["passes"])), list(_entries(tables["passes"]))
    planned, asked = ([entry["id"] for entry in entries] for entries in (before_entries, now_entries))
    if planned != asked:
        raise UsageError(
            f"The plan was made for the passes {quoted_list(planned) or 'none'}, and this run asks for "
            f"{quoted_list(asked) or 'none'}.",
            DECIDE_ANEW,
        )
    for before, now in zip(before_entries, now_entries, strict=True):
        changed = [key for key in now if before.get(key) != now[key]]
        if changed:
            raise UsageError(
                f"The plan was made with another '{changed[0]}' of pass '{now['id']}': {before.get(changed[0])!r}, and "
                f"this run asks for {now[changed[0]]!r}.",
                DECIDE_ANEW,
            )


def _entries(passes: list[JsonObject]) -> Iterator[JsonObject]:
    """Every pass and block by itself; those inside a block follow it, with an id that says where they are."""
    for entry in passes:
        if entry["name"] != REPEAT:
            yield entry
            continue
        yield {key: value for key, value in entry.items() if key != "passes"}
        for inner in entry["passes"]:
            yield {**inner, "id": f"{entry['id']}/{inner['id']}"}


def placements_for(lock: PlanLock, recipe: Recipe) -> Mapping[str, Placement]:
    """The lock's placements of those targets whose settings are still the same; the others decide anew."""
    targets = decisive_tables(recipe)["targets"]
    return {
        name: placement
        for name, placement in lock.placements.items()
        if targets.get(name) == lock.recipe["targets"].get(name)
    }


def render_lock(lock: PlanLock) -> str:
    """The lock as JSON text; the same decisions give the same text."""
    return json.dumps(json.loads(to_json(lock, inf_nan_mode="strings")), indent=1, sort_keys=True) + "\n"


def read_lock(path: Path) -> PlanLock:
    """The lock at `path`.

    Raises:
        UsageError: It is missing, is not JSON, or is not a lock of a schema that this version reads.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"Plan '{path}' does not exist.") from None
    except OSError as error:
        raise OutputError(f"Plan '{path}' can't be read: {error.strerror}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"Plan '{path}' is not valid JSON: {error}.") from error
    if not isinstance(data, dict) or data.get("schema") != LOCK_SCHEMA:
        raise UsageError(
            f"Plan '{path}' is not a plan of schema {LOCK_SCHEMA}.", f"Give the {LOCK_NAME} that a run wrote."
        )
    try:
        return TypeAdapter(PlanLock).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"Plan '{path}' is damaged at '{place}': {first['msg']}.") from None
