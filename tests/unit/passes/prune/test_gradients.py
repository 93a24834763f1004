"""Gradient files: what fits a model, and what is refused before anything is ranked."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from onnx import helper

from onnxprune.contracts import CanonicalModel, ModelState, PassContext, PassOutcome
from onnxprune.errors import BadDataError, MissingExtraError, OnnxPruneError, UsageError
from onnxprune.passes.harness import run_pass
from onnxprune.passes.prune import PruneConfig, PrunePass
from tests.builders import canonical, proto_of

RunVerified = Callable[..., PassOutcome]
Arrays = dict[str, npt.NDArray[Any]]


def model() -> CanonicalModel:
    """x [N,3] -> Gemm 8x3 -> Relu -> MatMul 8x2 -> y; "first" may lose rows, "second" columns go with them."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Gemm", ["x", "first", "bias"], ["h"], name="gemm", transB=1),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "second"], ["y"], name="matmul"),
    ]
    weights = {
        "first": rng.standard_normal((8, 3)).astype(np.float32),
        "bias": rng.standard_normal(8).astype(np.float32),
        "second": rng.standard_normal((8, 2)).astype(np.float32),
    }
    return canonical(proto_of(nodes, inputs={"x": ["N", 3]}, outputs={"y": None}, weights=weights))


def gradients(**others: npt.NDArray[Any]) -> Arrays:
    return {"first": np.ones((8, 3), np.float32), "second": np.ones((8, 2), np.float32), **others}


def prune(file: Path, criterion: str = "taylor") -> PrunePass:
    settings: dict[str, Any] = {"ratio": 0.5, "min_channels": 1, "channel_multiple": 1}
    return PrunePass(PruneConfig(criterion=criterion, gradients=str(file), **settings))


def run(file: Path, criterion: str = "taylor") -> PassOutcome:
    return run_pass(prune(file, criterion), ModelState(model=model()), PassContext())


def saved(folder: Path, arrays: Arrays) -> Path:
    np.savez(folder / "gradients.npz", **arrays)
    return folder / "gradients.npz"


@pytest.mark.parametrize("criterion", ["taylor", "fisher"])
def test_channels_that_the_loss_does_not_depend_on_go_first(
    criterion: str, tmp_path: Path, run_verified: RunVerified
) -> None:
    first, second = np.ones((8, 3), np.float32), np.ones((8, 2), np.float32)
    idle = [0, 3, 5, 6]
    first[idle], second[idle] = 0.0, 0.0
    file = saved(tmp_path, {"first": first, "second": second})
    assert run_verified(prune(file, criterion), model()).plan.groups[0].removed == tuple(idle)


def test_one_gradient_for_each_minibatch_stands_in_front(tmp_path: Path) -> None:
    # Their mean is zero everywhere, and only channels 4 to 7 have any.
    first = np.zeros((2, 8, 3), np.float32)
    first[0, 4:], first[1, 4:] = 1.0, -1.0
    file = saved(tmp_path, gradients(first=first, second=np.zeros((2, 8, 2), np.float32)))
    assert run(file, "fisher").plan.groups[0].removed == (0, 1, 2, 3)


def test_a_gradient_with_swapped_axes_is_turned_where_the_sizes_say_so(tmp_path: Path) -> None:
    """PyTorch's Linear stores (out, in) what MatMul takes as (in, out)."""
    second = np.random.default_rng(1).standard_normal((8, 2)).astype(np.float32)
    first = np.random.default_rng(2).standard_normal((8, 3)).astype(np.float32)
    straight = run(saved(tmp_path, {"first": first, "second": second}))
    turned = run(saved(tmp_path, {"first": first, "second": second.T}))
    assert turned.plan.groups == straight.plan.groups


def test_safetensors_are_read_as_well(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    arrays = gradients(first=np.arange(24, dtype=np.float32).reshape(8, 3))
    save_file(arrays, tmp_path / "gradients.safetensors")
    assert run(tmp_path / "gradients.safetensors").plan.groups == run(saved(tmp_path, arrays)).plan.groups


def test_a_bias_that_the_exporter_merged_with_another_is_left_out_and_the_report_says_so(tmp_path: Path) -> None:
    file = saved(tmp_path, gradients(**{"other.bias": np.ones(8, np.float32)}))
    notes = run(file).report.notes
    assert "'gradients.npz' has gradients of 'other.bias', which the model has no weight for." in notes


# --- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"first": np.ones((8, 3), np.float32)}, "no gradients of 'second'"),
        (gradients(third=np.ones((8, 3), np.float32)), "gradients of 'third', which the model has no weight for"),
        (
            gradients(**{"norm.weight": np.ones(8, np.float32), "norm.bias": np.ones(8, np.float32)}),
            "gradients of 'norm.weight', 'norm.bias', .* before its BatchNorm was folded",
        ),
        (gradients(first=np.ones((2, 8, 3), np.float32)), "2 minibatches of 'first' and 1 of 'second'"),
        (gradients(first=np.ones((8, 4), np.float32)), r"'first' .* has shape \[8, 4\], the weight has \[8, 3\]"),
        (gradients(first=np.full((8, 3), np.nan, np.float32)), "'first' .* NaN or infinite"),
        (gradients(first=np.ones((8, 3), np.int64)), "holds int64, not floating point numbers"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_at_the_start(arrays: Arrays, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match=message):
        prune(saved(tmp_path, arrays)).check_files(ModelState(model=model()))


def test_a_missing_file_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no gradient file"):
        prune(tmp_path / "nowhere.npz").check_files(ModelState(model=model()))


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("gradients.npz", BadDataError, "can't be read as .npz"),
        ("gradients.safetensors", BadDataError, "can't be read as .safetensors"),
        ("gradients.pt", UsageError, "neither .npz nor .safetensors"),
    ],
)
def test_a_file_that_is_something_else_is_refused(
    name: str, error: type[OnnxPruneError], message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(b"something else entirely")
    with pytest.raises(error, match=message):
        run(tmp_path / name)


def test_without_the_package_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gradients.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(MissingExtraError, match=r"onnxprune\[torch\]"):
        run(tmp_path / "gradients.safetensors")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"criterion": "taylor"}, "'taylor' needs `gradients`"),
        ({"criterion": "l1", "gradients": "g.npz"}, "'l1' does not look at `gradients`"),
    ],
)
def test_gradients_and_a_criterion_that_uses_them_come_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruneConfig(**settings)


def test_a_plan_that_is_given_needs_no_gradients(tmp_path: Path) -> None:
    file = saved(tmp_path, gradients())
    plan = run(file).plan
    file.unlink()
    assert run_pass(prune(file), ModelState(model=model()), PassContext(), plan=plan).plan == plan
