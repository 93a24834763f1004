"""What may go: every channel of these patterns, weights behind other operators, numbers in shapes, tied weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from onnxruntime import quantization

from onnxprune.contracts import CanonicalModel
from onnxprune.graph.io import save_model
from onnxprune.passes.prune.analysis import ChannelClasses, analyze_channels
from onnxprune.passes.prune.limits import width_limits
from onnxprune.passes.prune.oracle import largest_difference, masked_model
from onnxprune.passes.prune.surgery import remove_channels
from onnxprune.runtime.sessions import ort_runner_from_model
from tests.builders import canonical, conv_net_proto, proto_of
from tests.patterns import network

RNG = np.random.default_rng(0)

ALL_FREE = (
    *("lstm", "lstm_stack", "lstm_with_peepholes", "gru_reset_first", "gru_reset_last", "rnn_last_state"),
    *("slices_with_steps", "class_token", "divided_by_its_norm", "added_zeros"),
    *("einsum_with_ellipsis", "einsum_attention", "gemm_transposes", "matmul_vectors"),
    *("gather_elements", "scatter_nd", "fold", "quantized_layer"),
    *("attention_of_heads", "packed_attention_of_two_heads", "attention_with_grouped_queries"),
    "fused_attention",
    *("multi_head_attention", "multi_head_attention_of_two_heads", "group_query_attention", "rotary_positions"),
    *("fused_products", "skip_normalization"),
)


def weight(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def groups_of(model: ir.Model) -> dict[str, str | None]:
    return {group.id: group.frozen_reason for group in analyze_channels(model).groups if group.slices}


def half_of_each(classes: ChannelClasses) -> np.ndarray:
    keeps = np.ones(classes.num_classes, dtype=np.bool_)
    for group in classes.groups:
        if group.frozen_reason is None:
            keeps[group.classes[::2]] = False
    scores = np.zeros(classes.num_classes)
    return width_limits(classes, min_channels=1, channel_multiple=1).repaired(keeps, scores)


def difference_after_pruning(model: CanonicalModel, feeds: dict[str, np.ndarray]) -> float:
    """How far the model without half its channels is from the masked original."""
    classes = analyze_channels(model)
    keeps = half_of_each(classes)
    assert not keeps.all()
    pruned = model.clone()
    remove_channels(pruned, analyze_channels(pruned), keeps)
    actual = ort_runner_from_model(pruned, optimization="disabled").run(feeds)
    expected = ort_runner_from_model(masked_model(model, keeps), optimization="disabled").run(feeds)
    return largest_difference(expected, actual)


@pytest.mark.parametrize("name", ALL_FREE)
def test_every_channel_of_the_pattern_may_go(name: str) -> None:
    model = network([name])
    inside = [g for g in analyze_channels(model).groups if any(s.key.startswith("p0/") for s in g.slices)]
    assert [group.frozen_reason for group in inside] == [None] * len(inside)


def test_hidden_units_of_a_recurrent_layer_go_from_all_gates_and_the_layer_counts_them() -> None:
    model = network(["gru_reset_last"])
    classes = analyze_channels(model)
    hidden = next(group for group in classes.groups if any("GRU" in layer for layer in group.layers))
    keeps = np.ones(classes.num_classes, dtype=np.bool_)
    keeps[hidden.classes[:3]] = False
    remove_channels(model, classes, keeps)
    layer = next(node for node in model.graph if node.op_type == "GRU")
    shapes = [list(value.shape or ()) for position in (1, 2, 3) if (value := layer.inputs[position]) is not None]
    assert layer.attributes.get_int("hidden_size") == 5
    assert shapes == [[1, 15, 16], [1, 15, 5], [1, 30]]


def test_the_default_scale_of_attention_is_written_down_when_its_width_changes() -> None:
    model = network(["packed_attention_of_two_heads"])
    classes = analyze_channels(model)
    remove_channels(model, classes, half_of_each(classes))
    layer = next(node for node in model.graph if node.op_type == "Attention")
    assert layer.attributes.get_float("scale") == pytest.approx(1 / np.sqrt(8), rel=1e-6)


def test_a_convolution_whose_weight_is_cast_from_half_precision_loses_filters() -> None:
    # 1.2 MB in half precision: the cast is not folded, because the result would be 1 MiB larger.
    wide = 1024
    nodes = [
        helper.make_node("Cast", ["half"], ["filters"], name="cast", to=TensorProto.FLOAT),
        helper.make_node("Conv", ["x", "filters", "bias"], ["h"], name="conv", pads=[1] * 4),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Conv", ["r", "out"], ["y"], name="last"),
    ]
    filters = (weight(wide, 64, 3, 3) / 24).astype(np.float16)
    weights = {"half": filters, "bias": weight(wide), "out": weight(4, wide, 1, 1)}
    model = canonical(proto_of(nodes, inputs={"x": ["N", 64, 4, 4]}, outputs={"y": None}, weights=weights))
    group = next(group for group in analyze_channels(model).groups if group.id == "half[0]")
    assert (group.frozen_reason, group.layers) == (None, ("conv",))
    assert difference_after_pruning(model, {"x": weight(2, 64, 4, 4)}) < 1e-5


def test_a_model_in_half_precision_is_pruned_exactly() -> None:
    model = canonical(conv_net_proto(dtype=np.float16))
    # 11 bits, sums of at most 144 terms.
    assert difference_after_pruning(model, {"x": weight(2, 3, 8, 8).astype(np.float16)}) < 5e-3


class Calibration(quantization.CalibrationDataReader):
    def __init__(self) -> None:
        self.batches = iter([{"x": weight(1, 3, 8, 8)} for _ in range(4)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_statically_quantized_model_loses_filters_with_their_scales(tmp_path: Path, per_channel: bool) -> None:
    onnx.save(conv_net_proto(batch=1), tmp_path / "float.onnx")
    quantization.quantize_static(
        tmp_path / "float.onnx", tmp_path / "int8.onnx", Calibration(), per_channel=per_channel
    )
    model = canonical(onnx.load(tmp_path / "int8.onnx"))
    frozen = [reason for reason in groups_of(model).values() if reason and "output" not in reason]
    assert frozen == []
    assert difference_after_pruning(model, {"x": weight(1, 3, 8, 8)}) < 1e-5


# --- numbers in shapes ----------------------------------------------------------------------------------------


def shared_shape_model(second: list[Any], *, width: int = 16) -> CanonicalModel:
    """Two layers, each added to zeros; one computed shape says how wide both are."""
    nodes = [
        helper.make_node("Shape", ["x"], ["batch"], start=0, end=1),
        helper.make_node("Concat", ["batch", "width"], ["shape"], axis=0),
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"], name="zeros"),
        helper.make_node("MatMul", ["x", "a"], ["h"], name="first"),
        helper.make_node("Add", ["h", "zeros"], ["s"]),
        *second,
    ]
    weights = {"width": np.array([width]), "a": weight(8, 16), "b": weight(16, 16), "c": weight(16, 4)}
    return canonical(proto_of(nodes, inputs={"x": ["N", 8]}, outputs={"y": None}, weights=weights))


def test_two_layers_whose_width_is_one_number_lose_the_same_channels() -> None:
    model = shared_shape_model(
        [
            helper.make_node("MatMul", ["s", "b"], ["t"], name="second"),
            helper.make_node("ConstantOfShape", ["shape"], ["more"], name="more"),
            helper.make_node("Add", ["t", "more"], ["u"]),
            helper.make_node("MatMul", ["u", "c"], ["y"], name="last"),
        ]
    )
    shared = next(group for group in analyze_channels(model).groups if group.id == "a[1]")
    assert set(shared.layers) == {"first", "second"}
    assert difference_after_pruning(model, {"x": weight(2, 8)}) < 1e-5


def test_a_number_that_fixed_data_have_as_well_stays_with_its_channels() -> None:
    model = shared_shape_model(
        [
            helper.make_node("MatMul", ["s", "c"], ["v"], name="last"),
            helper.make_node("Cast", ["shape"], ["numbers"], name="numbers", to=TensorProto.FLOAT),
            helper.make_node("ReduceSum", ["numbers"], ["sum"], keepdims=0),
            helper.make_node("Add", ["v", "sum"], ["y"]),
        ]
    )
    assert groups_of(model)["a[1]"] == "its number stands in 'width', which is also read by 'numbers' (Cast)"


# --- tied weights ---------------------------------------------------------------------------------------------


def tied_proto() -> onnx.ModelProto:
    """The same two matrices twice, one after the other; all biases are equal by accident."""
    nodes = []
    previous = "x"
    for step in range(2):
        nodes += [
            helper.make_node("MatMul", [previous, "up"], [f"u{step}"], name=f"up{step}"),
            helper.make_node("Add", [f"u{step}", "zeros"], [f"b{step}"]),
            helper.make_node("Relu", [f"b{step}"], [f"r{step}"]),
            helper.make_node("MatMul", [f"r{step}", "down"], [f"d{step}"], name=f"down{step}"),
        ]
        previous = f"d{step}"
    nodes.append(helper.make_node("MatMul", [previous, "out"], ["y"], name="out"))
    weights = {"up": weight(64, 512), "down": weight(512, 64), "zeros": np.zeros(512, np.float32), "out": weight(64, 4)}
    return proto_of(nodes, inputs={"x": ["N", 64]}, outputs={"y": None}, weights=weights)


def test_a_layer_that_is_used_twice_stays_one_weight_in_the_file(tmp_path: Path) -> None:
    model = canonical(tied_proto())
    save_model(model, tmp_path / "before.onnx")
    classes = analyze_channels(model)
    hidden = next(group for group in classes.groups if group.id == "up[1]")
    keeps = np.ones(classes.num_classes, dtype=np.bool_)
    keeps[hidden.classes[::2]] = False
    remove_channels(model, classes, keeps)
    save_model(model, tmp_path / "after.onnx")
    assert hidden.layers == ("up0", "up1")
    sizes = [(tmp_path / name).stat().st_size for name in ("after.onnx", "before.onnx")]
    assert sizes[0] < 0.6 * sizes[1]


def test_pruning_a_layer_that_is_used_twice_is_exact() -> None:
    assert difference_after_pruning(canonical(tied_proto()), {"x": weight(2, 64) / 8}) < 1e-4


def test_constants_of_one_value_that_an_exporter_merged_are_not_tied() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], name="first"),
        helper.make_node("Mul", ["h", "ones"], ["s"]),
        helper.make_node("MatMul", ["s", "b"], ["t"], name="second"),
        helper.make_node("Mul", ["t", "ones"], ["u"]),
        helper.make_node("MatMul", ["u", "c"], ["y"], name="last"),
    ]
    weights = {"a": weight(8, 16), "b": weight(16, 16), "c": weight(16, 4), "ones": np.ones((1, 16), np.float32)}
    model = canonical(proto_of(nodes, inputs={"x": ["N", 8]}, outputs={"y": None}, weights=weights))
    layers = {group.id: group.layers for group in analyze_channels(model).groups}
    assert (layers["a[1]"], layers["b[1]"]) == (("first",), ("second",))
