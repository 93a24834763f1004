"""GELU as five operators, found in all orders, and written as one behind integers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from onnxprune.contracts import CanonicalModel
from onnxprune.targets.qdq import place, spell
from onnxprune.targets.qdq.gelu import find_gelu, is_bias_of_gelu
from tests.builders import canonical, proto_of
from tests.quantization import kernels, normal_batches, plan_for, run, signal_to_noise_db

RNG = np.random.default_rng(2)
NUMBERS = {
    "root": np.float32(math.sqrt(2)),
    "reciprocal": np.float32(math.sqrt(0.5)),
    "one": np.float32(1),
    "half": np.float32(0.5),
    "two": np.float32(2),
    "half_precision": np.float32(np.float16(math.sqrt(2))),
}

Step = tuple[str, Sequence[str], str]
START: list[Step] = [("Div", ["a", "root"], "d"), ("Erf", ["d"], "e"), ("Add", ["e", "one"], "p")]
WRITTEN: dict[str, list[Step]] = {
    "PyTorch": [*START, ("Mul", ["a", "p"], "q"), ("Mul", ["q", "half"], "g")],
    "half last but one": [*START, ("Mul", ["p", "half"], "q"), ("Mul", ["a", "q"], "g")],
    "half of x first": [("Mul", ["a", "half"], "h"), *START, ("Mul", ["h", "p"], "g")],
    "x over two": [("Div", ["a", "two"], "h"), *START, ("Mul", ["p", "h"], "g")],
    "reciprocal": [
        ("Mul", ["reciprocal", "a"], "d"), *START[1:], ("Mul", ["a", "p"], "q"), ("Mul", ["half", "q"], "g")
    ],
    "constants of half precision": [
        ("Div", ["a", "half_precision"], "d"), *START[1:], ("Mul", ["a", "p"], "q"), ("Mul", ["q", "half"], "g")
    ],
}  # fmt: skip
OTHER: dict[str, list[Step]] = {
    "another factor": [("Div", ["a", "two"], "d"), *START[1:], ("Mul", ["a", "p"], "q"), ("Mul", ["q", "half"], "g")],
    "another summand": [
        *START[:2], ("Add", ["e", "two"], "p"), ("Mul", ["a", "p"], "q"), ("Mul", ["q", "half"], "g")
    ],
    "x squared": [*START, ("Mul", ["a", "p"], "q"), ("Mul", ["q", "a"], "g")],
    "no half": [*START, ("Mul", ["a", "p"], "g")],
    "tensor that is read twice": [
        *START, ("Mul", ["a", "p"], "q"), ("Mul", ["q", "half"], "r"), ("Add", ["r", "p"], "g")
    ],
}  # fmt: skip


def model_with(steps: Sequence[Step], *, bias: bool = False, opset: int = 20) -> CanonicalModel:
    """x -> MatMul (-> Add) -> "a" -> `steps` -> "g" -> MatMul -> y."""
    first = [helper.make_node("MatMul", ["x", "w1"], ["m" if bias else "a"], name="first")]
    if bias:
        first.append(helper.make_node("Add", ["m", "bias"], ["a"], name="bias_add"))
    nodes = [
        *first,
        *(helper.make_node(op_type, inputs, [output], name=output) for op_type, inputs, output in steps),
        helper.make_node("MatMul", ["g", "w2"], ["y"], name="last"),
    ]
    used = {name for item in nodes for name in item.input}
    weights = {
        "w1": (RNG.standard_normal((16, 32)) * 0.3).astype(np.float32),
        "w2": (RNG.standard_normal((32, 8)) * 0.3).astype(np.float32),
        "bias": RNG.standard_normal(32).astype(np.float32),
        **NUMBERS,
    }
    return canonical(
        proto_of(
            nodes,
            inputs={"x": (1, 6, 16)},
            outputs={"y": [None] * 3},
            weights={name: array for name, array in weights.items() if name in used},
            opset=opset,
        )
    )


def erf_of(model: CanonicalModel) -> onnx.NodeProto:
    (found,) = (node for node in model.graph if node.op_type == "Erf")
    return found


@pytest.mark.parametrize("steps", WRITTEN.values(), ids=WRITTEN)
def test_gelu_is_found_however_it_is_written(steps: list[Step]) -> None:
    pattern = find_gelu(erf_of(model_with(steps)))

    assert pattern is not None
    assert (pattern.data.name, pattern.output.name) == ("a", "g")
    assert {node.name for node in pattern.nodes} == {output for _, _, output in steps}


@pytest.mark.parametrize("steps", OTHER.values(), ids=OTHER)
def test_what_is_not_quite_gelu_is_left_alone(steps: list[Step]) -> None:
    assert find_gelu(erf_of(model_with(steps))) is None


@pytest.mark.parametrize(("opset", "domain"), [(18, "com.microsoft"), (20, "")])
@pytest.mark.parametrize("steps", WRITTEN.values(), ids=WRITTEN)
def test_gelu_between_integer_layers_is_one_float_operator(
    steps: list[Step], opset: int, domain: str, tmp_path: Path
) -> None:
    model = model_with(steps, opset=opset)
    source = normal_batches((1, 6, 16))
    plan = plan_for(model, source)
    spelled = spell(model, plan, place(model, plan, "x86-vnni"), "x86-vnni")

    (fused,) = (node for node in spelled.graph if node.op_type == "Gelu")
    assert fused.domain == domain
    assert (fused.outputs[0].name, "Erf" in kernels(spelled, tmp_path)) == ("g", False)
    feeds = source.batches[0]
    # Three tensors and two weights of 8 bits; a missing factor would end below 10 dB.
    assert signal_to_noise_db(run(model, feeds)[0], run(spelled, feeds)[0]) > 25


def test_float_gelu_is_not_touched() -> None:
    model = model_with(WRITTEN["PyTorch"])
    plan = plan_for(model, normal_batches((1, 6, 16)), exclude=("first",))

    spelled = spell(model, plan, place(model, plan, "x86-vnni"), "x86-vnni")

    assert [node.op_type for node in spelled.graph if node.op_type in ("Erf", "Gelu")] == ["Erf"]


def test_bias_before_gelu_stays_float_so_that_onnxruntime_takes_it_in(tmp_path: Path) -> None:
    model = model_with(WRITTEN["PyTorch"], bias=True)
    plan = plan_for(model, normal_batches((1, 6, 16)))
    placement = place(model, plan, "x86-vnni")

    assert placement.integer_nodes == ("first", "last")
    assert kernels(spell(model, plan, placement, "x86-vnni"), tmp_path)["BiasGelu"] == 1


def test_only_an_add_that_nothing_but_gelu_reads_is_its_bias() -> None:
    steps = WRITTEN["PyTorch"]
    (alone,) = (node for node in model_with(steps, bias=True).graph if node.name == "bias_add")
    residual = [*steps[:-1], ("Mul", ["q", "half"], "r"), ("Add", ["r", "a"], "g")]
    (shared,) = (node for node in model_with(residual, bias=True).graph if node.name == "bias_add")

    assert (is_bias_of_gelu(alone), is_bias_of_gelu(shared)) == (True, False)
