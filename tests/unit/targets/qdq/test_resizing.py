"""The indices of a Resize to the nearest, against ONNX Runtime's own Resize."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from onnxprune.contracts import CanonicalModel
from onnxprune.targets.qdq.resizing import nearest_indices, resized_rows_and_columns
from tests.builders import canonical, proto_of
from tests.quantization import run

MODES = list(
    itertools.product(
        ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners"),
        ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil"),
    )
)
SIZES = [(3, 7), (7, 14), (5, 20), (13, 6), (8, 1), (1, 4), (9, 9), (14, 28), (10, 37)]


def resize(
    size: int, *, sizes: list[int] | None = None, scales: list[float] | None = None, **attributes: str
) -> CanonicalModel:
    inputs = ["x", "", "scales"] if scales is not None else ["x", "", "", "sizes"]
    weights = (
        {"scales": np.array(scales, dtype=np.float32)}
        if scales is not None
        else {"sizes": np.array(sizes, dtype=np.int64)}
    )
    node = helper.make_node("Resize", inputs, ["y"], name="resize", **attributes)
    return canonical(
        proto_of([node], inputs={"x": (1, 1, size, 4)}, outputs={"y": [None] * 4}, weights=weights, opset=19)
    )


def resize_node(model: ir.Model) -> ir.Node:
    (node,) = (node for node in model.graph if node.op_type == "Resize")
    return node


@pytest.mark.parametrize(("transformation", "rounding"), MODES)
def test_rows_are_those_that_onnxruntime_copies(transformation: str, rounding: str) -> None:
    for size, resized in SIZES:
        model = resize(
            size,
            sizes=[1, 1, resized, 4],
            coordinate_transformation_mode=transformation,
            nearest_mode=rounding,
        )
        rows = np.arange(size, dtype=np.float32)[None, None, :, None] * np.ones(4, dtype=np.float32)

        (copied,) = run(model, {"x": rows})

        found = nearest_indices(size, resized, resized / size, transformation=transformation, rounding=rounding)
        assert found is not None
        assert found.tolist() == copied[0, 0, :, 0].tolist(), (size, resized)


@pytest.mark.parametrize("scale", [2.0, 3.0, 1.5, 2.3, 0.4])
def test_scales_that_do_not_divide_the_size_give_the_same_rows(scale: float) -> None:
    model = resize(7, scales=[1, 1, scale, 1])
    rows = np.arange(7, dtype=np.float32)[None, None, :, None] * np.ones(4, dtype=np.float32)
    (copied,) = run(model, {"x": rows})

    found = resized_rows_and_columns(resize_node(model))

    assert found is not None
    assert found[0].tolist() == copied[0, 0, :, 0].tolist()
    assert found[1].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "attributes",
    [
        {"mode": "linear"},
        {"coordinate_transformation_mode": "tf_crop_and_resize"},
        {"keep_aspect_ratio_policy": "not_larger"},
    ],
    ids=str,
)
def test_other_resizes_are_left_to_onnxruntime(attributes: dict[str, str]) -> None:
    sizes = [1, 1, 8, 4]
    node = helper.make_node("Resize", ["x", "roi", "", "sizes"], ["y"], name="resize", **attributes)
    weights = {"sizes": np.array(sizes, dtype=np.int64), "roi": np.array([0, 0, 0, 0, 1, 1, 1, 1], dtype=np.float32)}
    if "keep_aspect_ratio_policy" in attributes:
        node.input[1] = ""
        del weights["roi"]
    model = canonical(
        proto_of([node], inputs={"x": (1, 1, 4, 4)}, outputs={"y": [None] * 4}, weights=weights, opset=19)
    )

    assert resized_rows_and_columns(resize_node(model)) is None
