from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxprune.runtime.host import host_isa
from onnxprune.targets.ort_convert import OptimizationLevel, convert_to_ort
from onnxprune.targets.ort_format import read_ort_facts
from tests.builders import conv_net_proto, proto_of


def convert(
    proto: onnx.ModelProto,
    folder: Path,
    *,
    is_arm: bool = False,
    style: Literal["fixed", "runtime"] = "fixed",
    level: OptimizationLevel = "all",
    blocked_layout: bool = False,
) -> tuple[dict[str, int], str]:
    """The number of nodes of each type in the file, and the configuration."""
    source = folder / "net.onnx"
    onnx.save(proto, source)
    path, config = convert_to_ort(
        source,
        folder=folder,
        is_arm=is_arm,
        style=style,
        level=level,
        blocked_layout=blocked_layout,
        type_reduction=False,
    )
    facts = read_ort_facts(path)
    return {f"{use.domain}::{use.op_type}" if use.domain else use.op_type: n for use, n in facts.ops.items()}, config


@pytest.mark.parametrize("is_arm", [False, True])
def test_layout_of_this_machine_is_not_baked_in(tmp_path: Path, is_arm: bool) -> None:
    ops, config = convert(conv_net_proto(), tmp_path, is_arm=is_arm)
    assert ops["com.microsoft::FusedConv"] == 2
    assert "nchwc" not in config


@pytest.mark.skipif(host_isa().arch != "x86-64", reason="the blocked layout is x86's")
def test_layout_of_this_machine_is_baked_in_on_request(tmp_path: Path) -> None:
    ops, config = convert(conv_net_proto(), tmp_path, blocked_layout=True)
    assert ops["com.microsoft.nchwc::Conv"] == 2
    assert "com.microsoft.nchwc;1;Conv" in config


def test_basic_level_leaves_plain_operators(tmp_path: Path) -> None:
    ops, _ = convert(conv_net_proto(), tmp_path, level="basic")
    assert ops["Conv"] == 2
    assert ops["Relu"] == 2


def test_operators_in_the_branches_of_an_if_are_listed(tmp_path: Path) -> None:
    def branch(name: str, op_type: str) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, ["N"])
        return helper.make_graph([helper.make_node(op_type, ["x"], [f"{name}_out"], name=name)], name, [], [output])

    choice = helper.make_node(
        "If", ["is_big"], ["y"], name="choose", then_branch=branch("then", "Sin"), else_branch=branch("else", "Cos")
    )
    proto = proto_of(
        [
            helper.make_node("ReduceMax", ["x"], ["top"], name="top", keepdims=0),
            helper.make_node("Greater", ["top", "limit"], ["is_big"], name="compare"),
            choice,
        ],
        inputs={"x": ["N"]},
        outputs={"y": ["N"]},
        weights={"limit": np.array(0.5, np.float32)},
    )
    ops, config = convert(proto, tmp_path)
    assert {"If", "Sin", "Cos"} <= set(ops)
    assert "ai.onnx;7;Cos,Sin\n" in config


def test_float16_is_converted_with_casts_where_this_machine_has_no_kernels(tmp_path: Path) -> None:
    ops, _ = convert(conv_net_proto(dtype=np.float16), tmp_path, is_arm=True)
    # The reason for the finding "float16" of the target.
    assert ("Cast" in ops) == (host_isa().arch == "x86-64")
