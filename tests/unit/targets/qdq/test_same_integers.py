"""Fed with the same integers, every operator gives the same integers in all four spellings, up to one step."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from onnxprune.contracts import CanonicalModel, ModelState, PassContext, QuantizationPlan
from onnxprune.convert.request import SourceRequest
from onnxprune.convert.source import open_source
from onnxprune.passes.harness import run_pass
from onnxprune.passes.simplify import SimplifyConfig, SimplifyPass
from onnxprune.targets.qdq import find_spelling, place, place_tflite
from tests.integer_reference import Case, Integers, Rounding, reference
from tests.integer_units import Unit, run_unit, units_of
from tests.quantization import ArraySource, everything_integer, normal_batches, plan_for
from tests.tflite_units import tflite_kernel
from tests.unit.convert.conftest import convert_here as convert_here  # noqa: PLC0414 - fixtures
from tests.unit.convert.conftest import tf as tf  # noqa: PLC0414
from tests.unit.targets.qdq.test_operators import (
    CASES,
    FLAT_CASES,
    INPUT_SHAPE,
    FlatCase,
    OperatorCase,
    make,
    sandwich,
)
from tests.unit.targets.qdq.test_qoperator import flat_model

DIGITS = Path(__file__).resolve().parents[4] / "examples" / "digits" / "models"

ONLY_IN_TFLITE = [
    OperatorCase(id="Tanh", nodes=[make("Tanh", ["a"])], kernel=""),
    OperatorCase(id="Softmax", nodes=[make("Softmax", ["a"], axis=1)], kernel=""),
]


def in_numpy(unit: Unit, plan: QuantizationPlan, spelling: str, rounding: Rounding) -> Integers | None:
    return reference(as_case(unit, plan, spelling, rounding))


def as_case(unit: Unit, plan: QuantizationPlan, spelling: str, rounding: Rounding) -> Case:
    return Case(item=unit.item, plan=plan, spelling=find_spelling(spelling), integers=unit.integers, rounding=rounding)


def results_of(unit: Unit, plan: QuantizationPlan) -> dict[str, Integers]:
    """The unit's first output, by who computed it."""
    found = {
        "x86-vnni": run_unit(unit, plan, "x86-vnni")[0],
        "arm64": run_unit(unit, plan, "arm64")[0],
        # The meaning of the QDQ graph, in which every operator stands for itself.
        "tflite": run_unit(unit, plan, "tflite", optimized=False)[0],
    }
    for rounding in Rounding:
        computed = in_numpy(unit, plan, "tflite", rounding)
        if computed is not None:
            found[f"NumPy, {rounding.value}"] = computed
    return found


def assert_same_integers(unit: Unit, plan: QuantizationPlan) -> None:
    found = results_of(unit, plan)
    base = found.pop("x86-vnni")
    for name, other in found.items():
        assert np.abs(other - base).max(initial=0) <= 1, f"{unit.item.node.op_type} '{unit.name}' in {name}"
    # The weights of "x86" may have wider scales, which is its stated exception: compared with those.
    exact = in_numpy(unit, plan, "x86", Rounding.REAL)
    if exact is None:
        exact = run_unit(unit, plan, "x86", optimized=False)[0]
    assert np.abs(run_unit(unit, plan, "x86")[0] - exact).max(initial=0) <= 1, f"'{unit.name}' in x86"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_operator_between_convolutions_gives_the_same_integers_in_four_spellings(case: OperatorCase) -> None:
    model = sandwich(case)
    source = normal_batches(INPUT_SHAPE)
    plan = plan_for(model, source)

    units = list(units_of(model, plan, everything_integer(model, plan), source.batches[0]))

    assert len(units) >= 3
    for unit in units:
        assert_same_integers(unit, plan)


@pytest.mark.parametrize("case", FLAT_CASES, ids=lambda case: case.id)
def test_layer_gives_the_same_integers_in_four_spellings(case: FlatCase) -> None:
    model = flat_model(case)
    source = normal_batches(case.shape)
    plan = plan_for(model, source)

    for unit in units_of(model, plan, everything_integer(model, plan), source.batches[0]):
        assert_same_integers(unit, plan)


@dataclass(frozen=True, kw_only=True)
class RealModel:
    """A model of the demo (`name` alone) or of MLPerf Tiny (in the shared data), and how many integer nodes it has."""

    name: str
    low: float
    high: float
    at_least: int

    def path(self, shared_data: Path) -> Path:
        return DIGITS / self.name if "/" not in self.name else shared_data / self.name


