"""Channels through attention operators: ONNX's own, and those that ONNX Runtime fuses.

Symbols: B batch, L and T positions of queries and keys, H heads, G key and value heads, d width of a head's queries and
keys, e width of its values.
    Q (B, L, H*d)   K (B, T, G*d)   V (B, T, G*e)   ->   Y (B, L, H*e)      or, with rank 4, (B, H, L, d) and so on
The last axis of the packed form is a grid of heads and width. What can go:
    heads   of Q, K, V and Y together; with G < H a key head goes with its H/G query heads, or one of each group's does
    d       of Q and K together: it is summed over in Q K^T, so that a removed one counts as zero
    e       of V and Y together
The scale 1/sqrt(d) is that of the unpruned model: where it is a default, it is written down when d changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxprune.ops.channels.flow import CHANNELS, Flow
from onnxprune.ops.channels.labelling import Role
from onnxprune.ops.channels.labels import LabelArray
from onnxprune.ops.channels.removal import Removal

__all__: list[str] = []

_MS = "com.microsoft"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Heads:
    """One operand by heads and width; None: nothing on that side can go."""

    heads: LabelArray | None
    width: LabelArray | None
    num_heads: int
    head_width: int


def _split(flow: Flow, flat: LabelArray | None, num_heads: int, size: int) -> _Heads:
    """The sides of a packed axis of `size` labels; freezes what is not divided evenly."""
    if flat is None or num_heads < 1 or size % num_heads:
        flow.freeze(flat, f"is not divided evenly by the heads of {flow.where}")
        return _Heads(heads=None, width=None, num_heads=num_heads, head_width=max(size // max(num_heads, 1), 1))
    heads, width = flow.grid(flat, (num_heads, size // num_heads))
    return _Heads(heads=heads, width=width, num_heads=num_heads, head_width=size // num_heads)


def _together(flow: Flow, one: LabelArray | None, other: LabelArray | None, what: str) -> None:
    """Two axes that lose the same channels; where one can't, neither does."""
    if one is not None and other is not None:
        flow.join(one, other)
        return
    for labels in (one, other):
        flow.freeze(labels, f"{what} of {flow.where}, which stay elsewhere")


def _attend(flow: Flow, query: _Heads, key: _Heads, value: _Heads) -> LabelArray | None:
    """Tie what Q, K and V have in common; returns the labels of the query heads."""
    _together(flow, query.width, key.width, "is a width")
    _together(flow, key.heads, value.heads, "counts the heads")
    kv_heads = key.heads if value.heads is not None else None
    if query.num_heads == key.num_heads:
        _together(flow, query.heads, kv_heads, "counts the heads")
        produced = query.heads if kv_heads is not None else None
    else:
        produced = _grouped_heads(flow, query, key, kv_heads)
    for heads in (produced, kv_heads):
        if heads is not None:
            flow.prefer(heads)
    return produced


