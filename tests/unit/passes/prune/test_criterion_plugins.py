"""Criteria from a user's file or an installed package."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnxprune
from onnxprune.contracts import Batch, ModelState, PassContext, PassOutcome
from onnxprune.errors import PluginError, PreconditionError, UsageError
from onnxprune.graph.io import save_model
from onnxprune.passes.harness import run_pass
from onnxprune.passes.prune import PruneConfig, PrunePass
from onnxprune.passes.prune.criterion_plugins import ENTRY_POINT_GROUP, find_criterion
from onnxprune.pipeline.lock import decisive_tables
from onnxprune.recipe import decode_recipe, read_recipe_file
from tests.builders import conv_net

RunVerified = Callable[..., PassOutcome]

LAST_FIRST = """
import numpy as np
def score(slices, rng):
    return np.arange(slices.num_channels)[::-1]
"""


def criterion(folder: Path, text: str = LAST_FIRST, *, name: str = "mine.py") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return f"{folder / name}:score"


def prune(spec: str, **settings: Any) -> PrunePass:
    return PrunePass(PruneConfig(criterion=spec, ratio=0.5, min_channels=1, channel_multiple=1, **settings))


def run(pass_: PrunePass, context: PassContext | None = None) -> PassOutcome:
    return run_pass(pass_, ModelState(model=conv_net()), context or PassContext())


def test_a_function_in_a_file_ranks_the_channels(tmp_path: Path, run_verified: RunVerified) -> None:
    outcome = run_verified(prune(criterion(tmp_path)), conv_net())
    assert outcome.plan.groups[0].removed == tuple(range(8, 16))


def test_it_sees_places_with_their_role_operators_and_weights(tmp_path: Path) -> None:
    text = """
import numpy as np
def score(slices, rng):
    seen = {(p.weight, p.axis): (p.role, p.op_types, p.rows().shape) for p in slices.places}
    assert seen[("stem.weight", 0)] == ("filter", ("Conv",), (16, 27)), seen
    assert seen[("head.weight", 1)] == ("input", ("Gemm",), (16, 10)), seen
    assert seen[("stem.bias", 0)] == ("parameter", ("Conv",), (16, 1)), seen
    assert slices.layers == ("stem/conv", "block/conv")
    return np.abs(slices.places[0].rows()).sum(axis=1)
"""
    assert len(run(prune(criterion(tmp_path, text))).plan.groups[0].removed) == 8


def test_the_generator_follows_the_run_s_seed(tmp_path: Path) -> None:
    spec = criterion(tmp_path, "def score(slices, rng):\n    return rng.random(slices.num_channels)\n")
    first, again, other = (run(prune(spec), PassContext(seed=seed)).plan.groups for seed in (1, 1, 2))
    assert first == again != other


class Data:
    num_samples = 1
    content_hash = "one"

    def __iter__(self) -> Any:
        batch: Batch = {"x": np.ones((1, 3, 8, 8), np.float32)}
        yield batch


NEEDS_CALIBRATION = """
def score(slices, rng):
    return slices.activations[0].mean_abs
