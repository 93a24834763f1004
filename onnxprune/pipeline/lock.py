"""`plan.lock.json`: every decision of a run, so that another run repeats it exactly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from onnxprune.contracts import JsonObject, JsonValue, Placement
from onnxprune.errors import OutputError, UsageError

__all__ = ["LOCK_NAME", "PlanLock", "PlannedPass", "read_lock", "render_lock"]

LOCK_NAME = "plan.lock.json"
LOCK_SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedPass:
    """One pass's decisions, as `plan_to_json` wrote them."""

    step_id: str
    name: str
    plan: JsonValue


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanLock:
    """All decisions of one run. `recipe` is complete: `--plan` needs no recipe beside it."""

    schema: int
    source_hash: str
    recipe: JsonObject
    passes: tuple[PlannedPass, ...]
    placements: Mapping[str, Placement] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def plan_of(self, step_id: str) -> JsonValue | None:
        """The decisions of one pass, or None where the lock has none."""
        return next((entry.plan for entry in self.passes if entry.step_id == step_id), None)


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
