"""Names of nodes and values: shown safely, and made unique."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

import onnx_ir as ir

__all__ = ["UniqueNames", "give_unique_names", "is_safe_name", "printable"]

_MAX_SHOWN_CHARS = 100


def is_safe_name(name: str) -> bool:
    """True when a terminal, a log and a file show `name` as it is.

    Control characters (category Cc), invisible formatting such as right-to-left overrides (Cf), lone surrogates (Cs)
    and line or paragraph separators (Zl, Zp) are not safe.
    """
    return (name.isascii() and name.isprintable()) or all(unicodedata.category(c) not in _UNSAFE for c in name)


_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def printable(name: str) -> str:
    """`name` for a message: unsafe characters escaped, long names cut in the middle."""
    text = "".join(
        c.encode("unicode_escape").decode("ascii") if unicodedata.category(c) in _UNSAFE else c for c in name[:4096]
    )
    if len(text) <= _MAX_SHOWN_CHARS:
        return text
    half = _MAX_SHOWN_CHARS // 2
    return f"{text[:half]}...{text[-half:]}"


class UniqueNames:
    """Hands out names that nobody else in the model has. The same calls give the same names."""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = set(taken)
        self._next: dict[str, int] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._taken

    def claim(self, wanted: str) -> str:
        """`wanted` if it is free, else `wanted_1`, `wanted_2` ...; taken from now on."""
        name = wanted
        while name in self._taken:
            number = self._next.get(wanted, 0) + 1
            self._next[wanted] = number
            name = f"{wanted}_{number}"
        self._taken.add(name)
        return name

    @classmethod
    def of_values(cls, model: ir.Model) -> UniqueNames:
        """The names of all values in `model`, subgraphs included."""
        names = cls()
        for graph in model.graphs():
            for value in (*graph.inputs, *graph.initializers.values()):
                names.note(value.name)
            for node in graph:
                for value in node.outputs:
                    names.note(value.name)
        return names

    @classmethod
    def of_nodes(cls, model: ir.Model) -> UniqueNames:
        """The names of all nodes in `model`, subgraphs included."""
        names = cls()
        for node in model.graph.all_nodes():
            names.note(node.name)
        return names

    def note(self, name: str | None) -> None:
        """Take `name` out of what may be handed out."""
        if name:
            self._taken.add(name)


def give_unique_names(model: ir.Model) -> None:
    """Name every node and value so that no two in the model, subgraphs included, share a name.

    Names that are unique already stay, and inputs and outputs of the model go first, so they always keep theirs.
    Unnamed nodes are named after their operator and their place, so that the same graph gets the same names.
    """
    graphs = list(model.graphs())
    values = UniqueNames()
    seen: set[ir.Value] = set()
    for value in (*model.graph.inputs, *model.graph.outputs):
        _name_value(value, value.name or "value", values, seen)
    for graph in graphs:
        for value in (*graph.inputs, *graph.initializers.values()):
            _name_value(value, value.name or "value", values, seen)
        for node in graph:
            for index, value in enumerate(node.outputs):
                # An empty name is how a node says that it does not give an optional output.
                if value.name != "" or value.uses() or value.is_graph_output():
                    _name_value(value, value.name or f"{node.name or node.op_type}_output_{index}", values, seen)
    nodes = UniqueNames()
    unnamed: list[tuple[int, ir.Node]] = []
    for number, node in enumerate(node for graph in graphs for node in graph):
        if node.name:
            node.name = nodes.claim(node.name)
        else:
            unnamed.append((number, node))
    for number, node in unnamed:
        node.name = nodes.claim(f"{node.op_type}_{number}")


def _name_value(value: ir.Value, wanted: str, names: UniqueNames, seen: set[ir.Value]) -> None:
    if value in seen:
        return
    seen.add(value)
    name = names.claim(wanted)
    if name != value.name:
        value.name = name
