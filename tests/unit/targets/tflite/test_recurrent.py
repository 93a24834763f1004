"""LSTM, GRU and RNN in LiteRT against ONNX Runtime, unrolled and as a WHILE."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

pytest.importorskip("ai_edge_litert")

from onnxprune.errors import TargetError
from onnxprune.targets.tflite.ops import steps
from tests.tflite_runs import assert_same_as_ort, emitted, kinds, one_node

# Five steps, each with sums of seven products and two saturating functions.
TOLERANCES = {"relative": 1e-4, "absolute": 1e-5}
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
STEPS, BATCH, INPUTS, HIDDEN = 5, 2, 3, 4
Array = npt.NDArray[Any]


def noise(*shape: int) -> Array:
    return (0.5 * np.random.default_rng(len(shape)).standard_normal(shape)).astype(np.float32)


def layer(
    op_type: str,
    *,
    has_constants: bool = True,
    lengths: list[int] | None = None,
    has_state: bool = False,
    has_peepholes: bool = False,
    dynamic: tuple[int, ...] = (),
    outputs: tuple[str, ...] = ("y", "last", "memory"),
    **attributes: Any,
) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A layer with all outputs, and what it is fed with."""
    directions = 2 if attributes.get("direction") == "bidirectional" else 1
    rows = GATES[op_type] * HIDDEN
    weights = {
        "W": noise(directions, rows, INPUTS),
        "R": noise(directions, rows, HIDDEN),
        "B": noise(directions, 2 * rows),
    }
    names = ["x", "W", "R", "B", "", "", "", ""]
    feeds: dict[str, Array] = {"x": noise(STEPS, BATCH, INPUTS)}
    if lengths is not None:
        weights["lengths"], names[4] = np.array(lengths, np.int32), "lengths"
    if has_peepholes:
        weights["P"], names[7] = noise(directions, 3 * HIDDEN), "P"
    if has_state:
        feeds["h"], names[5] = noise(directions, BATCH, HIDDEN), "h"
        if op_type == "LSTM":
            feeds["c"], names[6] = noise(directions, BATCH, HIDDEN)[..., ::-1].copy(), "c"
    while not names[-1]:
        names.pop()
    if not has_constants:
        feeds.update(weights)
    proto = one_node(
        op_type,
        feeds,
        constants=weights if has_constants else {},
        inputs=names,
        outputs=outputs if op_type == "LSTM" else outputs[:2],
        dynamic={"x": dynamic, "h": [1] if 1 in dynamic else [], "c": [1] if 1 in dynamic else []},
        opset=22,
        hidden_size=HIDDEN,
        **attributes,
    )
    return proto, feeds


@pytest.fixture(params=["unrolled", "loop"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Steps one after the other, or a WHILE for the same layer."""
    if request.param == "loop":
        monkeypatch.setattr(steps, "MAX_UNROLLED_STEPS", 1)
    return str(request.param)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("op_type", GATES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"has_constants": False},
        {"lengths": [5, 3]},
        {"lengths": [4, 2], "has_constants": False, "has_state": True},
        {"dynamic": (1,), "has_state": True},
    ],
    ids=["constant", "fed", "lengths", "fed-lengths", "dynamic-batch"],
)
def test_layer_gives_what_onnx_runtime_gives_in_every_call(
    op_type: str, direction: str, options: dict[str, Any], form: str
) -> None:
    proto, feeds = layer(op_type, direction=direction, **options)
    model = assert_same_as_ort(proto, feeds, runs=2, **TOLERANCES)
    assert ("WHILE" in kinds(model)) == (form == "loop")


@pytest.mark.parametrize(
    ("op_type", "options"),
    [
        ("LSTM", {"has_peepholes": True, "has_state": True}),
        ("LSTM", {"input_forget": 1, "has_state": True}),
        ("LSTM", {"clip": 0.3}),
        ("LSTM", {"activations": ["HardSigmoid", "Softsign", "Elu"]}),
        (
            "LSTM",
            {"activations": ["Sigmoid", "ScaledTanh", "Relu"], "activation_alpha": [0.7], "activation_beta": [0.6]},
        ),
        ("GRU", {"linear_before_reset": 1}),
        ("GRU", {"linear_before_reset": 1, "has_state": True, "direction": "bidirectional", "has_constants": False}),
        ("GRU", {"linear_before_reset": 1, "has_state": True, "clip": 0.2}),
        ("GRU", {"activations": ["HardSigmoid", "Softplus"], "activation_alpha": [0.3], "activation_beta": [0.4]}),
        ("RNN", {"activations": ["LeakyRelu"], "activation_alpha": [0.2]}),
        ("RNN", {"activations": ["Relu"]}),
        ("RNN", {"activations": ["ThresholdedRelu"], "activation_alpha": [0.1]}),
        ("RNN", {"activations": ["Affine"], "activation_alpha": [0.5], "activation_beta": [0.1]}),
        ("RNN", {"activations": ["Elu"], "activation_alpha": [0.3]}),
    ],
    ids=str,
)
def test_attributes_of_cells(op_type: str, options: dict[str, Any], form: str) -> None:
    del form
    proto, feeds = layer(op_type, **options)
    assert_same_as_ort(proto, feeds, **TOLERANCES)


@pytest.mark.parametrize("op_type", GATES)
def test_number_of_steps_may_be_open(op_type: str) -> None:
    proto, feeds = layer(op_type, dynamic=(0, 1))
    assert "WHILE" in kinds(assert_same_as_ort(proto, feeds, **TOLERANCES))


def test_large_recurrent_matrix_is_not_copied_for_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    proto, feeds = layer("LSTM")
    matrix_bytes = 4 * GATES["LSTM"] * HIDDEN * HIDDEN
    monkeypatch.setattr(steps, "MAX_COPIED_BYTES", STEPS * matrix_bytes)
    assert "WHILE" not in kinds(emitted(proto))
    monkeypatch.setattr(steps, "MAX_COPIED_BYTES", STEPS * matrix_bytes - 1)
    assert "WHILE" in kinds(assert_same_as_ort(proto, feeds, **TOLERANCES))


def test_loop_keeps_no_outputs_that_nobody_reads(form: str) -> None:
    proto, feeds = layer("LSTM", outputs=("", "last", "memory"))
    model = assert_same_as_ort(proto, feeds, **TOLERANCES)
    everything = [operator.kind for graph in model.graphs for operator in graph.operators]
    assert "PACK" not in everything
    assert "DYNAMIC_UPDATE_SLICE" not in everything
    assert ("WHILE" in everything) == (form == "loop")


def test_initial_state_of_zeros_costs_nothing() -> None:
    proto, feeds = layer("LSTM", has_state=True)
    zeros = {name: np.zeros_like(feeds[name]) for name in ("h", "c")}
    constant = onnx.ModelProto()
    constant.CopyFrom(proto)
    constant.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in zeros.items())
    del constant.graph.input[1:]
    without, _ = layer("LSTM")
    assert kinds(emitted(constant)) == kinds(emitted(without))


def test_activation_about_whose_default_runtimes_differ_is_refused() -> None:
    with pytest.raises(TargetError, match="'affine' has no alpha, and runtimes differ"):
        emitted(layer("RNN", activations=["Affine"])[0])
