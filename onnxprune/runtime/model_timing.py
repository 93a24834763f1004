"""Timing whole models on this machine, with what was found kept on disk.

A file of timings stands for a model's structure (`structure`) and for how precisely it was timed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import onnx_ir as ir

from onnxprune.contracts import Batch, JsonValue
from onnxprune.runtime.latency import PairTiming, timed_pair
from onnxprune.runtime.op_profile import OpProfile
from onnxprune.runtime.profile import profile_ops
from onnxprune.runtime.sessions import OrtRunner, ort_runner_from_model
from onnxprune.runtime.structure import structure_digest
from onnxprune.runtime.timing_store import machine_key, read_timings, write_timings

__all__ = ["ModelTimer", "NodeMs"]

_SCHEMA = 2
# One pass over one model takes about so long, and a few runs in any case.
_PASS_S = 0.4
_MIN_RUNS, _MAX_RUNS = 5, 40
_PASSES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeMs:
    """Milliseconds of one node of the optimized graph. `model_node` as in `NodeTime`: "" where it is unknown."""

    name: str
    op_type: str
    model_node: str
    time_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTimer:
    """Times models as an application would run them: `threads`, layout and libraries as it sets them.

    `folder` is where timings are kept; None: nowhere.
    """

    threads: int
    folder: Path | None
    blocked_layout: bool = True
    custom_op_libraries: tuple[Path, ...] = ()

    def runner(self, model: ir.Model) -> OrtRunner:
        """`model` as it is timed."""
        return ort_runner_from_model(
            model,
            threads=self.threads,
            custom_op_libraries=self.custom_op_libraries,
            blocked_layout=self.blocked_layout,
        )

    def pair(
        self, before: ir.Model, after: ir.Model, feeds: Batch, *, round_seconds: float, max_rounds: int
    ) -> PairTiming:
        """`before` and `after` timed in turn.

        Raises:
            OnnxPruneError: One of them does not load or run.
        """
        # A quick look must not answer where a thorough one is asked for.
        precision = [repr(float(round_seconds)), str(max_rounds)]
        path = self._path("pair", structure_digest(before, feeds), structure_digest(after, feeds), *precision)
        known = _pair_from(read_timings(path)) if path is not None else None
        if known is not None:
            return known
        timing = timed_pair(
            self.runner(before), self.runner(after), feeds, round_seconds=round_seconds, max_rounds=max_rounds
        )
        if path is not None:
            write_timings(path, asdict(timing))
        return timing

    def node_times(
        self, models: Mapping[str, ir.Model], feeds: Batch, *, run_s: float
    ) -> dict[str, tuple[NodeMs, ...]]:
        """The time of each node of `models`, which are profiled in turn; of the passes the quickest counts.

        Args:
            models: By any name.
            feeds: What all of them take.
            run_s: About how long one run takes.

        Raises:
            OnnxPruneError: A model does not load or run.
        """
        digests = [structure_digest(model, feeds, with_names=True) for model in models.values()]
        path = self._path("nodes", *digests)
        known = _node_times_from(read_timings(path)) if path is not None else None
        if known is not None and set(known) == set(models):
            return known
        passes = [{key: self._profile(model, feeds, run_s) for key, model in models.items()} for _ in range(_PASSES)]
        times = {key: _quickest([profiles[key] for profiles in passes]) for key in models}
        if path is not None:
            write_timings(path, {key: [asdict(node) for node in nodes] for key, nodes in times.items()})
        return times

    def _profile(self, model: ir.Model, feeds: Batch, run_s: float) -> OpProfile:
        return profile_ops(
            model,
            feeds,
            runs=min(_MAX_RUNS, max(_MIN_RUNS, round(_PASS_S / run_s))),
            warmup=2,
            threads=self.threads,
            custom_op_libraries=self.custom_op_libraries,
            blocked_layout=self.blocked_layout,
        )

    def _path(self, kind: str, *facts: str) -> Path | None:
        if self.folder is None:
            return None
        libraries = [(path.name, path.stat().st_size) for path in self.custom_op_libraries if path.is_file()]
        key = hashlib.sha256(json.dumps([facts, self.blocked_layout, libraries]).encode()).hexdigest()[:32]
        return self.folder / machine_key(self.threads, schema=_SCHEMA) / f"{kind}-{key}.json"


def _quickest(profiles: list[OpProfile]) -> tuple[NodeMs, ...]:
    best: dict[str, NodeMs] = {}
    for node in (node for profile in profiles for node in profile.nodes):
        found = best.get(node.name)
        if found is None:
            best[node.name] = NodeMs(
                name=node.name, op_type=node.op_type, model_node=node.model_node, time_ms=node.undisturbed_ms
            )
        elif node.undisturbed_ms < found.time_ms:
            best[node.name] = replace(found, time_ms=node.undisturbed_ms)
    return tuple(best.values())


def _pair_from(content: JsonValue) -> PairTiming | None:
    """What `pair` wrote; None where it is something else."""
    if not isinstance(content, dict):
        return None
    try:
        before_ms, after_ms, ratio, error = (float(content[key]) for key in ("before_ms", "after_ms", "ratio", "error"))
    except (KeyError, TypeError, ValueError):
        return None
    if not all(math.isfinite(number) and number >= 0 for number in (before_ms, after_ms, ratio, error)):
        return None
    return PairTiming(before_ms=before_ms, after_ms=after_ms, ratio=ratio, error=error)


def _node_times_from(content: JsonValue) -> dict[str, tuple[NodeMs, ...]] | None:
    """What `node_times` wrote; None where it is something else."""
    if not isinstance(content, dict):
        return None
    try:
        return {
            str(key): tuple(
                NodeMs(
                    name=str(node["name"]),
                    op_type=str(node["op_type"]),
                    model_node=str(node["model_node"]),
                    time_ms=float(node["time_ms"]),
                )
                for node in nodes
            )
            for key, nodes in content.items()
        }
    except (KeyError, TypeError, ValueError):
        return None
