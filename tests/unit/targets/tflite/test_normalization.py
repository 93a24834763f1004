"""Normalizations and losses through LiteRT against ONNX Runtime: constants, open sizes, ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from tests.tflite_runs import assert_same_as_ort, emitted, kinds, litert_outputs, one_node

# Means over a few hundred numbers, then a root.
RELATIVE, ABSOLUTE = 1e-4, 2e-5


def _numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _run(op_type: str, x: np.ndarray, constants: dict[str, np.ndarray], **rest: Any) -> list[str]:
    proto = one_node(op_type, {"x": x}, constants=constants, **rest)
    return kinds(assert_same_as_ort(proto, {"x": x}, relative=RELATIVE, absolute=ABSOLUTE))


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 5), (2, 3, 4, 5), (1, 3, 2, 3, 4)])
def test_batch_normalization_with_constants_is_one_product_and_one_sum(shape: tuple[int, ...]) -> None:
    constants = {
        "scale": _numbers(3, seed=1),
        "bias": _numbers(3, seed=2),
        "mean": _numbers(3, seed=3),
        "variance": np.abs(_numbers(3, seed=4)),
    }
    assert _run("BatchNormalization", _numbers(*shape), constants, dynamic={"x": (0,)}, epsilon=1e-3) == ["MUL", "ADD"]


@pytest.mark.parametrize("dynamic", [(0,), (0, 2, 3)], ids=["open batch", "open sizes"])
@pytest.mark.parametrize(("op_type", "groups"), [("InstanceNormalization", 6), ("GroupNormalization", 3)])
def test_normalization_over_space_is_exact_far_from_zero(op_type: str, groups: int, dynamic: tuple[int, ...]) -> None:
    # E[x^2] - E[x]^2 would cancel here, as ONNX Runtime's GroupNormalization does: it is off by 0.03.
    x = _numbers(2, 6, 4, 5) + 300
    scale, bias = _numbers(6, seed=1), _numbers(6, seed=2)
    attributes = {"num_groups": groups} if op_type == "GroupNormalization" else {}
    constants = {"scale": scale, "bias": bias}
    proto = one_node(op_type, {"x": x}, constants=constants, dynamic={"x": dynamic}, opset=21, **attributes)
    rows = x.astype(np.float64).reshape(2, groups, -1)
    deviation = np.sqrt(rows.var(axis=-1, keepdims=True) + 1e-5)
    wanted = ((rows - rows.mean(axis=-1, keepdims=True)) / deviation).reshape(x.shape)
    wanted = wanted * scale.reshape(1, 6, 1, 1) + bias.reshape(1, 6, 1, 1)
    # The mean, of about 300, is rounded to 3e-5.
    np.testing.assert_allclose(litert_outputs(emitted(proto), {"x": x})["y"], wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize("axis", [-1, 1, 2])
def test_layer_normalization_agrees_with_onnx_runtime(axis: int) -> None:
    x = _numbers(2, 5, 8)
    constants = {"scale": _numbers(*x.shape[axis:], seed=1), "bias": _numbers(*x.shape[axis:], seed=2)}
    _run("LayerNormalization", x, constants, dynamic={"x": (0,)}, outputs=["y", "mean", "inverse"], axis=axis, opset=18)


@pytest.mark.parametrize("op_type", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 4), (2, 3, 4, 5), (2, 3, 2, 3, 4)])
def test_softmax_runs_over_any_axis_at_any_rank(op_type: str, shape: tuple[int, ...]) -> None:
    for axis in range(-1, len(shape) - 1):
        _run(op_type, _numbers(*shape) * 30, {}, dynamic={"x": (0,)}, axis=axis)


@pytest.mark.parametrize("shape", [(2, 7, 3, 4), (2, 7, 6)])
@pytest.mark.parametrize("size", [1, 4, 5])
def test_response_normalization_sums_windows_of_odd_and_even_sizes(size: int, shape: tuple[int, ...]) -> None:
    # ONNX Runtime refuses even sizes.
    x = _numbers(*shape)
    proto = one_node("LRN", {"x": x}, dynamic={"x": (0,)}, size=size, alpha=0.3, beta=0.6, bias=1.5)
    model = emitted(proto)
    squares = np.zeros_like(x)
    for channel in range(7):
        first, behind = max(0, channel - (size - 1) // 2), channel + size // 2 + 1
        squares[:, channel] = (x[:, first:behind] ** 2).sum(axis=1)
    wanted = x / (1.5 + 0.3 / size * squares) ** 0.6
    np.testing.assert_allclose(litert_outputs(model, {"x": x})["y"], wanted, rtol=RELATIVE, atol=ABSOLUTE)
    assert ("LOCAL_RESPONSE_NORMALIZATION" in kinds(model)) == (size % 2 == 1 and x.ndim == 4)


@pytest.mark.parametrize("order", [1, 2])
def test_what_has_no_length_stays_zero(order: int) -> None:
    x = _numbers(3, 4)
    x[1] = 0
    _run("LpNormalization", x, {}, p=order, opset=21)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("ignored", [None, 1, -100])
def test_losses_agree_with_onnx_runtime(reduction: str, is_weighted: bool, ignored: int | None) -> None:
    labels = np.random.default_rng(1).integers(0, 4, size=(3, 5)).astype(np.int64)
    if ignored is not None:
        labels[0, :2] = ignored
    feeds = {"x": _numbers(3, 4, 5), "labels": labels}
    constants = {"weight": np.abs(_numbers(4, seed=2))} if is_weighted else {}
    attributes = {} if ignored is None else {"ignore_index": ignored}
    for op_type, outputs in (("SoftmaxCrossEntropyLoss", ["y", "p"]), ("NegativeLogLikelihoodLoss", ["y"])):
        proto = one_node(
            op_type, feeds, constants=constants, outputs=outputs, reduction=reduction, opset=13, **attributes
        )
        assert isinstance(proto, onnx.ModelProto)
        assert_same_as_ort(_upgraded(proto), feeds, relative=RELATIVE, absolute=ABSOLUTE)


def _upgraded(proto: onnx.ModelProto) -> onnx.ModelProto:
    # The operators have not changed since opset 13; we read from 18 on.
    proto.opset_import[0].version = 18
    return proto
