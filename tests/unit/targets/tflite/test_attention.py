"""Attention and RotaryEmbedding in LiteRT: open sizes, and how many operators they become."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

pytest.importorskip("ai_edge_litert")

from onnxprune.errors import TargetError
from onnxprune.targets.tflite.graph import Model
from tests.tflite_runs import emitted, kinds, litert_outputs, one_node

# Sums of some dozens of numbers around 1, added in another order.
TOLERANCES = {"rtol": 1e-4, "atol": 1e-5}
Array = npt.NDArray[Any]


def noise(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def assert_same_as_reference(proto: onnx.ModelProto, feeds: dict[str, Array]) -> Model:
    """LiteRT gives what onnx's reference gives."""
    model = emitted(proto)
    actual = litert_outputs(model, feeds)
    names = [value.name for value in proto.graph.output]
    for name, expected in zip(names, ReferenceEvaluator(proto).run(None, feeds), strict=True):
        np.testing.assert_allclose(actual[name], expected, err_msg=name, **TOLERANCES)
    return model


def heads(queries: int = 4, keys: int = 4, length: int = 3, key_length: int = 5) -> dict[str, Array]:
    return {"q": noise(2, queries, length, 8), "k": noise(2, keys, key_length, 8), "v": noise(2, keys, key_length, 6)}


def test_plain_attention_is_four_operators() -> None:
    feeds = heads()
    model = assert_same_as_reference(one_node("Attention", feeds), feeds)
    assert kinds(model) == ["MUL", "BATCH_MATMUL", "SOFTMAX", "BATCH_MATMUL"]


def test_shared_keys_are_not_repeated() -> None:
    feeds = heads(queries=6, keys=2)
    model = assert_same_as_reference(one_node("Attention", feeds), feeds)
    assert sorted(set(kinds(model))) == ["BATCH_MATMUL", "MUL", "RESHAPE", "SOFTMAX"]


def test_causal_mask_of_known_sizes_is_a_constant() -> None:
    feeds = heads(length=5)
    model = assert_same_as_reference(one_node("Attention", feeds, is_causal=1), feeds)
    assert kinds(model) == ["MUL", "BATCH_MATMUL", "ADD", "SOFTMAX", "BATCH_MATMUL"]


@pytest.mark.parametrize("axes", [[0], [2], [0, 2]], ids=["batch", "length", "both"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_sizes_that_only_the_run_knows(axes: list[int], groups: int) -> None:
    feeds = heads(keys=groups, length=5)
    proto = one_node("Attention", feeds, is_causal=1, dynamic=dict.fromkeys("qkv", axes))
    assert_same_as_reference(proto, feeds)


@pytest.mark.parametrize("axes", [[0], [0, 1]], ids=["batch", "both"])
def test_heads_within_one_axis_keep_open_sizes(axes: list[int]) -> None:
    feeds = {"q": noise(2, 5, 24), "k": noise(2, 5, 12), "v": noise(2, 5, 12)}
    proto = one_node("Attention", feeds, is_causal=1, q_num_heads=4, kv_num_heads=2, dynamic=dict.fromkeys("qkv", axes))
    assert_same_as_reference(proto, feeds)


def test_query_that_may_see_no_key_gives_zeros_for_constant_and_fed_masks() -> None:
    feeds = heads()
    mask = np.ones((3, 5), bool)
    mask[1] = False
    constant = one_node("Attention", feeds, constants={"m": mask})
    model = assert_same_as_reference(constant, feeds)
    assert not litert_outputs(model, feeds)["y"][:, :, 1].any()
    assert "REDUCE_MAX" not in kinds(model)
    feeds["m"] = mask
    assert_same_as_reference(one_node("Attention", feeds), feeds)


def test_mask_that_may_be_shorter_than_the_keys_is_refused() -> None:
    feeds = {**heads(), "m": noise(3, 5)}
    with pytest.raises(TargetError, match="whether its mask of 5 keys reaches all of them"):
        emitted(one_node("Attention", feeds, dynamic={"k": [2], "v": [2]}))


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(TargetError, match="4 heads of queries do not divide among 3 heads of keys"):
        emitted(one_node("Attention", heads(queries=4, keys=3)))


@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("is_flat", [False, True])
def test_rotation_with_constant_tables_is_two_products(is_interleaved: bool, is_flat: bool) -> None:
    # Outputs of RotaryEmbedding keep the shape of the input.
    feeds = {"x": noise(2, 3, 32) if is_flat else noise(2, 4, 3, 8), "places": np.array([[0, 1, 2], [5, 6, 7]])}
    angles = noise(10, 4)
    options = {"num_heads": 4} if is_flat else {}
    proto = one_node(
        "RotaryEmbedding",
        feeds,
        constants={"cos": np.cos(angles), "sin": np.sin(angles)},
        inputs=["x", "cos", "sin", "places"],
        interleaved=int(is_interleaved),
        dynamic={"x": [0], "places": [0]},
        **options,
    )
    found = kinds(assert_same_as_reference(proto, feeds))
    assert found.count("MUL") == 2
    assert "NEG" not in found
