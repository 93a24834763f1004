"""ONNX files as sources."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from onnxprune.convert.onnx_file import load_onnx, load_onnx_with_report
from onnxprune.errors import ModelError
from onnxprune.graph.external import FileTensor
from onnxprune.graph.verify import verify


def write_model(path: Path, *, opset: int = 20, external: bool = False, op_type: str = "Relu") -> Path:
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": {opset}]>
        g (float[N,64] x) => (float[N,64] y) {{ a = MatMul(x, w) y = {op_type}(a) }}"""
    )
    proto.graph.initializer.append(numpy_helper.from_array(np.ones((64, 64), np.float32), "w"))
    onnx.save(proto, path, save_as_external_data=external, location="weights.bin")
    return path


@pytest.mark.parametrize("external", [False, True])
def test_file_within_range_is_loaded_as_it_is(tmp_path: Path, external: bool) -> None:
    loaded = load_onnx_with_report(write_model(tmp_path / "model.onnx", external=external))
    assert loaded.upgrade is None
    assert loaded.notes == ()
    assert [node.op_type for node in loaded.model.graph] == ["MatMul", "Relu"]
    assert isinstance(loaded.model.graph.initializers["w"].const_value, FileTensor) is external
    verify(loaded.model)


def test_relative_path_and_link_to_the_model_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "model.onnx", external=True)
    (tmp_path / "link.onnx").symlink_to("model.onnx")
    monkeypatch.chdir(tmp_path)
    for name in ("model.onnx", "link.onnx", "./model.onnx"):
        assert load_onnx(Path(name)).graph.initializers["w"].const_value is not None


def test_input_file_is_not_touched(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.onnx", external=True, opset=13)
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in tmp_path.iterdir()}
    load_onnx(path)
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in tmp_path.iterdir()} == before


def test_errors_of_every_stage_name_the_file(tmp_path: Path) -> None:
    missing = tmp_path / "nothing.onnx"
    with pytest.raises(ModelError, match=r"nothing\.onnx"):
        load_onnx(missing)
    newer = write_model(tmp_path / "newer.onnx", opset=25)
    with pytest.raises(ModelError, match=r"newer\.onnx.*opset 25"):
        load_onnx(newer)
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes((tmp_path / "newer.onnx").read_bytes()[:100])
    with pytest.raises(ModelError, match=r"damaged\.onnx"):
        load_onnx(damaged)
