"""`OpTable`: facts about operators, looked up by domain, name and opset version.

A row stands for an operator *from* an opset version on; the row with the highest version that is not above the
model's is the one that counts, exactly as ONNX itself resolves `since_version`. What a missing row means is up to
the table (freeze, stay float, error ...): `get` returns None, and never a default that could be taken for knowledge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import onnx_ir as ir

__all__ = ["OpKey", "OpTable", "opset_version_of"]

RowT = TypeVar("RowT")


@dataclass(frozen=True, slots=True, order=True)
class OpKey:
    """`domain` is "" for the ONNX domain ("ai.onnx" is spelled "")."""

    domain: str
    op_type: str
    since_version: int


def opset_version_of(node: ir.Node) -> int:
    """The opset version under which `node` is to be read (1 for a domain the model does not import)."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    if node.version is not None:
        return node.version
    graph = node.graph
    if graph is None:
        return 1
    # Functions and graphs alike know the imports of the model they belong to.
    return graph.opset_imports.get(domain, 1)


class OpTable(Generic[RowT]):
    """A table of operator facts with rows of one type."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._rows: dict[tuple[str, str], dict[int, RowT]] = {}

    def add(self, row: RowT, *op_types: str, domain: str = "", since_version: int = 1) -> None:
        """Give all `op_types` of `domain` the same row from `since_version` on.

        Raises:
            ValueError: An operator has a row for that version already.
        """
        for op_type in op_types:
            versions = self._rows.setdefault((domain, op_type), {})
            if since_version in versions:
                raise ValueError(f"Table '{self.name}' has a row for {domain}::{op_type}-{since_version} already.")
            versions[since_version] = row

    def register(self, *op_types: str, domain: str = "", since_version: int = 1) -> Callable[[RowT], RowT]:
        """Decorator form of `add`, for tables whose rows are functions."""

        def decorate(row: RowT) -> RowT:
            self.add(row, *op_types, domain=domain, since_version=since_version)
            return row

        return decorate

    def get(self, node: ir.Node) -> RowT | None:
        """The row for `node`, or None: unknown."""
        return self.find("" if node.domain == "ai.onnx" else node.domain, node.op_type, opset_version_of(node))

    def find(self, domain: str, op_type: str, version: int) -> RowT | None:
        """The row of the highest `since_version` that is not above `version`, or None: unknown."""
        versions = self._rows.get((domain, op_type))
        if not versions:
            return None
        fitting = [since for since in versions if since <= version]
        return versions[max(fitting)] if fitting else None

    def keys(self) -> Iterator[OpKey]:
        """All rows' keys in sorted order."""
        for (domain, op_type), versions in sorted(self._rows.items()):
            for since_version in sorted(versions):
                yield OpKey(domain, op_type, since_version)

    def __len__(self) -> int:
        return sum(len(versions) for versions in self._rows.values())