score.needs = "calibration"
"""


def test_it_gets_activations_when_it_says_that_it_needs_them(tmp_path: Path) -> None:
    pass_ = prune(criterion(tmp_path, NEEDS_CALIBRATION))
    assert len(run(pass_, PassContext(calibration=Data())).plan.groups[0].removed) == 8


def test_without_the_data_that_it_needs_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match="needs calibration data"):
        run(prune(criterion(tmp_path, NEEDS_CALIBRATION)))


def test_without_the_gradients_that_it_needs_it_is_refused(tmp_path: Path) -> None:
    text = LAST_FIRST + 'score.needs = "gradients"\n'
    with pytest.raises(UsageError, match="needs gradients, but there are none"):
        run(prune(criterion(tmp_path, text)))


def test_an_installed_package_brings_a_criterion_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    criterion(tmp_path, name="a_package_with_a_criterion.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = importlib.metadata.EntryPoint("last-first", "a_package_with_a_criterion:score", ENTRY_POINT_GROUP)
    found = importlib.metadata.EntryPoints([entry])
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: found.select(group=group))
    pass_ = prune("last-first")
    assert run(pass_).plan.groups[0].removed == tuple(range(8, 16))
    assert pass_.files_read == (tmp_path / "a_package_with_a_criterion.py",)


# --- what is refused ------------------------------------------------------------------------------------------


def test_an_error_in_it_names_file_and_line(tmp_path: Path) -> None:
    spec = criterion(tmp_path, "def score(slices, rng):\n    return slices.weights\n")
    with pytest.raises(PluginError, match=r"failed at .*mine\.py:2: AttributeError") as caught:
        run(prune(spec))
    assert caught.value.exit_code == 9


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("[1.0, 2.0]", r"gave an array of shape \[2\], not \[16\]"),
        ("[float('nan')] * 16", "gave 16 scores that are NaN or infinite"),
        ("[-1.0] + [1.0] * 15", r"gave negative scores \(the lowest is -1\)"),
        ("'many'", "gave a 'str', not an array of numbers"),
        ("None", "gave a 'NoneType', not an array of numbers"),
    ],
)
def test_what_is_no_score_for_each_channel_is_refused(result: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=message):
        run(prune(criterion(tmp_path, f"def score(slices, rng):\n    return {result}\n")))


def test_an_unknown_need_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="needs 'labels'"):
        find_criterion(criterion(tmp_path, LAST_FIRST + 'score.needs = "labels"\n'))


@pytest.mark.parametrize(("spec", "message"), [("gone.py:score", "no file"), ("mine.py:scroe", "Did you mean 'score'")])
def test_a_function_that_is_not_there_is_refused_at_the_start(spec: str, message: str, tmp_path: Path) -> None:
    criterion(tmp_path)
    with pytest.raises(UsageError, match=message):
        prune(str(tmp_path / spec)).check_files(ModelState(model=conv_net()))


def test_a_plan_that_is_given_needs_no_function(tmp_path: Path) -> None:
    pass_ = prune(criterion(tmp_path))
    plan = run(pass_).plan
    (tmp_path / "mine.py").unlink()
    assert run_pass(pass_, ModelState(model=conv_net()), PassContext(), plan=plan).plan == plan


# --- recipes, plans and the cache -----------------------------------------------------------------------------


def test_paths_count_from_the_recipe_and_names_stay(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(
        'passes = [{ name = "prune", criterion = "a/mine.py:score" }, { name = "prune", criterion = "taylor", '
        'gradients = "g.npz" }]',
        encoding="utf-8",
    )
    first, second = read_recipe_file(tmp_path / "r.toml")["passes"]
    assert first["criterion"] == f"{tmp_path.resolve()}/a/mine.py:score"
    assert (second["criterion"], second["gradients"]) == ("taylor", str(tmp_path.resolve() / "g.npz"))


def test_a_plan_does_not_hold_where_the_file_was(tmp_path: Path) -> None:
    recipe = decode_recipe({"passes": [{"name": "prune", "criterion": criterion(tmp_path)}]})
    assert decisive_tables(recipe)["passes"][0]["criterion"] == "mine.py:score"


def test_a_criterion_that_was_changed_is_not_taken_from_the_cache(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    save_model(conv_net(), model)
    spec = criterion(tmp_path)

    def resumed() -> bool:
        recipe = {"passes": [{"name": "prune", "criterion": spec, "ratio": 0.5}]}
        report = onnxprune.run(str(model), recipe=recipe, out=tmp_path / "out", keep_cache=True, measure=False)
        return report.passes[0].resumed

    runs = [resumed(), resumed()]
    criterion(tmp_path, LAST_FIRST.replace("[::-1]", ""))
    runs.append(resumed())
    assert runs == [False, True, False]
