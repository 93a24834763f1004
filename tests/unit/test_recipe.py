"""Recipes: TOML and command line in, one checked frozen recipe out, every mistake named with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from onnxprune.errors import UsageError
from onnxprune.recipe import (
    Repeat,
    Step,
    decode_recipe,
    decode_step,
    overlay,
    overlay_pruning,
    read_recipe_file,
    recipe_to_json,
)


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
        ({"passes": [{"name": "repeat", "times": 2}]}, "passes[0]: 'repeat' needs 'passes'."),
        ({"passes": [{"name": "repeat", "passes": ["prune"]}]}, "passes[0]: 'repeat' needs 'times'."),
        ({"passes": [{"name": "repeat", "times": 0, "passes": ["prune"]}]}, "greater than or equal to 1, got 0"),
        ({"passes": [{"name": "repeat", "times": 2, "passes": []}]}, "passes[0]: 'passes' for 'repeat' is empty"),
        ({"passes": [{"name": "repeat", "times": 2, "passes": "prune"}]}, "'passes[0].passes' must be a list"),
        (
            {"passes": [{"name": "repeat", "times": 2, "pases": ["prune"]}]},
            "unknown key 'pases' for 'repeat'. Did you mean 'passes'? Known keys: passes, times, schedule, score_drop.",
        ),
        (
            {"passes": ["simplify", {"name": "repeat", "times": 2, "passes": [{"name": "prune", "ratoi": 0.5}]}]},
            "passes[1].passes[0]: unknown key 'ratoi' for pass 'prune'. Did you mean 'ratio'?",
        ),
        (
            {"passes": [{"name": "repeat", "times": 2, "passes": [{"name": "repeat", "times": 2, "passes": []}]}]},
            "passes[0].passes[0]: a 'repeat' inside a 'repeat' is not possible",
        ),
        (
            {"passes": [{"name": "repeat", "times": 2, "score_drop": -1, "passes": ["prune"]}]},
            "'score_drop' for 'repeat'",
        ),
        ({"passes": [{"name": "prune", "id": "prune@2"}]}, "passes[0]: the id 'prune@2' holds '@'"),
        (
            {"passes": ["prune", {"name": "repeat", "times": 2, "passes": [{"name": "prune", "id": "prune"}]}]},
            "two passes have the id 'prune'",
        ),
    ],
)
def test_a_mistake_is_named_with_its_place(tables: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        decode_recipe(tables, origin="edge.toml")
    assert says in str(caught.value)


REPEATED: dict[str, Any] = {
    "passes": [
        "simplify",
        {
            "name": "repeat",
            "times": 4,
            "schedule": "geometric",
            "passes": [{"name": "prune", "ratio": 0.5}, "simplify"],
        },
        "prune",
    ]
}


def test_a_block_holds_its_passes_and_ids_count_through_all_of_them() -> None:
    first, block, last = decode_recipe(REPEATED).steps
    assert isinstance(first, Step)
    assert isinstance(block, Repeat)
    assert isinstance(last, Step)
    assert (block.step_id, block.times, block.schedule, block.score_drop) == ("repeat", 4, "geometric", None)
    assert [first.step_id, *(step.step_id for step in block.steps), last.step_id] == [
        "simplify",
        "prune",
        "simplify#2",
        "prune#2",
    ]
    assert block.steps[0].config.model_dump()["ratio"] == 0.5


def test_a_block_written_out_reads_back_equal() -> None:
    recipe = decode_recipe(REPEATED)
    assert decode_recipe(recipe_to_json(recipe)) == recipe


def test_settings_reach_a_block_and_the_passes_in_it() -> None:
    merged = overlay(REPEATED, settings=["repeat.times=7", "prune.ratio=0.3", "prune#2.ratio=0.1"])
    _, block, last = decode_recipe(merged).steps
    assert isinstance(block, Repeat)
    assert isinstance(last, Step)
    assert block.times == 7
    assert [step.config.model_dump().get("ratio") for step in (*block.steps, last)] == [0.3, None, 0.1]
    assert REPEATED["passes"][1]["times"] == 4
    assert REPEATED["passes"][1]["passes"][0]["ratio"] == 0.5


def test_passes_on_the_command_line_choose_a_block_as_a_whole() -> None:
    (block,) = decode_recipe(overlay(REPEATED, passes=["repeat"])).steps
    assert isinstance(block, Repeat)
    assert [step.step_id for step in block.steps] == ["prune", "simplify#2"]


def test_a_step_without_a_recipe_is_checked_like_one_in_it() -> None:
    assert decode_step("prune", {"ratio": 0.5}).config.model_dump()["ratio"] == 0.5
    with pytest.raises(UsageError, match="Pass 'prune': unknown key 'ratoi'"):
        decode_step("prune", {"ratoi": 0.5})


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


# --- options for pruning --------------------------------------------------------------------------------------


def test_a_time_on_the_command_line_takes_the_place_of_the_targets_of_the_recipe() -> None:
    tables = {"passes": [{"name": "prune", "ratio": 0.3, "ranking": "global"}, "quant"]}
    merged = overlay_pruning(tables, latency_ratio=0.5, verify=True)
    prune = merged["passes"][0]
    assert prune == {"name": "prune", "id": "prune", "ranking": "global", "latency_ratio": 0.5, "verify_oracle": True}
    assert tables["passes"][0] == {"name": "prune", "ratio": 0.3, "ranking": "global"}


def test_every_pruning_pass_is_verified_those_inside_blocks_too() -> None:
    tables = {
        "passes": [{"name": "prune", "ratio": 0.1}, {"name": "repeat", "times": 2, "passes": [{"name": "prune"}]}]
    }
    merged = overlay_pruning(tables, latency_ratio=None, verify=True)
    block = merged["passes"][1]
    assert merged["passes"][0]["verify_oracle"] is True
    assert block["passes"][0]["verify_oracle"] is True


@pytest.mark.parametrize(("latency_ratio", "option"), [(0.5, "--latency-ratio"), (None, "--verify-pruning")])
def test_options_for_pruning_without_such_a_pass_are_refused(latency_ratio: float | None, option: str) -> None:
    with pytest.raises(UsageError, match=f"'{option}' is for the pass 'prune', and the run has 'simplify'"):
        overlay_pruning({"passes": ["simplify"]}, latency_ratio=latency_ratio, verify=True)


def test_a_time_for_one_of_two_pruning_passes_is_refused_with_the_way_to_say_which() -> None:
    with pytest.raises(UsageError, match=r"--set 'prune#2.latency_ratio=0.5'"):
        overlay_pruning({"passes": ["prune", "prune"]}, latency_ratio=0.5, verify=False)
