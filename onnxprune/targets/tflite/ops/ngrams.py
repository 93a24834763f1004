"""TfIdfVectorizer: how often each n-gram of a pool occurs in a row of tokens.

N rows of T tokens, a pool of G n-grams of the same length n, windows of n tokens that are `step` apart:

    tokens (N, T, 1) == k-th tokens of the pool (1, 1, G)    -> (N, T, G), for k = 0 .. n - 1
    of these the places k * step .. k * step + P - 1, all    -> (N, P, G), P = T - (n - 1) * step windows
    their sum over the windows                               -> (N, G)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from onnxprune.targets.tflite.build import Builder, UnsupportedError
from onnxprune.targets.tflite.graph import Tensor
from onnxprune.targets.tflite.ops.formulas import Term
from onnxprune.targets.tflite.ops.shaping import concatenated
from onnxprune.targets.tflite.ops.sizes import slice_of
from onnxprune.targets.tflite.ops.table import TFLITE, NodeView


@dataclass(frozen=True, slots=True)
class _Level:
    """The n-grams (G, n) of one length, and the columns that count them."""

    grams: npt.NDArray[np.int64]
    columns: tuple[int, ...]


@TFLITE.register("TfIdfVectorizer")
def occurrences(node: NodeView, build: Builder) -> Tensor:
    """EQUAL and LOGICAL_AND find each n-gram, SUM counts them, GATHER puts them in order."""
    x = node.input(0)
    if x.shape[-1] < 0:
        raise UnsupportedError("the number of its tokens is known only when the model runs")
    if "pool_strings" in node.node.attributes:
        raise UnsupportedError("its tokens are strings, which TFLite's EQUAL compares one by one only")
    indexes = node.ints("ngram_indexes")
    if len(set(indexes)) < len(indexes):
        raise UnsupportedError("several of its n-grams are counted in one column")
    width = max(indexes) + 1
    levels = _levels(node, indexes)
    if any(level.grams.size and abs(level.grams).max() > np.iinfo(np.int32).max for level in levels):
        x = build.cast(x, "INT64")
    rows = build.reshaped(x, (1, *x.shape)) if x.rank == 1 else x
    skips = range(1, node.integer("max_skip_count") + 2)
    counts: list[Tensor] = []
    columns: list[int] = []
    for level in levels:
        # Single tokens are next to each other however many are skipped.
        counted = _counts(build, rows, level.grams, skips if level.grams.shape[1] > 1 else skips[:1])
        if counted is not None:
            counts.append(counted)
            columns += level.columns
    if not counts:
        done = build.filled([build.length(rows, 0), width], np.float32(0))
    else:
        done = _in_order(build, concatenated(build, counts, 1), columns, width)
    weighed = _weighed(node, Term(build, done), indexes, width).tensor
    return build.reshaped(weighed, (width,)) if x.rank == 1 else weighed


def _levels(node: NodeView, indexes: tuple[int, ...]) -> list[_Level]:
    """The n-grams that are looked for, by length."""
    pool = np.array(node.ints("pool_int64s"), np.int64)
    starts = (*node.ints("ngram_counts"), len(pool))
    shortest, longest = node.integer("min_gram_length"), node.integer("max_gram_length")
    found: list[_Level] = []
    passed = 0
    for length, (start, end) in enumerate(pairwise(starts), 1):
        grams = pool[start:end].reshape(-1, length)
        columns = indexes[passed : passed + len(grams)]
        passed += len(grams)
        if shortest <= length <= longest and len(grams):
            found.append(_Level(grams, columns))
    return found


def _counts(build: Builder, rows: Tensor, grams: npt.NDArray[np.int64], steps: range) -> Tensor | None:
    """How often each of `grams` (G, n) occurs: (N, G); None where no row is long enough."""
    tokens, (count, length) = rows.shape[1], grams.shape
    column = Term(build, build.unsqueezed(rows, [2]))
    equal: list[Tensor] = []
    for position in range(length):
        wanted = build.cast(build.constant(grams[:, position].reshape(1, 1, count)), rows.type)
        equal.append(build.binary("EQUAL", column.tensor, wanted, type_="BOOL"))
    sums: list[Term] = []
    for step in steps:
        windows = tokens - (length - 1) * step
        if windows <= 0:
            break
        aligned = (slice_of(build, one, 1, place * step, windows) for place, one in enumerate(equal))
        found = reduce(lambda one, other: build.binary("LOGICAL_AND", one, other), aligned)
        axis = build.constant(np.array([1], np.int32))
        total = build.op("SUM", [build.cast(found, "FLOAT32"), axis], shape=(rows.shape[0], count), keepDims=False)
        sums.append(Term(build, total))
    return reduce(Term.__add__, sums).tensor if sums else None


def _in_order(build: Builder, counts: Tensor, columns: list[int], width: int) -> Tensor:
    """The counts in their columns, among zeros."""
    if columns == list(range(width)):
        return counts
    places = np.full(width, len(columns), np.int32)
    places[columns] = np.arange(len(columns))
    if len(columns) < width:
        # Columns that nothing counts read one more, of zeros.
        border = build.constant(np.array([[0, 0], [0, 1]], np.int32))
        counts = build.op("PAD", [counts, border], shape=(counts.shape[0], len(columns) + 1))
    return build.op("GATHER", [counts, build.constant(places)], shape=(counts.shape[0], width), axis=1)


def _weighed(node: NodeView, counts: Term, indexes: tuple[int, ...], width: int) -> Term:
    """The counts; 1 where there are any (IDF); times the weight of the n-gram, where the mode asks for it."""
    mode, weights = node.text("mode"), node.node.attributes.get_floats("weights", ())
    if mode == "TF":
        return counts
    size = counts.at_most(1) if mode == "IDF" else counts
    if not weights:
        return size
    by_column = np.zeros((1, width), np.float32)
    by_column[0, list(indexes)] = weights
    return size * Term(counts.build, counts.build.constant(by_column))
