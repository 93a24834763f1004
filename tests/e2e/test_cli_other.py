"""`convert`, `inspect`, `profile`, `passes`, `targets`, `ops` from the outside."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from onnxprune.plugins import PASSES, TARGETS

Command = Callable[..., Any]


def test_convert_writes_a_canonical_model_that_keeps_names_and_metadata(
    onnxprune_command: Command, classifier: Any, tmp_path: Path
) -> None:
    out = tmp_path / "converted.onnx"
    result = onnxprune_command("convert", classifier.path, "--out", out)
    assert result.code == 0, result.stderr
    assert "Wrote" in result.stdout
    model = onnx.load(out)
    assert [i.name for i in model.graph.input] == ["image"]
    assert [o.name for o in model.graph.output] == ["scores"]
    assert {p.key: p.value for p in model.metadata_props}["labels"] == "0,1,2,3,4,5,6,7,8,9"


def test_convert_fixes_a_dynamic_axis(onnxprune_command: Command, classifier: Any, tmp_path: Path) -> None:
    out = tmp_path / "fixed.onnx"
    result = onnxprune_command("convert", classifier.path, "--shape", "image=4,3,16,16", "--out", out)
    assert result.code == 0, result.stderr
    dims = onnx.load(out).graph.output[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in dims] == [4, 10]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--out", "x.bin"), 2, "does not end in '.onnx'"),
        (("--shape", "imaeg=1,3,16,16", "--out", "x.onnx"), 2, "Did you mean 'image'"),
        (("--shape", "image=1,3,17,17", "--out", "x.onnx"), 2, "image"),
        (("--weights", "w.pth", "--out", "x.onnx"), 2, "--weights"),
    ],
    ids=["suffix", "input-name", "fixed-axis", "useless-option"],
)
def test_convert_refuses_what_does_not_fit(
    onnxprune_command: Command,
    classifier: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    code: int,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = onnxprune_command("convert", classifier.path, *arguments)
    assert result.code == code, result.stderr
    assert says in result.stderr
    assert not (tmp_path / "x.onnx").exists()


def test_convert_never_overwrites_its_source(onnxprune_command: Command, classifier: Any) -> None:
    before = classifier.path.read_bytes()
    result = onnxprune_command("convert", classifier.path, "--out", classifier.path)
    assert result.code == 2
    assert classifier.path.read_bytes() == before


def test_a_source_that_does_not_exist_is_named(onnxprune_command: Command, tmp_path: Path) -> None:
    result = onnxprune_command("inspect", tmp_path / "none.onnx")
    assert result.code in (2, 3)
    assert "none.onnx" in result.stderr


def test_inspect_counts_what_can_be_counted_by_hand(onnxprune_command: Command, classifier: Any) -> None:
    result = onnxprune_command("inspect", classifier.path, "--shape", "image=1,3,16,16", "--json")
    assert result.code == 0, result.stderr
    inspection = json.loads(result.stdout)
    convolutions = 16 * 16 * 9 * (3 * 32 + 32 * 48 + 48 * 64)
    assert inspection["figures"]["macs"] == convolutions + 64 * 10
    assert {row["name"] for row in inspection["layers"]} >= {"conv1", "conv2", "conv3", "fc"}


def test_inspect_channels_names_what_is_frozen_and_why(onnxprune_command: Command, classifier: Any) -> None:
    result = onnxprune_command("inspect", classifier.path, "--channels")
    assert result.code == 0, result.stderr
    assert "through 144 channels in 3 groups" in result.stdout
    assert "Frozen are 10 channels in 1 group," in result.stdout
    assert "output 'scores'" in result.stdout


def test_profile_shows_latency_and_operators(onnxprune_command: Command, classifier: Any) -> None:
    result = onnxprune_command("profile", classifier.path, "--seconds", "0.05", "--against", classifier.path)
    assert result.code == 0, result.stderr
    for expected in ("latency", "p90", "against", "operator type", "conv1"):
        assert expected in result.stdout


def test_profile_json_has_every_node(onnxprune_command: Command, classifier: Any) -> None:
    result = onnxprune_command("profile", classifier.path, "--seconds", "0.05", "--json")
    profile = json.loads(result.stdout)
    assert profile["ops"]["nodes"]
    assert profile["against"] is None


@pytest.mark.parametrize("name", PASSES)
def test_passes_explains_every_setting(onnxprune_command: Command, name: str) -> None:
    result = onnxprune_command("passes", name, "--json")
    described = json.loads(result.stdout)
    assert all(setting["description"] for setting in described["settings"]), described


@pytest.mark.parametrize("name", TARGETS)
def test_targets_explains_every_setting(onnxprune_command: Command, name: str) -> None:
    result = onnxprune_command("targets", name, "--json")
    described = json.loads(result.stdout)
    assert all(setting["description"] for setting in described["settings"]), described


def test_passes_explains_blocks_as_well(onnxprune_command: Command) -> None:
    assert "repeat" in onnxprune_command("passes").stdout
    described = json.loads(onnxprune_command("passes", "repeat", "--json").stdout)
    assert [setting["name"] for setting in described["settings"]] == ["passes", "times", "schedule", "score_drop"]
    assert all(setting["description"] for setting in described["settings"])


def test_passes_and_targets_list_what_there_is(onnxprune_command: Command) -> None:
    assert all(name in onnxprune_command("passes").stdout for name in PASSES)
    assert all(name in onnxprune_command("targets").stdout for name in TARGETS)


def test_an_unknown_pass_gets_a_suggestion(onnxprune_command: Command) -> None:
    result = onnxprune_command("passes", "qant")
    assert result.code == 2
    assert "Did you mean 'quant'?" in result.stderr


def test_ops_shows_what_each_table_knows(onnxprune_command: Command) -> None:
    result = onnxprune_command("ops", "Conv", "--json")
    (row,) = json.loads(result.stdout)
    assert set(row["tables"]) >= {"layout", "channels", "macs", "quant"}


def test_ops_pins_the_coverage_of_every_table(onnxprune_command: Command) -> None:
    rows = json.loads(onnxprune_command("ops", "--json").stdout)
    counts = {table: sum(table in row["tables"] for row in rows) for table in ("layout", "channels", "macs", "quant")}
    # Growing is welcome: raise the number with the row. A fall means that models lose what they had.
    assert counts == COVERAGE


COVERAGE = {"layout": 24, "channels": 170, "macs": 233, "quant": 40}


def test_an_operator_that_no_table_knows_is_an_error(onnxprune_command: Command) -> None:
    result = onnxprune_command("ops", "Convv")
    assert result.code == 2
    assert "Did you mean 'Conv'?" in result.stderr


def test_ops_of_one_table_are_those_that_it_knows(onnxprune_command: Command) -> None:
    rows = json.loads(onnxprune_command("ops", "--table", "layout", "--json").stdout)
    assert len(rows) == COVERAGE["layout"]
    assert all("layout" in row["tables"] for row in rows)


def test_ops_of_a_target_say_what_each_operator_becomes_and_what_is_excluded(onnxprune_command: Command) -> None:
    found = json.loads(onnxprune_command("ops", "--target", "tflite", "--json").stdout)
    assert found["onnx_operators"] == sum(not row["domain"] for row in found["operators"]) >= 120
    assert all(row["becomes"] for row in found["operators"])
    assert all(exclusion["cases"] and exclusion["fact"] for exclusion in found["exclusions"])
    printed = onnxprune_command("ops", "--target", "tflite").stdout
    assert f"{found['onnx_operators']} ONNX operators" in printed
    assert f"{len(found['exclusions'])} exclusions" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "onnx"), "has no list of operators"),
        (("--target", "tflight"), "Did you mean 'tflite'?"),
        (("--table", "mac"), "Did you mean 'macs'?"),
        (("--table", "macs", "--target", "tflite"), "different lists"),
        (("Convv", "--target", "tflite"), "Did you mean 'Conv'?"),
    ],
)
def test_ops_refuses_what_there_is_not(onnxprune_command: Command, arguments: tuple[str, ...], message: str) -> None:
    result = onnxprune_command("ops", *arguments)
    assert result.code == 2
    assert message in result.stderr
