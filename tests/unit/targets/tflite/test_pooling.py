"""Poolings through LiteRT against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from onnxprune.errors import TargetError
from tests.tflite_runs import assert_same_as_ort, emitted, kinds, one_node

RELATIVE, ABSOLUTE = 1e-5, 1e-6
# Roots of sums of powers.
RELATIVE_OF_ROOTS = 1e-4

POOLINGS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "one axis": ((2, 3, 9), (0,), {"kernel_shape": [3], "strides": [2], "pads": [1, 0]}),
    "like SAME": ((2, 3, 9, 9), (0,), {"kernel_shape": [5, 5], "pads": [2, 2, 2, 2]}),
    "like SAME, all sizes open": ((2, 3, 9, 9), (0, 2, 3), {"kernel_shape": [5, 5], "pads": [2, 2, 2, 2]}),
    "padded, all sizes open": (
        (2, 3, 9, 8),
        (0, 2, 3),
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
    ),
    "last windows in part": ((2, 3, 8, 8), (0,), {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
    "last windows in part, all sizes open": (
        (2, 3, 8, 8),
        (0, 2, 3),
        {"kernel_shape": [3, 1], "strides": [2, 2], "ceil_mode": 1},
    ),
    "odd padding, last windows in part": (
        (2, 3, 8, 7),
        (0,),
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 1, 1, 0], "ceil_mode": 1},
    ),
    "dilated": (
        (2, 3, 9, 9),
        (0,),
        {"kernel_shape": [3, 2], "dilations": [2, 3], "strides": [1, 2], "pads": [1, 0, 0, 1]},
    ),
    "three axes": (
        (2, 3, 5, 6, 7),
        (0,),
        {"kernel_shape": [2, 3, 3], "strides": [2, 1, 2], "pads": [1, 0, 1, 0, 1, 1]},
    ),
    "three axes like SAME": ((2, 3, 5, 6, 7), (0,), {"kernel_shape": [3, 3, 3], "pads": [1] * 6}),
}


def _feeds(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    # No number is above 0: padding of zeros would win.
    return {"x": -np.abs(np.random.default_rng(0).normal(size=shape)).astype(np.float32) - 0.5}


@pytest.mark.parametrize("name", POOLINGS)
def test_max_pooling_agrees_with_onnx_runtime(name: str) -> None:
    shape, dynamic, attributes = POOLINGS[name]
    proto = one_node("MaxPool", _feeds(shape), dynamic={"x": dynamic}, opset=22, **attributes)
    assert_same_as_ort(proto, _feeds(shape), relative=0, absolute=0)


@pytest.mark.parametrize(
    ("name", "counts_padding"),
    [
        (name, counts_padding)
        for name in POOLINGS
        for counts_padding in (0, 1)
        # Refused: see below.
        if (name, counts_padding) != ("last windows in part, all sizes open", 1)
    ],
)
def test_average_pooling_agrees_with_onnx_runtime(name: str, counts_padding: int) -> None:
    shape, dynamic, attributes = POOLINGS[name]
    attributes = attributes | {"count_include_pad": counts_padding}
    proto = one_node("AveragePool", _feeds(shape), dynamic={"x": dynamic}, opset=22, **attributes)
    assert_same_as_ort(proto, _feeds(shape), relative=RELATIVE, absolute=ABSOLUTE)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("name", POOLINGS)
def test_pooling_of_powers_agrees_with_onnx_runtime(name: str, order: int) -> None:
    shape, dynamic, attributes = POOLINGS[name]
    proto = one_node("LpPool", _feeds(shape), dynamic={"x": dynamic}, opset=22, p=order, **attributes)
    assert_same_as_ort(proto, _feeds(shape), relative=RELATIVE_OF_ROOTS, absolute=ABSOLUTE)


@pytest.mark.parametrize("op_type", ["GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool"])
@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 3, 4, 5), (2, 3, 3, 4, 5)])
def test_global_pooling_agrees_with_onnx_runtime_at_any_rank(op_type: str, shape: tuple[int, ...]) -> None:
    # ONNX Runtime knows GlobalLpPool up to opset 21.
    proto = one_node(op_type, _feeds(shape), dynamic={"x": (0, 2)}, opset=21)
    assert_same_as_ort(proto, _feeds(shape), relative=RELATIVE_OF_ROOTS, absolute=ABSOLUTE)


def test_padding_that_is_that_of_same_costs_no_operator() -> None:
    shape, _, attributes = POOLINGS["like SAME"]
    for op_type in ("MaxPool", "AveragePool"):
        found = kinds(emitted(one_node(op_type, _feeds(shape), opset=22, **attributes)))
        assert sorted(set(found)) == sorted({"TRANSPOSE", "MAX_POOL_2D" if op_type == "MaxPool" else "AVERAGE_POOL_2D"})


@pytest.mark.parametrize(("before", "wanted"), [("Relu", "PAD"), ("Neg", "PADV2")])
def test_maxima_behind_relu_are_padded_with_zeros_which_xnnpack_takes(before: str, wanted: str) -> None:
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 22]> g (float[1,4,16,16] x) => (float[1,4,8,8] y) {{
            z = {before}(x)
            y = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(z)
        }}"""
    )
    feeds = {"x": np.random.default_rng(0).normal(size=(1, 4, 16, 16)).astype(np.float32)}
    found = kinds(assert_same_as_ort(proto, feeds, relative=0, absolute=0))
    assert [kind for kind in found if kind.startswith("PAD")] == [wanted]


