"""What can be said only when every node of a model has been seen.

- literals: a number that several nodes read is rewritten for all of them or not at all
- tied weights: copies of one weight lose the same indices, so that one copy is enough in the file
- tentative axes: labels that nothing labelled was joined to count for nothing
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from onnxprune.graph.metadata import SHARED_FROM_KEY
from onnxprune.graph.names import printable
from onnxprune.graph.weights import constant_array
from onnxprune.ops.channels.elements import Literal
from onnxprune.ops.channels.labelling import Labelling, LiteralUse, WeightUse

__all__ = ["drop_tentative_axes", "settle_literals", "tie_copies"]

_Place: TypeAlias = tuple[ir.Value, int]
"""An initializer, and the row-major index of a number in it."""

_NO_CHANNELS = "belongs to no channels"


# --- literals -------------------------------------------------------------------------------------------------


def settle_literals(labelling: Labelling) -> None:
    """Let all readers of a number agree on how it changes; where they can't, freeze what it counts.

    Only numbers that reach their readers through other nodes: one that a node reads itself is copied for it.
    """
    if not labelling.literals:
        return
    wanted: dict[_Place, list[LiteralUse]] = defaultdict(list)
    for use in labelling.literals:
        wanted[use.literal.source, use.literal.index].append(use)
    holders = _holders(labelling, wanted)
    for place, uses in wanted.items():
        own = {(use.node, use.position) for use in uses}
        readers = {(use.node, use.idx) for value in holders[place] for use in value.uses()}
        others = sorted({_named(node) for node, position in readers - own if not _moves(labelling, node)})
        is_output = any(value.is_graph_output() for value in holders[place])
        if others or is_output or not _agree(uses):
            reader = ", ".join(others[:5]) or ("an output" if is_output else "nodes that count other channels there")
            reason = f"its number stands in '{printable(place[0].name or '')}', which is also read by {reader}"
            for use in uses:
                labelling.space.freeze(use.labels, reason)
            continue
        for use in uses[1:]:
            labelling.space.join(uses[0].labels, use.labels)


def _agree(uses: Sequence[LiteralUse]) -> bool:
    """True when all uses count the channels of axes that can be one."""
    return len(uses) == 1 or (all(use.is_count for use in uses) and len({len(use.labels) for use in uses}) == 1)


def _holders(labelling: Labelling, places: Iterable[_Place]) -> Mapping[_Place, list[ir.Value]]:
    """The values that hold the number at each place, its initializer included."""
    holders: dict[_Place, list[ir.Value]] = {place: [place[0]] for place in places}
    for value, elements in labelling.elements.items():
        for element in elements:
            if isinstance(element, Literal) and (element.source, element.index) in holders:
                holders[element.source, element.index].append(value)
    return holders


def _moves(labelling: Labelling, node: ir.Node) -> bool:
    """True when the numbers that go into `node` come out of it again."""
    return any(output in labelling.elements for output in node.outputs)


def _named(node: ir.Node) -> str:
    return f"'{printable(node.name or '')}' ({node.op_type})"


# --- tied weights ---------------------------------------------------------------------------------------------


def tie_copies(model: ir.Model, labelling: Labelling) -> None:
    """Join the labels of copies of one weight on every axis that all of them have labels on.

    Biases and constants of a single value are left alone: exporters merge those that are equal by accident.
    """
    copies: dict[str, list[ir.Value]] = defaultdict(list)
    for value in model.graph.initializers.values():
        original = value.metadata_props.get(SHARED_FROM_KEY)
        if original is not None and value in labelling.weights:
            copies[original].append(value)
    for values in copies.values():
        if len(values) > 1:
            for equal in _equal_contents(values):
                _tie(labelling, equal)


def _equal_contents(values: Sequence[ir.Value]) -> list[list[ir.Value]]:
    """The matrices among `values`, those of one content together; a pass may have changed some of the copies."""
    groups: dict[tuple[object, ...], list[ir.Value]] = defaultdict(list)
    digests: dict[int, bytes] = {}
    for value in values:
        array = constant_array(value)
        if array is None or array.ndim < 2 or array.size == 0 or (array == array.reshape(-1)[0]).all():
            continue
        # Canonicalization makes copies that share one tensor.
        tensor = id(value.const_value)
        if tensor not in digests:
            digests[tensor] = hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).digest()
        groups[array.shape, str(array.dtype), digests[tensor]].append(value)
    return [equal for equal in groups.values() if len(equal) > 1]


def _tie(labelling: Labelling, values: Sequence[ir.Value]) -> None:
    axes = set.intersection(*(set(labelling.weights[value]) for value in values))
    for axis in sorted(axes):
        first = labelling.weights[values[0]][axis]
        for value in values[1:]:
            labelling.space.join(first, labelling.weights[value][axis])


# --- tentative axes -------------------------------------------------------------------------------------------


def drop_tentative_axes(labelling: Labelling) -> None:
    """Freeze tentative labels that stand for themselves only, and take their weights out of the labelling."""
    if not labelling.tentative:
        return
    space = labelling.space
    is_tentative = np.zeros(len(space), dtype=np.bool_)
    for axis in labelling.tentative:
        is_tentative[axis.labels] = True
    for labels in labelling.firm:
        is_tentative[labels] = False
    class_of = space.class_of()
    is_real = np.zeros(int(class_of.max()) + 1, dtype=np.bool_)
    is_real[class_of[~is_tentative]] = True
    for axis in labelling.tentative:
        alone = ~is_real[class_of[axis.labels]]
        space.freeze(axis.labels[alone], _NO_CHANNELS)
    for weight, axes in list(labelling.weights.items()):
        for number, labels in list(axes.items()):
            if len(labels) and is_tentative[labels].all() and not is_real[class_of[labels]].any():
                del axes[number]
                labelling.weight_uses[weight] = _without(labelling.weight_uses[weight], number)
        if not axes:
            del labelling.weights[weight], labelling.weight_uses[weight]


def _without(uses: Iterable[WeightUse], axis: int) -> list[WeightUse]:
    return [use for use in uses if use.axis != axis]
