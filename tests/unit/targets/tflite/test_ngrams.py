"""Counts of n-grams in LiteRT against ONNX Runtime's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxprune.errors import TargetError

pytest.importorskip("ai_edge_litert")

from tests.tflite_runs import assert_same_as_ort, emitted, one_node

TRIGRAMS: dict[str, Any] = {
    "min_gram_length": 1,
    "max_gram_length": 3,
    "ngram_counts": [0, 3, 9],
    # 1, 2, 4; (1, 2), (2, 2), (3, 1); (1, 2, 3), (4, 4, 1)
    "pool_int64s": [1, 2, 4, 1, 2, 2, 2, 3, 1, 1, 2, 3, 4, 4, 1],
    "ngram_indexes": [4, 0, 9, 2, 7, 1, 8, 3],
}
WEIGHTS = [0.5, 2.0, 3.0, 1.5, 0.25, 1.0, 4.0, 8.0]


def tokens(*shape: int, dtype: type = np.int32) -> np.ndarray:
    return np.random.default_rng(1).integers(1, 5, shape).astype(dtype)


@pytest.mark.parametrize("skipped", [0, 2, 9])
@pytest.mark.parametrize("weights", [{}, {"weights": WEIGHTS}])
@pytest.mark.parametrize("mode", ["TF", "IDF", "TFIDF"])
def test_ngrams_of_several_lengths_are_counted_in_columns_of_any_order(
    mode: str, weights: dict[str, Any], skipped: int
) -> None:
    feeds = {"x": tokens(3, 14, dtype=np.int64)}
    model = one_node("TfIdfVectorizer", feeds, **TRIGRAMS, mode=mode, max_skip_count=skipped, **weights)
    # Counts, times weights of a few bits.
    assert_same_as_ort(model, feeds, relative=0, absolute=0)


def test_any_number_of_rows_is_counted() -> None:
    feeds = {"x": tokens(5, 8)}
    model = one_node("TfIdfVectorizer", feeds, dynamic={"x": (0,)}, **TRIGRAMS, mode="TF", max_skip_count=1)
    assert_same_as_ort(model, feeds, relative=0, absolute=0)


def test_rows_shorter_than_every_ngram_count_nothing() -> None:
    feeds = {"x": tokens(2, 2)}
    shorter = TRIGRAMS | {"min_gram_length": 3}
    model = one_node("TfIdfVectorizer", feeds, dynamic={"x": (0,)}, **shorter, mode="TF", max_skip_count=0)
    assert_same_as_ort(model, feeds, relative=0, absolute=0)


def test_rows_of_any_length_are_refused() -> None:
    feeds = {"x": tokens(2, 9)}
    model = one_node("TfIdfVectorizer", feeds, dynamic={"x": (1,)}, **TRIGRAMS, mode="TF", max_skip_count=0)
    with pytest.raises(TargetError, match="number of its tokens"):
        emitted(model)


def test_ngrams_of_strings_are_refused() -> None:
    feeds = {"x": tokens(2, 9)}
    given = {key: value for key, value in TRIGRAMS.items() if key != "pool_int64s"} | {"pool_strings": ["a"] * 15}
    with pytest.raises(TargetError, match="strings"):
        emitted(one_node("TfIdfVectorizer", feeds, **given, mode="TF", max_skip_count=0))
