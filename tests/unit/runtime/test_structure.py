"""Which of two models count as the same for a timing, and which do not."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from onnxprune.contracts import CanonicalModel
from onnxprune.runtime.structure import structure_digest
from tests.builders import canonical, conv_net, proto_of

FEEDS = {"x": np.zeros((1, 3, 8, 8), dtype=np.float32)}


def digest(model: ir.Model) -> str:
    return structure_digest(model, FEEDS)


def model_of(nodes: list[Any], weights: dict[str, npt.NDArray[Any]] | None = None) -> ir.Model:
    """From `x` to `y`, of which no shape is known: what is computed is told by the constants alone."""
    return ir.from_proto(proto_of(nodes, inputs={"x": ["N", 3, "H", "W"]}, outputs={"y": None}, weights=weights))


def small(*, name: str = "conv", kernel: int = 3, stride: int = 1, size: int = 8, target: int = 4) -> CanonicalModel:
    """Conv and Reshape to `target` rows."""
    return canonical(
        proto_of(
            [
                helper.make_node("Conv", ["x", "w"], ["a"], name=name, strides=[stride] * 2),
                helper.make_node("Reshape", ["a", "shape"], ["y"], name="reshape"),
            ],
            inputs={"x": [1, 3, size, size]},
            outputs={"y": [None, None]},
            weights={
                "w": np.full((4, 3, kernel, kernel), len(name), dtype=np.float32),
                "shape": np.array([target, -1], dtype=np.int64),
            },
        )
    )


def quantized(*, bias: int = 1, zero_points: tuple[int, int] = (3, 5), scale: float = 0.1) -> ir.Model:
    """Quantize, dequantize, Conv with a bias in integers, quantize, dequantize; equal zero points are stored once."""
    first, second = (f"zero_point_{number}" for number in zero_points)
    proto = proto_of(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", first], ["xq"], name="q"),
            helper.make_node("DequantizeLinear", ["xq", "scale", first], ["xd"], name="d"),
            helper.make_node("DequantizeLinear", ["b", "bias_scale", "bias_zero"], ["bd"], name="bias"),
            helper.make_node("Conv", ["xd", "w", "bd"], ["c"], name="conv"),
            helper.make_node("QuantizeLinear", ["c", "scale", second], ["cq"], name="q2"),
            helper.make_node("DequantizeLinear", ["cq", "scale", second], ["y"], name="d2"),
        ],
        inputs={"x": [1, 3, 8, 8]},
        outputs={"y": [1, 4, 6, 6]},
        weights={
            "w": np.ones((4, 3, 3, 3), dtype=np.float32),
            "b": np.full(4, bias, dtype=np.int32),
            "bias_scale": np.array(0.01, dtype=np.float32),
            "bias_zero": np.array(0, dtype=np.int32),
            "scale": np.array(scale, dtype=np.float32),
            **{f"zero_point_{number}": np.array(number, dtype=np.uint8) for number in zero_points},
        },
    )
    return ir.from_proto(proto)


def resized(factor: float) -> ir.Model:
    scales = np.array([1, 1, factor, factor], dtype=np.float32)
    return model_of([helper.make_node("Resize", ["x", "", "scales"], ["y"], name="r")], {"scales": scales})


def resized_by_what_a_sum_read_before(factor: float) -> ir.Model:
    return model_of(
        [
            helper.make_node("Add", ["scales", "scales"], ["unused"], name="a"),
            helper.make_node("Resize", ["x", "", "scales"], ["y"], name="r"),
        ],
        {"scales": np.array([1, 1, factor, factor], dtype=np.float32)},
    )


def counted(limit: float) -> ir.Model:
    numbers = {"start": 0.0, "limit": limit, "delta": 1.0}
    return model_of(
        [helper.make_node("Range", list(numbers), ["y"], name="r")],
        {name: np.array(number, dtype=np.float32) for name, number in numbers.items()},
    )


def suppressed(threshold: float) -> ir.Model:
    return model_of(
        [
            helper.make_node("NonMaxSuppression", ["boxes", "scores", "most", "iou", "least"], ["y"], name="nms"),
        ],
        {
            "boxes": np.zeros((1, 6, 4), dtype=np.float32),
            "scores": np.zeros((1, 1, 6), dtype=np.float32),
            "most": np.array(5, dtype=np.int64),
            "iou": np.array(0.5, dtype=np.float32),
            "least": np.array(threshold, dtype=np.float32),
        },
    )


def filled(number: int) -> ir.Model:
    value = numpy_helper.from_array(np.array([number], dtype=np.int64))
    return model_of(
        [
            helper.make_node("Shape", ["x"], ["s"], name="s"),
            helper.make_node("ConstantOfShape", ["s"], ["f"], name="f", value=value),
            helper.make_node("Expand", ["x", "f"], ["y"], name="e"),
        ],
    )


def resized_by_a_constant_node(factor: float) -> ir.Model:
    value = numpy_helper.from_array(np.array([1, 1, factor, factor], dtype=np.float32))
    return model_of(
        [
            helper.make_node("Constant", [], ["scales"], name="c", value=value),
            helper.make_node("Resize", ["x", "", "scales"], ["y"], name="r"),
        ],
    )


def test_names_and_weights_of_a_model_do_not_count() -> None:
    assert digest(small(name="a")) == digest(small(name="bcd"))
    assert structure_digest(small(name="a"), FEEDS, with_names=True) != structure_digest(
        small(name="b"), FEEDS, with_names=True
    )


@pytest.mark.parametrize(
    "other",
    [small(kernel=1), small(stride=2), small(target=2), small(size=9)],
    ids=["shape of a weight", "attribute", "integer constant", "shape of the input"],
)
def test_what_time_depends_on_counts(other: CanonicalModel) -> None:
    assert digest(small()) != digest(other)


def test_shapes_and_types_of_the_feeds_count() -> None:
    larger = {"x": np.zeros((2, 3, 8, 8), dtype=np.float32)}
    assert structure_digest(conv_net(), FEEDS) != structure_digest(conv_net(), larger)


@pytest.mark.parametrize(
    "other",
    [quantized(bias=7), quantized(scale=0.2), quantized(zero_points=(4, 9)), quantized(zero_points=(3, 3))],
    ids=["integer bias", "scale", "zero points", "zero points that are equal by chance"],
)
def test_what_a_calibration_finds_does_not_count(other: ir.Model) -> None:
    assert digest(quantized()) == digest(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (resized(2), resized(4)),
        (resized_by_what_a_sum_read_before(2), resized_by_what_a_sum_read_before(4)),
        (resized_by_a_constant_node(2), resized_by_a_constant_node(4)),
        (counted(5), counted(500)),
        (suppressed(0.1), suppressed(0.9)),
        (filled(1), filled(3)),
    ],
    ids=["Resize", "Resize after another reader", "Constant", "Range", "NonMaxSuppression", "tensor attribute"],
)
def test_numbers_that_say_how_much_is_computed_count(one: ir.Model, other: ir.Model) -> None:
    assert digest(one) != digest(other)
