"""Dense and sparse files side by side, on another processor where need be."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onnxprune.targets.tflite.graph import Graph
from onnxprune.targets.tflite.serialize import serialize
from tests.sparse_nets import model_of

__all__ = ["Comparison", "Outcome"]

_LIMIT_S = 280


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the two files gave. `error` is relative to the largest number of an output."""

    error: float
    dense_s: float
    sparse_s: float

    @property
    def speed_up(self) -> float:
        """Dense time over sparse time."""
        return self.dense_s / self.sparse_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Runs pairs of graphs, all of them in one process."""

    processor: tuple[str, ...]
    script: Path
    folder: Path

    def one(self, dense: Graph, sparse: Graph, *, rounds: int = 10, batch: int = 1) -> Outcome:
        """Of one pair."""
        return self.all({"": (dense, sparse)}, rounds=rounds, batch=batch)[""]

    def all(self, pairs: Mapping[str, tuple[Graph, Graph]], *, rounds: int = 1, batch: int = 1) -> dict[str, Outcome]:
        """Of every pair."""
        files = []
        for number, pair in enumerate(pairs.values()):
            for graph, kind in zip(pair, ("dense", "sparse"), strict=True):
                path = self.folder / f"{number}-{kind}.tflite"
                path.write_bytes(serialize(model_of(graph)))
                files.append(str(path))
        done = subprocess.run(
            [*self.processor, sys.executable, str(self.script), str(rounds), str(batch), *files],
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            check=False,
        )
        lines = done.stdout.splitlines()
        assert done.returncode == 0, f"'{[*pairs][len(lines)]}' ended the process: {done.stderr}"
        return {name: Outcome(**json.loads(line)) for name, line in zip(pairs, lines, strict=True)}
