"""ONNX sources, shapes, options and the comparison that every conversion ends with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxprune.contracts import CanonicalModel
from onnxprune.convert import compare
from onnxprune.convert.compare import compare_with_cases
from onnxprune.convert.onnx_file import load_onnx
from onnxprune.convert.reference import ForeignConversion, ReferenceCase, load_conversion, save_conversion
from onnxprune.convert.report import SourceKind
from onnxprune.convert.request import SourceRequest
from onnxprune.convert.source import open_source
from onnxprune.errors import ModelError, UsageError


def _conv_file(path: Path, *, image: list[Any], opset: int = 18, **metadata: str) -> Path:
    """Conv 3x3 (3 -> 4) and a mean over height and width, written with a Shape-free graph."""
    weight = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["image", "weight"], ["features"], name="conv"),
            helper.make_node("GlobalAveragePool", ["features"], ["mean"], name="pool"),
        ],
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, image)],
        [helper.make_tensor_value_info("mean", TensorProto.FLOAT, [image[0], 4, 1, 1])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return path


def test_onnx_file_is_opened_compared_and_keeps_its_metadata(tmp_path: Path) -> None:
    path = _conv_file(tmp_path / "net.onnx", image=["batch", 3, 8, 8], labels='["cat"]', author="nobody")

    converted = open_source(SourceRequest(source=path))

    report = converted.report
    assert (report.source_name, report.kind) == ("net.onnx", SourceKind.ONNX)
    assert [(spec.name, spec.dtype, spec.shape) for spec in report.inputs] == [("image", "float32", ("batch", 3, 8, 8))]
    assert report.metadata == {"labels": '["cat"]', "author": "nobody"}
    assert dict(converted.model.metadata_props) == {"labels": '["cat"]', "author": "nobody"}
    assert report.shape_used == {"image": (1, 3, 8, 8)}
    assert report.difference is not None
    assert report.difference.max_rel < 1e-6


def test_old_opset_is_upgraded_and_the_report_says_so(tmp_path: Path) -> None:
    report = open_source(SourceRequest(source=_conv_file(tmp_path / "net.onnx", image=[1, 3, 8, 8], opset=9))).report

    assert report.opset == 18
    assert report.notes[0].startswith("Brought from opset 9 to 18")
    assert report.difference is not None
    assert report.shape_used == {"image": (1, 3, 8, 8)}


def test_source_file_is_not_touched(tmp_path: Path) -> None:
    path = _conv_file(tmp_path / "net.onnx", image=["batch", 3, 8, 8])
    before = path.read_bytes()

    open_source(SourceRequest(source=path, shapes={"image": (1, 3, 8, 8)}))

    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["net.onnx"]


def test_all_dynamic_axes_are_fixed_by_a_full_shape(tmp_path: Path) -> None:
    path = _conv_file(tmp_path / "net.onnx", image=["batch", 3, "height", "width"])

    report = open_source(SourceRequest(source=path, shapes={"image": (2, 3, 16, 12)})).report

    assert report.inputs[0].shape == (2, 3, 16, 12)
    assert report.outputs[0].shape == (2, 4, 1, 1)
    assert report.shape_used == {"image": (2, 3, 16, 12)}


def test_axis_that_gets_a_name_stays_dynamic_while_others_are_fixed(tmp_path: Path) -> None:
    path = _conv_file(tmp_path / "net.onnx", image=["batch", 3, "height", "width"])

    report = open_source(SourceRequest(source=path, shapes={"image": ("n", 3, 16, 12)})).report

    assert report.inputs[0].shape == ("batch", 3, 16, 12)
    assert report.outputs[0].shape == ("batch", 4, 1, 1)


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ({"imag": (1, 3, 8, 8)}, r"'imag', which is no input of the model.*Did you mean 'image'\?"),
        ({"image": (1, 3, 8)}, r"has 3 axes, but the input has 4: batch,3,8,8"),
        ({"image": (1, 4, 8, 8)}, r"changes axis 1, which the model fixes: batch,3,8,8"),
        ({"image": (1, "channels", 8, 8)}, r"keeps axis 1 dynamic, which the model fixes"),
        ({"image": (0, 3, 8, 8)}, r"every size must be at least 1"),
    ],
    ids=["name", "rank", "size", "dynamic", "zero"],
)
def test_shape_that_does_not_fit_is_refused(tmp_path: Path, shapes: dict[str, Any], reason: str) -> None:
    path = _conv_file(tmp_path / "net.onnx", image=["batch", 3, 8, 8])

    with pytest.raises(UsageError, match=reason):
        open_source(SourceRequest(source=path, shapes=shapes))


@pytest.mark.parametrize(
    ("option", "value", "spelling"),
    [
        ("weights", Path("w.pth"), "--weights"),
        ("signature", "serve", "--signature"),
        ("inputs", ("x",), "--inputs"),
        ("outputs", ("y",), "--outputs"),
        ("trust_source", True, "--trust-source"),
        ("example_inputs", (1,), "example_inputs"),
        ("dynamic_shapes", {}, "dynamic_shapes"),
    ],
)
def test_option_without_meaning_for_the_source_is_refused(
    tmp_path: Path, option: str, value: object, spelling: str
) -> None:
    path = _conv_file(tmp_path / "net.onnx", image=[1, 3, 8, 8])

    with pytest.raises(UsageError, match=rf"{spelling} has no meaning for 'net.onnx', which is: ONNX file"):
        open_source(replace(SourceRequest(source=path), **{option: value}))


def test_missing_weights_are_an_error_before_the_factory_runs(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("raise RuntimeError('ran')\n")

    with pytest.raises(ModelError, match=r"Weights '.*w.pth' do not exist"):
        open_source(SourceRequest(source=f"{tmp_path}/net.py:make", weights=tmp_path / "w.pth"))


# --- the comparison -------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> CanonicalModel:
    return load_onnx(_conv_file(tmp_path / "net.onnx", image=[1, 3, 8, 8]))


FEEDS = {"image": np.ones((1, 3, 8, 8), np.float32)}


def _conversion(outputs: dict[str, Any], **facts: Any) -> ForeignConversion:
    return ForeignConversion(cases=(ReferenceCase(feeds=FEEDS, outputs=outputs),), **facts)


def _compare(model: CanonicalModel, conversion: ForeignConversion, tolerance: float = 1e-3) -> compare.Comparison:
    return compare_with_cases(
        model, conversion, SourceRequest(source="net.h5", tolerance=tolerance), source_name="net.h5"
    )


@pytest.fixture
def mean(model: CanonicalModel) -> np.ndarray[Any, np.dtype[np.float32]]:
    runner = compare.ort_runner_from_model(model)
    return runner.run(FEEDS)["mean"]


def test_difference_above_tolerance_fails_with_the_numbers(model: CanonicalModel, mean: Any) -> None:
    wrong = mean + 0.01 * np.abs(mean).max()

    with pytest.raises(ModelError, match=r"'net.h5' and its conversion differ.*'mean' by .*relative 0.0099.*0.001"):
        _compare(model, _conversion({"mean": wrong}))

    allowed = _compare(model, _conversion({"mean": wrong}), tolerance=0.02)
    assert allowed.difference is not None
    assert allowed.difference.max_rel == pytest.approx(0.01, rel=0.02)  # the largest value moved by 1 % itself


def test_nan_in_the_result_only_is_a_difference(model: CanonicalModel, mean: Any) -> None:
    broken = mean.copy()
    broken[0, 0] = np.nan

    with pytest.raises(ModelError, match="differ on the same inputs"):
        _compare(model, _conversion({"mean": broken}))


def test_output_of_another_shape_or_name_is_a_difference(model: CanonicalModel, mean: Any) -> None:
    with pytest.raises(ModelError, match=r"output 'mean' has the shape \(1, 4\) in the source"):
        _compare(model, _conversion({"mean": mean.reshape(1, 4)}))
    with pytest.raises(ModelError, match="lost the outputs 'other'"):
        _compare(model, _conversion({"mean": mean, "other": mean}))


def test_source_that_is_random_is_named_as_the_reason(model: CanonicalModel, mean: Any) -> None:
    with pytest.raises(ModelError, match="gives other outputs each time"):
        _compare(model, _conversion({"mean": mean + 1}, is_deterministic=False))


def test_quantized_source_is_judged_by_noise_over_all_samples(model: CanonicalModel, mean: Any) -> None:
    # One value far off is rounding, amplified; all values off are another model.
    spread = float(mean.std())
    one_off = mean.copy()
    one_off[0, 0] += 0.3 * spread

    comparison = _compare(model, _conversion({"mean": one_off}, is_quantized=True))

    assert "root mean square difference is 0.1" in comparison.notes[0]
    assert comparison.allowed == 0.25
    with pytest.raises(ModelError, match=r"'mean' by 0\.\d+ of its spread; allowed is 0.25"):
        _compare(model, _conversion({"mean": mean + spread * np.sign(mean)}, is_quantized=True))


def test_source_that_could_not_be_run_is_reported_not_hidden(model: CanonicalModel) -> None:
    comparison = _compare(model, ForeignConversion(cases=(), not_compared_reason="its inputs are bfloat16"))

    assert (comparison.difference, comparison.not_compared_reason) == (None, "its inputs are bfloat16")


def test_big_file_is_not_loaded_three_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "_MAX_COMPARED_BYTES", 100)
    path = _conv_file(tmp_path / "net.onnx", image=[1, 3, 8, 8])

    report = open_source(SourceRequest(source=path)).report

    assert report.difference is None
    assert report.not_compared_reason.startswith("it has more than")


def test_reference_comes_back_from_files_as_it_was_written(tmp_path: Path) -> None:
    case = ReferenceCase(
        feeds={"a/b:0": np.arange(3, dtype=np.int8), "text": np.array(["x", "yy"], object)},
        outputs={"out": np.float32([[1, np.nan]])},
    )
    conversion = ForeignConversion(
        cases=(case,), is_quantized=True, metadata={"labels": "[]"}, versions={"torch": "1"}, notes=("said",)
    )

    save_conversion(conversion, tmp_path)
    loaded = load_conversion(tmp_path)

    assert replace(loaded, cases=()) == replace(conversion, cases=())
    (back,) = loaded.cases
    assert back.feeds["a/b:0"].dtype == np.int8
    assert back.feeds["text"].tolist() == ["x", "yy"]
    np.testing.assert_array_equal(back.outputs["out"], case.outputs["out"])


def test_converter_that_left_no_result_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="ended without a readable result"):
        load_conversion(tmp_path)
