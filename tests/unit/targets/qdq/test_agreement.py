"""End to end: which share of the integers differs between two spellings."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxprune.contracts import CanonicalModel
from onnxprune.errors import UsageError
from onnxprune.targets.qdq import SpellingName, place, spell
from onnxprune.targets.qdq.agreement import agreement_of
from tests.builders import canonical, conv_net, proto_of
from tests.quantization import normal_batches, plan_for
from tests.unit.targets.qdq.test_operators import make, normal

SOURCE = normal_batches((1, 3, 8, 8))


def spelled_as(*spellings: SpellingName, model: CanonicalModel | None = None) -> list[ir.Model]:
    model = model or conv_net(batch=1)
    plan = plan_for(model, SOURCE)
    placement = place(model, plan, "x86-vnni")
    return [spell(model, plan, placement, spelling) for spelling in spellings]


def test_signed_and_unsigned_spellings_have_the_same_integers_in_every_tensor() -> None:
    found = agreement_of(*spelled_as("x86-vnni", "arm64"), SOURCE.batches)

    assert len(found) >= 6
    # Kernels of both types add in integers and rescale alike.
    assert max(tensor.largest_steps for tensor in found) <= 1
    assert [tensor.beyond_one_step_ratio for tensor in found] == [0.0] * len(found)
    assert found[0].num_elements == 8 * 3 * 8 * 8


def test_wider_weight_scales_show_up_behind_the_first_layer() -> None:
    found = agreement_of(*spelled_as("x86-vnni", "x86"), SOURCE.batches)

    first, *others = found
    assert (first.differing_ratio, first.largest_steps) == (0.0, 0)
    assert max(tensor.differing_ratio for tensor in others) > 0.05
    for tensor in others:
        assert 0.0 <= tensor.beyond_one_step_ratio <= tensor.differing_ratio


def test_tensor_before_the_output_is_marked_also_through_float_operators() -> None:
    proto = proto_of(
        [
            make("Conv", ["x", "w"], "a"),
            make("Conv", ["a", "v"], "c"),
            make("Erf", ["c"], "y"),
        ],
        inputs={"x": [1, 3, 8, 8]},
        outputs={"y": [1, 8, 8, 8]},
        weights={"w": normal(8, 3, 1, 1), "v": normal(8, 8, 1, 1)},
    )

    found = agreement_of(*spelled_as("x86-vnni", "arm64", model=canonical(proto)), SOURCE.batches[:1])

    assert [(tensor.name, tensor.is_at_output) for tensor in found] == [
        ("x_quantized", False),
        ("a_quantized", False),
        ("c_quantized", True),
    ]


def test_steps_are_counted_as_they_are() -> None:
    one, other = spelled_as("x86-vnni", "x86-vnni")
    # The input's zero point moves by three: so does every integer of the input that does not saturate.
    (quantizer,) = (node for node in other.graph if node.op_type == "QuantizeLinear" and node.inputs[0].name == "x")
    point = quantizer.inputs[2]
    assert point is not None
    assert point.const_value is not None
    moved = ir.tensor(np.array(point.const_value.numpy() + 3, dtype=np.uint8), name="moved")
    value = ir.Value(name="moved", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.UINT8), const_value=moved)
    other.graph.register_initializer(value)
    quantizer.replace_input_with(2, value)

    tensor = agreement_of(one, other, SOURCE.batches[:1])[0]

    assert tensor.largest_steps == 3
    assert tensor.beyond_one_step_ratio > 0.98


def test_comparison_without_a_sample_or_without_integers_is_refused() -> None:
    one, other = spelled_as("x86-vnni", "arm64")

    with pytest.raises(UsageError, match="no sample"):
        agreement_of(one, other, [])
    with pytest.raises(UsageError, match="no tensor of integers in common"):
        agreement_of(one, conv_net(batch=1), SOURCE.batches)
