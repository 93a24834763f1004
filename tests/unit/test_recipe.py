"""Recipes: TOML and command line in, one checked frozen recipe out, every mistake named with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from onnxprune.errors import UsageError
from onnxprune.recipe import decode_recipe, overlay, read_recipe_file, recipe_to_json


def test_a_pass_can_be_a_name_or_a_table() -> None:
    recipe = decode_recipe({"passes": ["simplify", {"name": "prune", "ratio": 0.25}, "prune"]})
    assert [step.step_id for step in recipe.steps] == ["simplify", "prune", "prune#2"]
    assert recipe.steps[1].config.model_dump()["ratio"] == 0.25


def test_without_targets_a_recipe_builds_plain_onnx() -> None:
    assert [target.name for target in decode_recipe({}).targets] == ["onnx"]


def test_a_recipe_written_out_reads_back_equal() -> None:
    recipe = decode_recipe(
        {"seed": 3, "passes": [{"name": "sparsify", "sparsity": 0.5}], "targets": {"ort-mobile": {}}}
    )
    assert decode_recipe(recipe_to_json(recipe)) == recipe


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        ({"pases": []}, "unknown key 'pases'. Did you mean 'passes'?"),
        ({"schema": 9}, "schema 9 is not known"),
        ({"seed": -1}, "'seed' must be a whole number"),
        ({"passes": "prune"}, "'passes' must be a list"),
        ({"passes": [{"ratio": 0.5}]}, "passes[0]: needs a name"),
        ({"passes": ["prun"]}, "Unknown pass 'prun'. Did you mean 'prune'?"),
        (
            {"passes": ["simplify", {"name": "sparsify", "sparsty": 0.5}]},
            "passes[1]: unknown key 'sparsty' for pass 'sparsify'. Did you mean 'sparsity'? Known keys:",
        ),
        ({"passes": [{"name": "sparsify", "sparsity": 1.5}]}, "'sparsity' for pass 'sparsify'"),
        ({"passes": [{"name": "prune", "id": "a"}, {"name": "prune", "id": "a"}]}, "two passes have the id 'a'"),
        ({"targets": {"ort": {}}}, "Unknown target 'ort'"),
        ({"targets": ["onnx"]}, "'targets' must be a table"),
        ({"targets": {"onnx": {"sepling": "x86"}}}, "unknown key 'sepling' for target 'onnx'"),
        ({"targets": {"onnx": 3}}, "'targets.onnx' must be a table, got 3"),
        ({"data": "images"}, "'data' must be a table, got 'images'"),
        ({"preprocess": 3}, "'preprocess' must be a table, got 3"),
        ({"passes": [{"name": "simplify", "id": 3}]}, "passes[0]: 'id' must be a name, got 3"),
        ({"measure": {"threads": 0}}, "'threads' for section 'measure'"),
        ({"data": {"calibraton": "x"}}, "unknown key 'calibraton'"),
    ],
)
def test_a_mistake_is_named_with_its_place(tables: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        decode_recipe(tables, origin="edge.toml")
    assert says in str(caught.value)


def test_settings_reach_passes_targets_and_sections() -> None:
    merged = overlay(
        {},
        passes=["prune", "prune", "quant"],
        targets=["onnx", "ort-mobile"],
        settings=[
            "prune.ratio=0.4",
            "prune#2.ratio=0.2",
            "ort-mobile.platform=arm64",
            "targets.onnx.spelling=x86",
            "measure.threads=2",
            "seed=7",
        ],
    )
    recipe = decode_recipe(merged)
    assert [step.config.model_dump().get("ratio") for step in recipe.steps][:2] == [0.4, 0.2]
    assert recipe.targets[0].config.model_dump()["spelling"] == "x86"
    assert recipe.measure.threads == 2
    assert recipe.seed == 7


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("prune.ratio", "has no value"),
        ("=3", "has no value"),
        ("quant.ratio=1", "no pass, target or section 'quant'"),
    ],
)
def test_a_setting_for_nothing_is_refused(setting: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        overlay({"passes": ["prune"]}, settings=[setting])


@pytest.mark.parametrize("tables", [{"targets": ["onnx"]}, {"targets": {"onnx": 3}}, {"data": "x"}, {"preprocess": 3}])
def test_options_laid_over_tables_of_the_wrong_kind_are_refused(tables: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="must be a table"):
        overlay(tables, targets=["onnx"], settings=["preprocess.scale=1"], sections={"data": {"calibration": "a"}})


def test_a_setting_reaches_the_target_that_is_built_without_being_asked_for() -> None:
    (target,) = decode_recipe(overlay({}, settings=["onnx.spelling=x86"])).targets
    assert target.config.model_dump()["spelling"] == "x86"


def test_passes_on_the_command_line_keep_the_recipes_settings() -> None:
    merged = overlay({"passes": ["simplify", {"name": "prune", "ratio": 0.3}]}, passes=["prune"])
    assert [step.config.model_dump()["ratio"] for step in decode_recipe(merged).steps] == [0.3]


def test_overlay_leaves_the_recipes_own_tables_alone() -> None:
    tables: dict[str, Any] = {"passes": [{"name": "prune", "ratio": 0.3}], "data": {"calibration": "a"}}
    overlay(tables, settings=["prune.ratio=0.9"], sections={"data": {"calibration": "b"}})
    assert tables == {"passes": [{"name": "prune", "ratio": 0.3}], "data": {"calibration": "a"}}


def test_data_paths_count_from_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    recipe = tmp_path / "r.toml"
    recipe.write_text('[data]\ncalibration = "images"\neval = "score.py:top1"\n')
    assert read_recipe_file(recipe)["data"] == {
        "calibration": str(tmp_path / "images"),
        "eval": f"{tmp_path / 'score.py'}:top1",
    }


def test_a_function_of_an_installed_package_is_no_path(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('[data]\neval = "my.metrics:top1"\n')
    assert read_recipe_file(recipe)["data"] == {"eval": "my.metrics:top1"}


@pytest.mark.parametrize("content", [b"passes = [", b"\xff\xfe\x00"], ids=["truncated", "binary"])
def test_a_file_that_is_not_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_bytes(content)
    with pytest.raises(UsageError, match="is not valid TOML"):
        read_recipe_file(recipe)