REAL_MODELS = [
    RealModel(name="detector.onnx", low=0, high=1, at_least=90),
    RealModel(name="classifier.keras", low=0, high=1, at_least=40),
    RealModel(name="mlperf_tiny_models/resnet8_cifar10_float.tflite", low=0, high=255, at_least=20),
    RealModel(name="mlperf_tiny_models/vww_96_float.tflite", low=0, high=1, at_least=50),
    RealModel(name="mlperf_tiny_models/kws_savedmodel", low=-80, high=25, at_least=20),
]


@pytest.mark.slow
@pytest.mark.usefixtures("tf", "convert_here")
@pytest.mark.parametrize("real", REAL_MODELS, ids=lambda real: real.name.rpartition("/")[2])
def test_every_integer_node_of_a_real_network_gives_the_same_integers_in_four_spellings(
    real: RealModel, request: pytest.FixtureRequest
) -> None:
    shared = request.getfixturevalue("shared_data") if "/" in real.name else Path()
    model = prepared(real.path(shared))
    source = uniform_batches(model, real)
    plan = plan_for(model, source)
    placement = place(model, plan, "x86-vnni")

    units = list(units_of(model, plan, placement, source.batches[0]))

    assert len(placement.integer_nodes) >= real.at_least
    for unit in units:
        assert_same_integers(unit, plan)


def prepared(path: Path) -> CanonicalModel:
    """Converted and simplified."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = open_source(SourceRequest(source=str(path))).model
    return run_pass(SimplifyPass(SimplifyConfig()), ModelState(model=model), PassContext()).state.model


def uniform_batches(model: CanonicalModel, real: RealModel) -> ArraySource:
    (image,) = model.graph.inputs
    assert image.shape is not None
    shape = [dim if isinstance(dim, int) else 1 for dim in image.shape]
    rng = np.random.default_rng(0)
    arrays = (rng.uniform(real.low, real.high, shape).astype(np.float32) for _ in range(3))
    return ArraySource(tuple({image.name or "": array} for array in arrays))


def kernel_units() -> Iterator[tuple[str, Unit, QuantizationPlan]]:
    models = [(case.id, sandwich(case), INPUT_SHAPE) for case in (*CASES, *ONLY_IN_TFLITE)]
    models += [(case.id, flat_model(case), case.shape) for case in FLAT_CASES]
    for name, model, shape in models:
        source = normal_batches(shape)
        plan = plan_for(model, source)
        for unit in units_of(model, plan, place_tflite(model, plan), source.batches[0]):
            # The frame around each case is the same.
            if unit.name not in ("Conv_a", "Conv_y") or name == "Conv with Relu":
                yield name, unit, plan


def test_tflites_own_kernels_give_these_integers() -> None:
    """TFLite's reference kernels are what NumPy says to the bit; those that phones run differ by one step at most."""
    seen: set[str] = set()
    for name, unit, plan in kernel_units():
        case = as_case(unit, plan, "tflite", Rounding.TFLITE)
        exact = tflite_kernel(case, is_reference=True)
        if exact is None:
            continue
        op_type = unit.item.node.op_type
        label = f"{op_type} of '{name}'"
        in_python = reference(case)
        if in_python is not None and op_type != "Gemm":
            np.testing.assert_array_equal(in_python, exact, err_msg=label)
        fast = tflite_kernel(case, is_reference=False)
        assert fast is not None
        for other in (run_unit(unit, plan, "tflite", optimized=False)[0], exact):
            assert np.abs(fast - other).max() <= 1, label
        if op_type != "Tanh":
            assert np.abs(run_unit(unit, plan, "x86-vnni")[0] - exact).max() <= 1, label
        seen.add(op_type)

    assert seen >= {
        "Add", "AveragePool", "Concat", "Conv", "Gemm", "GlobalAveragePool", "HardSwish", "LeakyRelu", "MaxPool",
        "Mul", "ReduceMean", "Relu", "Sigmoid", "Softmax", "Sum", "Tanh",
    }  # fmt: skip


def test_a_wrong_scale_is_found() -> None:
    """The comparison itself: were a weight's scale 3 % off, an operator would differ by more than one step."""
    model = sandwich(CASES[0])
    source = normal_batches(INPUT_SHAPE)
    plan = plan_for(model, source)
    unit = next(iter(units_of(model, plan, everything_integer(model, plan), source.batches[0])))
    right = in_numpy(unit, plan, "tflite", Rounding.REAL)
    case = as_case(unit, plan, "tflite", Rounding.REAL)
    name = unit.item.outputs[0].name or ""
    found = plan.activations[name]
    wrong_plan = dataclasses.replace(
        plan, activations={**plan.activations, name: dataclasses.replace(found, scale=found.scale * 1.03)}
    )
    wrong = reference(dataclasses.replace(case, plan=wrong_plan))

    assert right is not None
    assert wrong is not None
    assert np.abs(right - wrong).max() > 1
