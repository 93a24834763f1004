"""Attention and RotaryEmbedding.

    Y = softmax(scale * Q K^T + bias) V        per head; bias is 0, or -inf where a key may not be seen

Symbols: B batch, H heads of queries, G of keys and values, S queries, T keys, D numbers of a head.
"""

from __future__ import annotations

import numpy as np

from onnxprune.targets.tflite.build import Builder, UnsupportedError
from onnxprune.targets.tflite.graph import Tensor
from onnxprune.targets.tflite.ops.contraction import product, scaled
from onnxprune.targets.tflite.ops.sizes import Size, product_of, reshaped_to, scalar, size_of, slice_of
from onnxprune.targets.tflite.ops.table import TFLITE, NodeView

__all__: list[str] = []

HIDDEN = np.float32(-np.inf)
"""Bias of a key that may not be seen."""

# Values of qk_matmul_output_mode.
_AFTER_SOFTCAP, _WITH_BIAS, _AFTER_SOFTMAX = 1, 2, 3


@TFLITE.register("Attention")
def attention(node: NodeView, build: Builder) -> list[Tensor | None]:
    """Two BATCH_MATMULs around a SOFTMAX.

    Several heads of queries that share one of keys stand below each other as rows of one product: keys and values are
    not repeated. Queries that may see no key give zeros, which costs a selection where masks are computed.
    """
    is_flat = len(node.input(0).shape) == 3
    query, key, value = (_with_heads(node, build, position) for position in range(3))
    past_key, past_value = node.optional(4), node.optional(5)
    if past_key is not None and past_value is not None:
        key, value = (_appended(build, past, new) for past, new in ((past_key, key), (past_value, value)))
    groups = key.shape[1]
    if query.shape[1] < 0 or groups < 1 or query.shape[1] % groups:
        raise UnsupportedError(f"{query.shape[1]} heads of queries do not divide among {groups} heads of keys")
    scale = node.number("scale") if "scale" in node.node.attributes else query.shape[3] ** -0.5
    scores_of = (size_of(query, 0), query.shape[1], size_of(query, 2), size_of(key, 2))
    scores = _per_group(build, scaled(build, query, scale), key, scores_of, is_transposed=True)
    shown = {0: scores}
    cap = node.number("softcap")
    if cap > 0:
        scores = scaled(build, build.op("TANH", [scaled(build, scores, 1 / cap)]), cap)
    shown[_AFTER_SOFTCAP] = scores
    bias = _bias(node, build, scores_of)
    if bias is not None:
        scores = build.binary("ADD", scores, bias)
    shown[_WITH_BIAS] = scores
    weights = build.op("SOFTMAX", [scores], beta=1.0)
    # The causal frontier alone leaves every query a key.
    is_masked = node.has(3) or node.has(6)
    sees_nothing = _sees_nothing(build, bias) if bias is not None and is_masked else None
    mode = node.integer("qk_matmul_output_mode")
    if mode == _AFTER_SOFTMAX and sees_nothing is not None:
        weights, sees_nothing = _zero_where(build, sees_nothing, weights), None
    shown[_AFTER_SOFTMAX] = weights
    y_of = (*scores_of[:3], size_of(value, 3))
    y = _per_group(build, weights, value, y_of, is_transposed=False)
    if sees_nothing is not None:
        y = _zero_where(build, sees_nothing, y)
    if is_flat:
        y = build.transposed(y, (0, 2, 1, 3))
        y = reshaped_to(build, y, [y_of[0], y_of[2], product_of([y_of[1], y_of[3]])])
    return [y, key, value, shown[mode]]


