"""Channel rules against ONNX's official one-node cases.

Every axis of every input gets labels, the node's rule runs, and a random choice of what it did not freeze is removed.
The node on cut inputs must then compute the cut outputs of the node on whole inputs, with zeros where it sums over
removed channels. So every rule is held against the definition of its operator, for all its attributes and layouts.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from onnx import defs, numpy_helper

from onnxprune.ops.channels import CHANNELS, Labelling, label_node
from onnxprune.ops.channels.elements import Dimension
from onnxprune.ops.channels.grids import settle_grids
from onnxprune.passes.prune.analysis import ChannelClasses
from onnxprune.passes.prune.oracle import largest_difference, mask_channels
from onnxprune.passes.prune.surgery import remove_channels
from onnxprune.runtime.sessions import ort_runner_from_model

OPSET = 24
SEEDS = (0, 1)
# float16 cases: 11 bits, sums of a few terms. Everything else is float32 or wider.
TOLERANCE_HALF, TOLERANCE = 1e-2, 1e-5

# Draws numbers, which differ from run to run.
RANDOM = {"Dropout"}


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    proto: onnx.ModelProto
    inputs: dict[str, npt.NDArray[Any]]


@cache
def cases() -> tuple[Case, ...]:
    """One-node cases of operators that opset 24 has, with tensors only and without control flow.

    Where a newer opset changed an operator, ONNX Runtime refuses the cases that need the change (`runs`).
    """
    from onnx.backend.test.case.node import collect_testcases

    found = []
    with warnings.catch_warnings():
        # ONNX's own case files overflow on purpose while they are made.
        warnings.simplefilter("ignore")
        collected = collect_testcases(None)
    for case in collected:
        proto = case.model
        if proto is None or len(proto.graph.node) != 1 or case.data_sets is None:
            continue
        node = proto.graph.node[0]
        if node.domain or any(attribute.type == onnx.AttributeProto.GRAPH for attribute in node.attribute):
            continue
        if first_versions().get(node.op_type, OPSET + 1) > OPSET:
            continue
        arrays = case.data_sets[0][0]
        if not all(isinstance(array, np.ndarray) for array in arrays) or node.op_type in RANDOM:
            continue
        small = onnx.ModelProto()
        small.CopyFrom(proto)
        small.ir_version = 10
        del small.opset_import[:]
        small.opset_import.append(onnx.helper.make_opsetid("", OPSET))
        names = [value.name for value in proto.graph.input]
        found.append(Case(case.name, small, dict(zip(names, arrays, strict=True))))
    return tuple(found)


@cache
def first_versions() -> dict[str, int]:
    """The opset in which each operator of ONNX came."""
    first: dict[str, int] = {}
    for schema in defs.get_all_schemas_with_history():
        if schema.domain == "":
            first[schema.name] = min(schema.since_version, first.get(schema.name, schema.since_version))
    return first


def build(case: Case, *, with_weights: bool) -> tuple[ir.Model, Labelling, dict[str, npt.NDArray[Any]]]:
    """The model with its settings as constants (and its weights too, if asked), the labelling, and what is fed."""
    proto = onnx.ModelProto()
    proto.CopyFrom(case.proto)
    first = next((name for name in proto.graph.node[0].input if name), "")
    fed: dict[str, npt.NDArray[Any]] = {}
    for value in list(proto.graph.input):
        array = case.inputs[value.name]
        is_setting = array.dtype.kind in "iu" and array.ndim <= 1
        is_weight = with_weights and value.name != first and array.dtype.kind in "fiub"
        if is_setting or array.ndim == 0 or is_weight:
            proto.graph.initializer.append(numpy_helper.from_array(array, value.name))
            proto.graph.input.remove(value)
        else:
            fed[value.name] = array
    model = ir.from_proto(proto)
    for output in model.graph.outputs:
        # A declared shape would contradict the cut one.
        output.shape = None
    labelling = Labelling()
    for value in model.graph.inputs:
        shape = fed[value.name or ""].shape
        value.shape = ir.Shape(shape)
        labelling.values[value] = tuple(labelling.space.fresh(size) if size > 1 else None for size in shape)
    out_shapes = run_shapes(model, fed)
    for output in model.graph.outputs:
        output.shape = ir.Shape(out_shapes[output.name or ""])
    label_node(labelling, model.graph[0])
    for output in model.graph.outputs:
        for element in labelling.elements.get(output, ()):
            if isinstance(element, Dimension) and element.labels is not None:
                labelling.space.freeze(element.labels, "its number is an output")
    settle_grids(labelling.space, labelling.grids, labelling.policy.units)
    return model, labelling, fed


def run_shapes(model: ir.Model, fed: dict[str, npt.NDArray[Any]]) -> dict[str, tuple[int, ...]]:
    outputs = ort_runner_from_model(model, optimization="disabled").run(fed)
    return {name: array.shape for name, array in outputs.items()}


def choose(labelling: Labelling, rng: np.random.Generator) -> tuple[ChannelClasses, npt.NDArray[np.bool_]]:
    """A random choice of classes that empties no axis."""
    class_of = labelling.space.class_of()
    number = int(class_of.max()) + 1 if len(class_of) else 0
    reasons = labelling.space.frozen_reasons(class_of, number)
    keeps = np.array([reason is not None for reason in reasons], dtype=np.bool_) | (rng.random(number) < 0.5)
    axes = [a for labels in labelling.values.values() for a in labels if a is not None]
    axes += [a for labels in labelling.weights.values() for a in labels.values()]
    for axis in axes:
        if len(axis) and not keeps[class_of[axis]].any():
            keeps[class_of[axis[0]]] = True
    classes = ChannelClasses(
        labelling=labelling, num_classes=number, class_of_label=class_of, groups=(), widths=(), inner_axes=()
    )
    return classes, keeps


def cut(array: npt.NDArray[Any], labels: tuple[Any, ...], stays: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
    for axis, on_axis in enumerate(labels):
        if on_axis is not None:
            array = np.compress(stays[on_axis], array, axis=axis)
    return array


def difference(case: Case, *, with_weights: bool, seed: int) -> tuple[float, bool]:
    """How far the cut node is from the cut outputs of the whole node, and whether anything was cut."""
    whole, labelling, fed = build(case, with_weights=with_weights)
    classes, keeps = choose(labelling, np.random.default_rng(seed))
    stays = keeps[classes.class_of_label]
    if keeps.all():
        return 0.0, False
    out_labels = {value.name: labelling.values.get(value, ()) for value in whole.graph.outputs}
    in_labels = {value.name: labelling.values[value] for value in whole.graph.inputs}
    mask_channels(whole, labelling, stays)
    expected = ort_runner_from_model(whole, optimization="disabled").run(fed)
    expected = {name: cut(array, out_labels[name], stays) for name, array in expected.items()}

    pruned, own_labelling, fed = build(case, with_weights=with_weights)
    own_classes, own_keeps = choose(own_labelling, np.random.default_rng(seed))
    fed = {name: cut(array, in_labels[name], stays) for name, array in fed.items()}
    for value in pruned.graph.inputs:
        value.shape = ir.Shape(fed[value.name or ""].shape)
    remove_channels(pruned, own_classes, own_keeps)
    actual = ort_runner_from_model(pruned, optimization="disabled").run(fed)
    return largest_difference(expected, actual), True


def runs(case: Case) -> bool:
    try:
        build(case, with_weights=False)
    except Exception:  # noqa: BLE001 - ONNX Runtime has no kernel for some types of some operators
        return False
    return True


@cache
def cases_by_operator() -> dict[str, list[Case]]:
    grouped: dict[str, list[Case]] = {}
    for case in cases():
        grouped.setdefault(case.proto.graph.node[0].op_type, []).append(case)
    return grouped


RULED = sorted({key.op_type for key in CHANNELS.keys() if not key.domain})  # noqa: SIM118 - no dictionary


@dataclass(frozen=True, slots=True)
class Outcome:
    where: str
    difference: float
    was_cut: bool
    tolerance: float


@cache
def outcomes(op_type: str) -> list[Outcome]:
    """What became of every case of an operator that ONNX Runtime has a kernel for."""
    found = []
    for case in cases_by_operator().get(op_type, []):
        if not runs(case):
            continue
        halves = any(array.dtype == np.float16 for array in case.inputs.values())
        for with_weights in (False, True):
            for seed in SEEDS:
                far, was_cut = difference(case, with_weights=with_weights, seed=seed)
                where = f"{case.name}, with_weights={with_weights}, seed={seed}"
                found.append(Outcome(where, far, was_cut, TOLERANCE_HALF if halves else TOLERANCE))
    return found


@pytest.mark.parametrize("op_type", RULED)
def test_rule_agrees_with_the_definition_of_its_operator(op_type: str) -> None:
    found = outcomes(op_type)
    if not found:
        pytest.skip("ONNX brings no case that ONNX Runtime runs")
    assert [outcome for outcome in found if not outcome.difference <= outcome.tolerance] == []


# Rules whose official cases leave nothing to remove, with the reason.
NOTHING_TO_CUT = {
    "BitShift": "the cases are integer vectors, which stand for shapes here",
    "DeformConv": "the cases have one channel; tests/property holds it against the oracle",
    "EyeLike": "the ones follow the places on both axes",
    "GridSample": "the cases have one channel",
    "NonZero": "the result counts places on all axes",
    "ReverseSequence": "the cases have a step and a batch axis only",
    "Unique": "the result counts places on all axes",
    "RoiAlign": "the cases have one channel",
    "Resize": "the cases have one channel; tests/property holds it against the oracle",
    "Conv": "the cases have one channel; tests/property holds convolutions against the oracle",
    "Shape": "its input's channels are only counted, and its output is no channel axis",
}


@pytest.mark.parametrize("op_type", RULED)
def test_rule_lets_channels_go_in_at_least_one_case(op_type: str) -> None:
    found = outcomes(op_type)
    if not found or op_type in NOTHING_TO_CUT:
        pytest.skip(NOTHING_TO_CUT.get(op_type, "ONNX brings no case that ONNX Runtime runs"))
    assert any(outcome.was_cut for outcome in found)


def test_every_operator_without_a_rule_freezes_all_it_touches() -> None:
    seen = 0
    for op_type, group in cases_by_operator().items():
        if op_type in RULED:
            continue
        for case in group[:1]:
            if not runs(case):
                continue
            _, labelling, _ = build(case, with_weights=False)
            class_of = labelling.space.class_of()
            reasons = labelling.space.frozen_reasons(class_of, len(class_of))
            assert all(reason and "an operator without a channel rule" in reason for reason in reasons), case.name
            seen += 1
    assert seen > 15
