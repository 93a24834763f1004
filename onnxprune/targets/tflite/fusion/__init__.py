"""Fusion: neighbours become one operator where the result is equal.

A rule looks at one operator and its neighbours, changes the graph through an `Editor`, and says whether it did. All
rules are tried on all operators, in order, until none applies: what one joins may be joined further.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from onnxprune.targets.tflite.edit import Editor
from onnxprune.targets.tflite.fusion import activations, identities, padding, scales
from onnxprune.targets.tflite.fusion.rule import Rule
from onnxprune.targets.tflite.graph import Graph

__all__ = ["fuse", "merge_reshapes"]

_Table: TypeAlias = Mapping[str, Sequence[Rule]]

# Each list in this order, by the kind of the operator that is looked at.
_TABLES: Sequence[_Table] = (
    # What computes nothing hides neighbours from each other.
    identities.RULES,
    # Scales first: behind an activation they can't move into the convolution in front of it any more.
    scales.RULES,
    activations.RULES,
    # Whether zeros may be padded depends on activations.
    padding.RULES,
)


def fuse(graph: Graph) -> Graph:
    """The same computation in fewer operators. Tensors that are left keep their names."""
    return _applied(graph, _TABLES)


def merge_reshapes(graph: Graph) -> Graph:
    """Chains of RESHAPE become one or none: they meet where a later stage takes away what stood between them."""
    return _applied(graph, (identities.RESHAPE_RULES,))


def _applied(graph: Graph, tables: Sequence[_Table]) -> Graph:
    editor = Editor(graph)
    rules = {
        kind: [rule for table in tables for rule in table.get(kind, ())] for kind in {k for t in tables for k in t}
    }
    is_changed = True
    while is_changed:
        is_changed = False
        for operator in editor.operators:
            for rule in rules.get(operator.kind, ()):
                if editor.producer(operator.outputs[0]) is not operator:
                    break
                is_changed |= rule(editor, operator)
    return editor.graph()