def _with_heads(node: NodeView, build: Builder, position: int) -> Tensor:
    """(B, S, H * D) as (B, H, S, D)."""
    x = node.input(position)
    if x.rank == 4:
        return x
    heads = node.integer("kv_num_heads" if position else "q_num_heads")
    if heads < 1 or x.shape[2] < 0 or x.shape[2] % heads:
        raise UnsupportedError(f"{x.shape[2]} numbers do not divide among {heads} heads")
    split = reshaped_to(build, x, [size_of(x, 0), size_of(x, 1), heads, x.shape[2] // heads])
    return build.transposed(split, (0, 2, 1, 3))


def _appended(build: Builder, past: Tensor, new: Tensor) -> Tensor:
    length = -1 if -1 in (past.shape[2], new.shape[2]) else past.shape[2] + new.shape[2]
    shape = (new.shape[0], new.shape[1], length, new.shape[3])
    return build.op("CONCATENATION", [past, new], shape=shape, type_=new.type, axis=2)


def _per_group(build: Builder, left: Tensor, right: Tensor, sizes: tuple[Size, ...], *, is_transposed: bool) -> Tensor:
    """The product (B, H, S, -) of `left` (B, H, S, -) and `right` (B, G, -, -)."""
    heads, groups = left.shape[1], right.shape[1]
    if heads == groups:
        return product(build, left, right, is_right_transposed=is_transposed)
    rows = product_of([heads // groups, sizes[2]])
    stacked = reshaped_to(build, left, [sizes[0], groups, rows, size_of(left, 3)])
    return reshaped_to(build, product(build, stacked, right, is_right_transposed=is_transposed), sizes)


def _bias(node: NodeView, build: Builder, sizes: tuple[Size, ...]) -> Tensor | None:
    """What is added to the scores: the sum of the mask, the causal frontier and the padding; None: nothing."""
    parts: list[Tensor] = []
    mask = node.optional(3)
    if mask is not None:
        parts.append(_mask_bias(build, mask, sizes[3]))
    past, lengths = node.optional(4), node.optional(6)
    if lengths is not None:
        # (B, 1, 1, 1)
        lengths = build.reshaped(build.cast(lengths, "INT32"), (*lengths.shape, 1, 1, 1))
    if node.integer("is_causal"):
        # Key j is seen by query i when j - i <= the number of keys before the queries.
        keys, queries = _places(build, sizes[3]), _places(build, sizes[2])
        distance = build.binary("SUB", keys, build.reshaped(queries, (queries.shape[0], 1)))
        before: Tensor
        if past is not None:
            before = scalar(build, size_of(past, 2))
        elif lengths is not None:
            before = build.binary("SUB", lengths, scalar(build, sizes[2]))
        else:
            before = build.constant(0)
        parts.append(_hidden_unless(build, build.binary("LESS_EQUAL", distance, before, type_="BOOL")))
    if lengths is not None:
        parts.append(_hidden_unless(build, build.binary("LESS", _places(build, sizes[3]), lengths, type_="BOOL")))
    if not parts:
        return None
    total = parts[0]
    for part in parts[1:]:
        total = build.binary("ADD", total, part)
    return total


def _mask_bias(build: Builder, mask: Tensor, keys: Size) -> Tensor:
    """Numbers to add; keys that the mask does not reach to are hidden."""
    bias = _hidden_unless(build, mask) if mask.type == "BOOL" else mask
    reached = mask.shape[-1]
    if reached < 0 or reached == keys:
        return bias
    if not isinstance(keys, int):
        raise UnsupportedError(f"whether its mask of {reached} keys reaches all of them is known only at run time")
    paddings = build.constant([[0, 0]] * (mask.rank - 1) + [[0, keys - reached]])
    return build.op("PADV2", [bias, paddings, build.constant(HIDDEN)], shape=(*mask.shape[:-1], keys), type_=bias.type)


def _hidden_unless(build: Builder, allowed: Tensor) -> Tensor:
    """0 where a key may be seen."""
    inputs = [allowed, build.constant(np.float32(0)), build.constant(HIDDEN)]
    return build.op("SELECT_V2", inputs, shape=allowed.shape, type_="FLOAT32")


def _sees_nothing(build: Builder, bias: Tensor) -> Tensor | None:
    """(..., S, 1): True for a query whose keys are all hidden; None where there is no such query."""
    if bias.constant is not None:
        hidden = np.isneginf(bias.constant.array().max(axis=-1, keepdims=True))
        return build.constant(hidden) if hidden.any() else None
    shape = (*bias.shape[:-1], 1)
    most = build.op("REDUCE_MAX", [bias, build.constant([bias.rank - 1])], shape=shape, type_="FLOAT32", keepDims=True)
    return build.binary("EQUAL", most, build.constant(HIDDEN), type_="BOOL")


def _zero_where(build: Builder, condition: Tensor, x: Tensor) -> Tensor:
    """Selected, not multiplied: what is replaced is NaN."""
    condition = build.with_rank(condition, x.rank)
    return build.op("SELECT_V2", [condition, build.constant(np.float32(0)), x], shape=x.shape, type_=x.type)


def _places(build: Builder, size: Size) -> Tensor:
    """0, 1, ... as INT32."""
    if isinstance(size, int):
        return build.constant(np.arange(size, dtype=np.int32))
    inputs = [build.constant(0), scalar(build, size), build.constant(1)]
    return build.op("RANGE", inputs, shape=(-1,), type_="INT32")


@TFLITE.register("RotaryEmbedding")
def rotary_embedding(node: NodeView, build: Builder) -> Tensor:
    """Each pair (a, b) of numbers of a head becomes (a cos - b sin, b cos + a sin).

    As x * (cos, cos) + swapped(x) * (-sin, sin), where `swapped` exchanges the members of all pairs.
    """
    x = node.input(0)
    is_flat = x.rank == 3
    if is_flat:
        heads = node.integer("num_heads")
        if heads < 1 or x.shape[2] < 0 or x.shape[2] % heads:
            raise UnsupportedError(f"{x.shape[2]} numbers do not divide among {heads} heads")
        x = reshaped_to(build, x, [size_of(x, 0), size_of(x, 1), heads, x.shape[2] // heads])
    turned = node.integer("rotary_embedding_dim") or x.shape[3]
    if turned < 0:
        raise UnsupportedError("the length of a head is not known before the model runs")
    is_interleaved = bool(node.integer("interleaved"))
    cosine, sine = node.input(1), node.input(2)
    cosines = _for_both(build, cosine, cosine, is_interleaved=is_interleaved)
    sines = _for_both(build, build.op("NEG", [sine]), sine, is_interleaved=is_interleaved)
    cosines, sines = (_at_places(build, one, node.optional(3), is_flat=is_flat) for one in (cosines, sines))
    head = slice_of(build, x, 3, 0, turned)
    swapped = _swapped(build, head, is_interleaved=is_interleaved)
    y = build.binary("ADD", build.binary("MUL", head, cosines), build.binary("MUL", swapped, sines))
    if turned < x.shape[3]:
        rest = slice_of(build, x, 3, turned, x.shape[3] - turned)
        y = build.op("CONCATENATION", [y, rest], shape=x.shape, type_=x.type, axis=3)
    given = node.input(0)
    return reshaped_to(build, y, [size_of(given, axis) for axis in range(given.rank)]) if is_flat else y


def _for_both(build: Builder, first: Tensor, second: Tensor, *, is_interleaved: bool) -> Tensor:
    """Factors of the first and of the second members of all pairs, in the order of the numbers of a head."""
    shape = (*first.shape[:-1], 2 * first.shape[-1])
    if not is_interleaved:
        return build.op("CONCATENATION", [first, second], shape=shape, type_=first.type, axis=first.rank - 1)
    sizes = [size_of(first, axis) for axis in range(first.rank)]
    columns = [reshaped_to(build, one, [*sizes, 1]) for one in (first, second)]
    paired = build.op("CONCATENATION", columns, shape=(*first.shape, 2), type_=first.type, axis=first.rank)
    return reshaped_to(build, paired, [*sizes[:-1], shape[-1]])


def _at_places(build: Builder, cache: Tensor, places: Tensor | None, *, is_flat: bool) -> Tensor:
    """(B, 1, S, D), or (B, S, 1, D) where heads stand behind the sequence."""
    if places is not None:
        places = build.cast(places, "INT32")
        cache = build.op("GATHER", [cache, places], shape=(*places.shape, cache.shape[-1]), type_=cache.type, axis=0)
    sizes = [size_of(cache, axis) for axis in range(3)]
    return reshaped_to(build, cache, [*sizes[:2], 1, sizes[2]] if is_flat else [sizes[0], 1, *sizes[1:]])


def _swapped(build: Builder, head: Tensor, *, is_interleaved: bool) -> Tensor:
    """The members of all pairs exchanged."""
    width = head.shape[3]
    if is_interleaved:
        order = build.constant(np.arange(width, dtype=np.int32) ^ 1)
        return build.op("GATHER", [head, order], shape=head.shape, type_=head.type, axis=3)
    halves = [slice_of(build, head, 3, begin, width // 2) for begin in (width // 2, 0)]
    return build.op("CONCATENATION", halves, shape=head.shape, type_=head.type, axis=3)