@pytest.mark.parametrize("storage_order", [0, 1])
@pytest.mark.parametrize("batch", [(), (0,)], ids=["fixed batch", "open batch"])
def test_places_of_maxima_agree_with_onnx_runtime(storage_order: int, batch: tuple[int, ...]) -> None:
    attributes = {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 1, 1], "storage_order": storage_order}
    feeds = _feeds((2, 3, 7, 6))
    proto = one_node("MaxPool", feeds, outputs=["y", "places"], dynamic={"x": batch}, opset=22, **attributes)
    proto.graph.output[1].type.tensor_type.elem_type = onnx.TensorProto.INT64
    assert_same_as_ort(proto, feeds, relative=0, absolute=0)


def test_unpooling_of_windows_that_overlap_puts_a_shared_maximum_there_once() -> None:
    feeds = {
        "x": np.array([[[[5, 5], [7, 8]]]], np.float32),
        "places": np.array([[[[2, 2], [17, 19]]]], np.int64),
    }
    attributes = {"kernel_shape": [3, 3], "strides": [2, 2]}
    assert_same_as_ort(one_node("MaxUnpool", feeds, opset=22, **attributes), feeds, relative=0, absolute=0)


def test_what_the_last_windows_count_is_refused_where_it_depends_on_an_open_size() -> None:
    attributes = {
        "kernel_shape": [3, 3],
        "strides": [2, 2],
        "pads": [1, 1, 0, 0],
        "ceil_mode": 1,
        "count_include_pad": 1,
    }
    with pytest.raises(TargetError, match="how many elements its last windows count"):
        emitted(one_node("AveragePool", _feeds((1, 1, 8, 8)), dynamic={"x": (2, 3)}, opset=22, **attributes))


@pytest.mark.parametrize("attributes", [{"dilations": [2, 2]}, {"strides": [4, 4]}], ids=["dilated", "long stride"])
def test_auto_pad_is_refused_where_runtimes_disagree_on_it(attributes: dict[str, Any]) -> None:
    with pytest.raises(TargetError, match="runtimes disagree on its auto_pad"):
        emitted(
            one_node(
                "MaxPool", _feeds((1, 1, 8, 8)), opset=22, kernel_shape=[3, 3], auto_pad="SAME_UPPER", **attributes
            )
        )
