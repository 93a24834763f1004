"""Old ONNX files are brought up to opset 18, and what was made of them is compared with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from onnxprune.convert.onnx_file import load_onnx, load_onnx_with_report
from onnxprune.errors import ModelError
from onnxprune.graph.metadata import module_path
from onnxprune.graph.opset_rules import RULES, RuleContext
from onnxprune.graph.verify import verify
from onnxprune.runtime.sessions import ort_runner_from_model

LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"


def upsample_model(path: Path, opset: int) -> Path:
    """Upsample (opset 7 and 9) or Resize (10) in linear mode, which the stock converter gets wrong by 0.1 to 0.23."""
    op_type = "Resize" if opset == 10 else "Upsample"
    attributes = {"mode": "linear", **({"scales": [1.0, 1.0, 2.0, 2.0]} if opset < 9 else {})}
    inputs = ["x"] if opset < 9 else ["x", "scales"]
    nodes = [
        helper.make_node(op_type, inputs, ["u"], name="/neck/up/Upsample", **attributes),
        helper.make_node("Softmax", ["u"], ["y"], name="/head/Softmax", axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, ["batch", 2, 4, 4])],
        [helper.make_tensor_value_info("y", 1, None)],
        [] if opset < 9 else [numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7), path)
    return path


@pytest.mark.parametrize("opset", [7, 9, 10])
def test_linear_upsampling_keeps_its_values_and_node_metadata(tmp_path: Path, opset: int) -> None:
    loaded = load_onnx_with_report(upsample_model(tmp_path / "model.onnx", opset))
    assert loaded.upgrade is not None
    assert (loaded.upgrade.from_opset, loaded.upgrade.to_opset) == (opset, 18)
    assert loaded.upgrade.difference is not None
    # The same float32 arithmetic.
    assert loaded.upgrade.difference.max_abs < 1e-6
    assert module_path(loaded.model.graph[0]) == "neck.up"
    verify(loaded.model)


def test_notes_say_what_was_done(tmp_path: Path) -> None:
    loaded = load_onnx_with_report(upsample_model(tmp_path / "model.onnx", 9))
    assert len(loaded.notes) == 1
    assert loaded.notes[0].startswith("Brought from opset 9 to 18; outputs differ from the original's by at most ")


@pytest.fixture
def wrong_rule() -> Iterator[None]:
    """An upgrade rule with the stock converter's mistake."""
    right = RULES["Resize", 11]

    def wrong(context: RuleContext) -> None:
        right(context)
        context.node.attributes["coordinate_transformation_mode"] = ir.AttrString(
            "coordinate_transformation_mode", "half_pixel"
        )

    RULES["Resize", 11] = wrong
    yield
    RULES["Resize", 11] = right


@pytest.mark.usefixtures("wrong_rule")
def test_upgrade_that_changes_values_is_refused(tmp_path: Path) -> None:
    path = upsample_model(tmp_path / "model.onnx", 9)
    with pytest.raises(
        ModelError, match=r"'model.onnx' was brought from opset 9 to 18, but then computes something else"
    ):
        load_onnx(path)


def test_original_that_onnx_runtime_can_not_run_is_upgraded_with_a_note(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 7, opset_import: ["": 11, "com.acme": 1]>
        g (float[2,3] x) => (float[2] y) { a = com.acme.Unknown(x) y = ReduceSum<axes = [1], keepdims = 0>(a) }"""
    )
    onnx.save(proto, tmp_path / "model.onnx")
    loaded = load_onnx_with_report(tmp_path / "model.onnx")
    assert loaded.upgrade is not None
    assert loaded.upgrade.difference is None
    assert "not compared with the original, because ONNX Runtime does not run the original" in loaded.notes[0]


def test_node_that_can_not_be_upgraded_is_refused_with_file_and_node(tmp_path: Path) -> None:
    proto = upsample_model(tmp_path / "model.onnx", 10)
    model = onnx.load(proto)
    model.opset_import[0].version = 11
    node = model.graph.node[0]
    node.input[:] = ["x", "", "scales"]
    for name, value in (("coordinate_transformation_mode", "tf_half_pixel_for_nn"), ("nearest_mode", "ceil")):
        node.attribute.append(helper.make_attribute(name, value))
    onnx.save(model, proto)
    with pytest.raises(ModelError, match=r"model.onnx': Node '/neck/up/Upsample' \(Resize\)"):
        load_onnx(proto)


@pytest.mark.parametrize("name", sorted(path.stem.removeprefix("light_") for path in LIGHT.glob("*.onnx")))
def test_light_topologies_are_upgraded_and_equal(name: str) -> None:
    loaded = load_onnx_with_report(LIGHT / f"light_{name}.onnx")
    assert loaded.upgrade is not None
    assert loaded.upgrade.difference is not None
    assert loaded.upgrade.difference.max_rel < 1e-5
    verify(loaded.model)


def test_real_detector_of_opset_11_is_upgraded_and_equal(shared_data: Path) -> None:
    loaded = load_onnx_with_report(shared_data / "fastestdet" / "FastestDet.onnx")
    assert loaded.upgrade is not None
    assert loaded.upgrade.difference is not None
    assert loaded.upgrade.difference.max_rel < 1e-5
    assert ort_runner_from_model(loaded.model).outputs[0].shape == (1, 85, 22, 22)


def test_group_normalization_of_opset_18_is_brought_to_opset_21(tmp_path: Path) -> None:
    """PyTorch wrote it; onnx's checker refuses it since it was withdrawn, and ONNX Runtime runs it."""
    node = helper.make_node("GroupNormalization", ["x", "scale", "shift"], ["y"], name="norm", num_groups=2)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", 1, ["N", 6, 4, 4])],
        [helper.make_tensor_value_info("y", 1, ["N", 6, 4, 4])],
        [
            numpy_helper.from_array(np.array(pair, np.float32), name)
            for name, pair in (("scale", [2, 3]), ("shift", [5, 7]))
        ],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    loaded = load_onnx_with_report(path)
    assert loaded.upgrade is not None
    assert (loaded.upgrade.from_opset, loaded.upgrade.to_opset) == (18, 21)
    assert loaded.upgrade.difference is not None
    assert loaded.upgrade.difference.max_abs < 1e-5