def _grouped_heads(flow: Flow, query: _Heads, key: _Heads, kv_heads: LabelArray | None) -> LabelArray | None:
    """Query head i reads key head i // (H/G)."""
    by_key = None
    if query.heads is not None and query.num_heads % key.num_heads == 0:
        by_key = flow.grid(query.heads, (key.num_heads, query.num_heads // key.num_heads))[0]
    else:
        flow.freeze(query.heads, f"counts query heads of {flow.where} that are not shared out evenly")
    _together(flow, by_key, kv_heads, "counts the heads")
    return query.heads


def _packed(flow: Flow, heads: LabelArray | None, num_heads: int, width: LabelArray | None, size: int) -> LabelArray:
    """Labels of a packed axis; a side where nothing can go is frozen."""
    sides = []
    for side, length in ((heads, num_heads), (width, size)):
        labels = side
        if labels is None:
            labels = flow.fresh(length)
            flow.freeze(labels, f"is a side of the heads of {flow.where} that stays")
        sides.append(labels)
    return flow.merged(sides)


def _produced(
    flow: Flow, query: _Heads, value: _Heads, heads: LabelArray | None, packed: LabelArray | None
) -> LabelArray:
    """Labels of Y's last axis; with as many value heads as query heads they are those of V."""
    if query.num_heads == value.num_heads and packed is not None:
        return packed
    return _packed(flow, heads, query.num_heads, value.width, value.head_width)


def _keep_scale(flow: Flow, query: _Heads) -> None:
    """Write down the default scale of the unpruned width when the width changes."""
    node, width = flow.node, query.width
    if width is None or node.attributes.get_float("scale", 0.0) != 0.0:
        return
    scale = 1.0 / math.sqrt(query.head_width)

    def shrink(removal: Removal) -> None:
        if removal.count(width) != len(width):
            node.attributes["scale"] = ir.AttrFloat32("scale", scale)

    flow.shrink(width, shrink)


def _attend_macs(
    flow: Flow, query: Sequence[LabelArray | None], value: Sequence[LabelArray | None], share: float
) -> None:
    """Q K^T is proportional to heads and d, the weighted sum of V to heads and e."""
    flow.macs_sum((share, query), (1.0 - share, value))


def _bind_mask(flow: Flow, position: int, heads: LabelArray | None) -> None:
    """A mask or bias of the scores, broadcast to (B, H, L, T): only its heads can go."""
    if not flow.has(position):
        return
    dims = flow.dims(position)
    if dims is None:
        flow.freeze(heads, f"meets a mask of unknown rank in {flow.where}")
        return
    flow.freeze_input(position, f"is an axis of the scores of {flow.where}", axes=[-1, -2, -4])
    if len(dims) < 3 or dims[-3] == 1:
        flow.labels(position)
    elif heads is not None:
        flow.bind(position, -3, heads, Role.PARAMETER)
    else:
        flow.freeze_input(position, f"masks heads of {flow.where}, which stay", axes=[-3])


def _freeze_all(flow: Flow, why: str) -> None:
    for position in range(flow.num_inputs):
        flow.freeze_input(position, f"{why} in {flow.where}")


def _size(flow: Flow, position: int, axis: int) -> int | None:
    dims = flow.dims(position)
    size = dims[axis] if dims is not None and -len(dims) <= axis < len(dims) else None
    return size if isinstance(size, int) else None


def _is_used(node: ir.Node, index: int) -> bool:
    if index >= len(node.outputs):
        return False
    value = node.outputs[index]
    return bool(value.uses()) or value.is_graph_output()


# --- ONNX's Attention -----------------------------------------------------------------------------------------


@CHANNELS.register("Attention", since_version=23)
def _attention(flow: Flow) -> None:
    """Q, K, V, mask, past key, past value -> Y, present key, present value, scores; rank 3 or 4."""
    ranks = {len(flow.dims(position) or ()) for position in range(3)}
    if ranks == {4}:
        _attention_by_heads(flow)
    elif ranks == {3}:
        _attention_packed(flow)
    else:
        _freeze_all(flow, "has operands of several ranks")


def _attention_by_heads(flow: Flow) -> None:
    numbers = [(_size(flow, position, 1), _size(flow, position, 3)) for position in range(3)]
    operands = []
    for position, (num_heads, width) in enumerate(numbers):
        flow.freeze_input(position, f"is a batch or position of {flow.where}", axes=[0, 2])
        if num_heads is None or width is None:
            _freeze_all(flow, "has heads of unknown number or width")
            return
        heads, on_width = flow.own(position, 1, Role.PARAMETER), flow.own(position, 3, Role.PARAMETER)
        operands.append(_Heads(heads=heads, width=on_width, num_heads=num_heads, head_width=width))
    query, key, value = operands
    heads = _attend(flow, query, key, value)
    for position in (0, 1):
        flow.contract(position, 3)
    _bind_cache(flow, key, value)
    _bind_mask(flow, 3, heads)
    _keep_scale(flow, query)
    share = query.head_width / (query.head_width + value.head_width)
    _attend_macs(flow, (heads, query.width), (heads, value.width), share)
    flow.give([None, heads, None, value.width])
    _give_cache(flow, key, value)
    flow.give([None, heads, None, None], 3)


def _attention_packed(flow: Flow) -> None:
    attributes = flow.node.attributes
    counts = [attributes.get_int("q_num_heads", 0), *([attributes.get_int("kv_num_heads", 0)] * 2)]
    sizes = [_size(flow, position, 2) for position in range(3)]
    if None in sizes or 0 in counts:
        _freeze_all(flow, "has heads of unknown number or width")
        return
    query, key, value = _operands(flow, counts, [size or 0 for size in sizes])
    heads = _attend(flow, query, key, value)
    for position in (0, 1):
        flow.contract(position, 2)
    if heads is not None:
        flow.count_in_attribute("q_num_heads", heads)
    if key.heads is not None:
        flow.count_in_attribute("kv_num_heads", key.heads)
    _bind_cache(flow, key, value)
    _bind_mask(flow, 3, heads)
    _keep_scale(flow, query)
    produced = _produced(flow, query, value, heads, flow.axis_labels(2, 2))
    share = query.head_width / (query.head_width + value.head_width)
    _attend_macs(flow, (flow.axis_labels(0, 2),), (produced,), share)
    flow.give([None, None, produced])
    _give_cache(flow, key, value)
    flow.give([None, heads, None, None], 3)


def _operands(flow: Flow, counts: Sequence[int], sizes: Sequence[int]) -> list[_Heads]:
    """Q, K and V of rank 3."""
    operands = []
    for position, (count, size) in enumerate(zip(counts, sizes, strict=True)):
        flow.freeze_input(position, f"is a batch or position of {flow.where}", axes=[0, 1])
        operands.append(_split(flow, flow.own(position, 2, Role.PARAMETER), count, size))
    return operands


def _bind_cache(flow: Flow, key: _Heads, value: _Heads) -> None:
    """Past keys and values have the heads and widths of the new ones, (B, G, T, width)."""
    for position, operand in ((4, key), (5, value)):
        if flow.has(position):
            for axis, labels in ((1, operand.heads), (3, operand.width)):
                if labels is not None:
                    flow.bind(position, axis, labels)
                else:
                    flow.freeze_input(position, f"is put before fixed keys by {flow.where}", axes=[axis])
            flow.freeze_input(position, f"is a position of {flow.where}", axes=[0, 2])


def _give_cache(flow: Flow, key: _Heads, value: _Heads) -> None:
    flow.give([None, key.heads, None, key.width], 1)
    flow.give([None, value.heads, None, value.width], 2)


# --- ONNX Runtime's attention ---------------------------------------------------------------------------------


@CHANNELS.register("Attention", domain=_MS)
def _fused_attention(flow: Flow) -> None:
    """X (B, L, D), W (D, H*d + H*d + H*e), bias, mask, past, bias of the scores; Q, K and V are made inside.

    What Q K^T sums over never leaves the node: the oracle zeroes columns of W and of its bias instead.
    """
    attributes, columns = flow.node.attributes, _size(flow, 1, 1)
    num_heads = attributes.get_int("num_heads", 0)
    flow.freeze_input(0, f"is a batch or position of {flow.where}", axes=[0, 1])
    incoming = flow.axis_labels(0, 2)
    if columns is None or not flow.is_constant(1) or not num_heads:
        _freeze_all(flow, "meets weights that are computed")
        return
    if incoming is not None:
        flow.bind(1, 0, incoming, Role.INPUT)
        flow.contract(0, 2)
    given = attributes.get_ints("qkv_hidden_sizes")
    sizes = list(given) if given else [columns // 3] * 3
    packed = flow.own(1, 1)
    if packed is None or sum(sizes) != columns:
        _freeze_all(flow, "has parts of unknown size")
        return
    if flow.has(2):
        flow.bind(2, 0, packed, Role.PARAMETER)
        flow.contract(2, 0)
    flow.contract(1, 1)
    parts = np.split(packed, np.cumsum(sizes)[:-1])
    query, key, value = (_split(flow, part, num_heads, size) for part, size in zip(parts, sizes, strict=True))
    heads = _attend(flow, query, key, value)
    if flow.has(4) or _is_used(flow.node, 1) or attributes.get_int("do_rotary", 0) != 0:
        flow.freeze(packed, f"is kept from step to step, or turned by its place, in {flow.where}")
    if heads is not None:
        flow.count_in_attribute("num_heads", heads)
    _count_parts(flow, packed, parts)
    _keep_scale(flow, query)
    _bind_mask(flow, 5, heads)
    _fused_macs(flow, incoming, packed, parts)
    flow.give([None, None, parts[2]])


def _count_parts(flow: Flow, packed: LabelArray, parts: Sequence[LabelArray]) -> None:
    """`qkv_hidden_sizes` follows, and is written where three equal parts were its default."""
    node = flow.node

    def shrink(removal: Removal) -> None:
        counts = [removal.count(part) for part in parts]
        node.attributes["qkv_hidden_sizes"] = ir.AttrInt64s("qkv_hidden_sizes", counts)

    flow.shrink(packed, shrink)


def _fused_macs(flow: Flow, incoming: LabelArray | None, packed: LabelArray, parts: Sequence[LabelArray]) -> None:
    """For each of L positions: D * columns for the projection, L * H*d and L * H*e for the two products."""
    length, features = _size(flow, 0, 1), _size(flow, 0, 2)
    if length is None or features is None:
        flow.macs_follow(incoming, packed)
        return
    project, scores, weigh = features * len(packed), length * len(parts[0]), length * len(parts[2])
    whole = project + scores + weigh
    flow.macs_sum((project / whole, (incoming, packed)), (scores / whole, (parts[0],)), (weigh / whole, (parts[2],)))


@CHANNELS.register("MultiHeadAttention", domain=_MS)
def _multi_head_attention(flow: Flow) -> None:
    """Q, K, V, their bias in one vector, padding mask, bias of the scores, past; of rank 3, one beside the other."""
    num_heads = flow.node.attributes.get_int("num_heads", 0)
    sizes = [_size(flow, position, 2) for position in range(3)]
    if any(len(flow.dims(position) or ()) != 3 for position in range(3)) or None in sizes or not num_heads:
        _freeze_all(flow, "is packed in a way that has no rule")
        return
    query, key, value = _operands(flow, [num_heads] * 3, [size or 0 for size in sizes])
    heads = _attend(flow, query, key, value)
    for position in (0, 1):
        flow.contract(position, 2)
    flat = [flow.axis_labels(position, 2) for position in range(3)]
    if any(flow.has(position) for position in range(6, flow.num_inputs)) or _is_used(flow.node, 1):
        for labels in flat:
            flow.freeze(labels, f"is kept from step to step by {flow.where}")
    if flow.has(3):
        parts = [
            _fixed(flow, size or 0) if labels is None else labels for labels, size in zip(flat, sizes, strict=True)
        ]
        flow.bind(3, 0, np.concatenate(parts), Role.PARAMETER)
        flow.contract(3, 0)
    if heads is not None:
        flow.count_in_attribute("num_heads", heads)
    _keep_scale(flow, query)
    _bind_mask(flow, 5, heads)
    produced = _produced(flow, query, value, heads, flat[2])
    share = query.head_width / (query.head_width + value.head_width)
    _attend_macs(flow, (flat[0],), (produced,), share)
    flow.give([None, None, produced])


def _fixed(flow: Flow, size: int) -> LabelArray:
    labels = flow.fresh(size)
    flow.freeze(labels, f"meets fixed channels in {flow.where}")
    return labels


@CHANNELS.register("GroupQueryAttention", domain=_MS)
def _group_query_attention(flow: Flow) -> None:
    """Q, K, V (or all three in Q), past key, past value, lengths, rotation tables, bias of the scores.

    Kernels want a head's width to be a multiple of 8, and turn it by its place: heads go as a whole.
    """
    attributes = flow.node.attributes
    num_heads, kv_heads = attributes.get_int("num_heads", 0), attributes.get_int("kv_num_heads", 0)
    size = _size(flow, 0, 2)
    parts = _query_key_value(flow, num_heads, kv_heads, size)
    if parts is None:
        _freeze_all(flow, "has heads of unknown number or width")
        return
    query, key, value = (
        _split(flow, part, count, count * _head_width(size, num_heads, kv_heads, is_packed=not flow.has(1)))
        for part, count in zip(parts, (num_heads, kv_heads, kv_heads), strict=True)
    )
    for operand in (query, key, value):
        flow.freeze(operand.width, f"is a width of the heads of {flow.where}, which stays")
    heads = _attend(flow, query, key, value)
    if heads is not None:
        flow.count_in_attribute("num_heads", heads)
    if key.heads is not None:
        flow.count_in_attribute("kv_num_heads", key.heads)
    for position in (3, 4):
        if flow.has(position) and key.heads is not None:
            flow.bind(position, 1, key.heads)
    _bind_mask(flow, 10, heads)
    if flow.has(11) and heads is not None:
        flow.bind(11, 0, heads, Role.PARAMETER)
    produced = parts[0]
    flow.macs_follow(produced)
    flow.give([None, None, produced])
    for index in (1, 2):
        flow.give([None, key.heads, None, None], index)


def _query_key_value(
    flow: Flow, num_heads: int, kv_heads: int, size: int | None
) -> tuple[LabelArray | None, LabelArray | None, LabelArray | None] | None:
    """Labels of the packed heads of Q, K and V; None where sizes are not known."""
    if not num_heads or not kv_heads or size is None:
        return None
    positions = range(3) if flow.has(1) else range(1)
    for position in positions:
        flow.freeze_input(position, f"is a batch or position of {flow.where}", axes=[0, 1])
    if flow.has(1):
        query, key, value = (flow.own(position, 2, Role.PARAMETER) for position in range(3))
        return query, key, value
    packed = flow.own(0, 2, Role.PARAMETER)
    if packed is None:
        return None, None, None
    width = _head_width(size, num_heads, kv_heads, is_packed=True)
    if size != width * (num_heads + 2 * kv_heads):
        return None
    first, second, third = np.split(packed, [num_heads * width, (num_heads + kv_heads) * width])
    return first, second, third


def _head_width(size: int | None, num_heads: int, kv_heads: int, *, is_packed: bool) -> int:
    return (size or 0) // (num_heads + 2 * kv_heads if is_packed else num_heads)


# --- turning by position --------------------------------------------------------------------------------------


@CHANNELS.register("RotaryEmbedding", since_version=23)
def _rotary(flow: Flow) -> None:
    """X, cos, sin, positions."""
    _turn(flow, cosine=1)


@CHANNELS.register("RotaryEmbedding", domain=_MS)
def _fused_rotary(flow: Flow) -> None:
    """X, positions, cos, sin."""
    _turn(flow, cosine=2)


def _turn(flow: Flow, *, cosine: int) -> None:
    """X (B, H, L, d), or (B, L, H*d): pairs of the width are turned, heads go as a whole."""
    labels, attributes = flow.labels(0), flow.node.attributes
    why = f"is a width that {flow.where} turns"
    for position in range(1, flow.num_inputs):
        flow.freeze_input(position, why)
    if len(labels) == 4:
        flow.freeze_input(0, why, axes=[0, 2, 3])
        flow.give([None, labels[1], None, labels[3]])
        return
    flat = labels[2] if len(labels) == 3 else None
    flow.freeze_input(0, f"is a batch or position of {flow.where}", axes=[0, 1])
    if flat is None:
        return
    num_heads, half = attributes.get_int("num_heads", 0), _size(flow, cosine, -1)
    if not num_heads and half is not None and len(flat) % (2 * half) == 0:
        num_heads = len(flat) // (2 * half)  # the whole head is turned where no number is given
    if not num_heads:
        flow.freeze(flat, why)
        return
    turned = _split(flow, flat, num_heads, len(flat))
    flow.freeze(turned.width, why)
    if turned.heads is not None and "num_heads" in attributes:
        flow.count_in_attribute("num_heads", turned.heads)
    flow.give([None, None, flat])
