"""Keras files looked at as data: code refused, Keras-2 configs rewritten. Nothing here needs TensorFlow."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from onnxprune.convert.tensorflow_keras import load_keras_file, rewrite_keras2_config
from onnxprune.errors import ModelError


@pytest.fixture
def h5py() -> Any:
    if importlib.util.find_spec("h5py") is None:
        pytest.skip("needs h5py: pip install 'onnxprune[tensorflow]'")
    import h5py

    return h5py


def _layer(class_name: str, **config: Any) -> dict[str, Any]:
    return {"class_name": class_name, "config": {"name": "x", **config}}


def _sequential(*layers: dict[str, Any]) -> dict[str, Any]:
    return {"class_name": "Sequential", "config": {"name": "net", "layers": list(layers)}}


def _keras_archive(path: Path, config: Any) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", config if isinstance(config, str) else json.dumps(config))
        archive.writestr("metadata.json", "{}")
        archive.writestr("model.weights.h5", b"")
    return path


def _h5(h5py: Any, path: Path, config: Any) -> Path:
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = json.dumps(config)
        file.create_group("model_weights")
    return path


@pytest.mark.parametrize(
    ("class_name", "key", "value"),
    [
        ("DepthwiseConv2D", "groups", 1),
        ("Conv2DTranspose", "groups", 1),
        ("SeparableConv2D", "kernel_initializer", {"class_name": "GlorotUniform", "config": {"seed": None}}),
        ("LSTM", "time_major", False),
        ("GRU", "time_major", False),
        ("SpatialDropout2D", "noise_shape", None),
        ("MultiHeadAttention", "query_shape", [None, 3, 4]),
    ],
)
def test_what_keras_3_does_not_read_is_left_out(class_name: str, key: str, value: object) -> None:
    config = _sequential(_layer(class_name, units=4, **{key: value}))

    rewritten, dropped = rewrite_keras2_config(config)

    assert dropped == [f"{class_name}.{key}"]
    assert rewritten == _sequential(_layer(class_name, units=4))
    assert config == _sequential(_layer(class_name, units=4, **{key: value}))


@pytest.mark.parametrize(
    ("class_name", "key", "value"), [("DepthwiseConv2D", "groups", 2), ("LSTM", "time_major", True)]
)
def test_value_that_means_something_stays_for_keras_to_refuse(class_name: str, key: str, value: object) -> None:
    config = _sequential(_layer(class_name, **{key: value}))

    assert rewrite_keras2_config(config) == (config, [])


def test_ordinary_convolution_keeps_its_groups() -> None:
    config = _sequential(_layer("Conv2D", groups=1))

    assert rewrite_keras2_config(config) == (config, [])


def test_layer_inside_a_wrapper_gets_the_module_that_keras_3_looks_for() -> None:
    config = _sequential(_layer("Bidirectional", layer=_layer("LSTM", units=3, time_major=False)))

    rewritten, dropped = rewrite_keras2_config(config)

    inner = rewritten["config"]["layers"][0]["config"]["layer"]
    assert dropped == ["LSTM.time_major"]
    assert (inner["module"], inner["config"]) == ("keras.layers", {"name": "x", "units": 3})


@pytest.mark.parametrize(
    "config",
    [
        _sequential(_layer("Lambda", function=["4wEAAAA=", None, None])),
        _sequential(_layer("Dense", activation={"class_name": "__lambda__", "config": {"value": ["4wEAAAA="]}})),
        _sequential(_layer("TimeDistributed", layer=_layer("Lambda", function=["4wEAAAA="]))),
    ],
    ids=["layer", "activation", "inside a wrapper"],
)
def test_lambda_is_refused_in_both_formats(h5py: Any, tmp_path: Path, config: dict[str, Any]) -> None:
    files = [_keras_archive(tmp_path / "m.keras", config), _h5(h5py, tmp_path / "m.h5", config)]

    for file in files:
        with pytest.raises(ModelError, match=r"is refused: .*Lambda.*--trust-source"):
            load_keras_file(file, tmp_path, trust_source=False)


def test_class_of_another_package_is_refused_before_anything_is_imported(tmp_path: Path) -> None:
    layer = {"class_name": "system", "module": "os", "config": {"name": "x"}, "registered_name": "system"}
    file = _keras_archive(tmp_path / "m.keras", _sequential(layer))

    with pytest.raises(ModelError, match=r"uses the class 'system' of 'os', which is not part of Keras \(layer 'x'\)"):
        load_keras_file(file, tmp_path, trust_source=False)


def test_member_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    file = _keras_archive(tmp_path / "m.keras", _sequential())
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("../escape.txt", "x")

    with pytest.raises(ModelError, match=r"'../escape.txt' would be written outside its folder"):
        load_keras_file(file, tmp_path, trust_source=False)


def test_archive_that_fills_the_disk_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("model.weights.h5", bytes(128 << 20))

    with pytest.raises(ModelError, match="unpacks to far more than a model"):
        load_keras_file(tmp_path / "m.keras", tmp_path, trust_source=False)


def test_config_that_is_no_json_is_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is damaged"):
        load_keras_file(_keras_archive(tmp_path / "m.keras", "{not json"), tmp_path, trust_source=False)


def test_link_into_another_file_is_refused(h5py: Any, tmp_path: Path) -> None:
    file = _h5(h5py, tmp_path / "m.h5", _sequential())
    with h5py.File(file, "a") as opened:
        opened["model_weights"]["dense"] = h5py.ExternalLink("/etc/other.h5", "/x")

    with pytest.raises(ModelError, match="'/model_weights/dense' is a link into another file"):
        load_keras_file(file, tmp_path, trust_source=False)


def test_weight_that_is_read_from_another_file_is_refused(h5py: Any, tmp_path: Path) -> None:
    file = _h5(h5py, tmp_path / "m.h5", _sequential())
    with h5py.File(file, "a") as opened:
        opened.create_dataset("model_weights/kernel", (4,), "f4", external=[(str(tmp_path / "secret"), 0, 16)])

    with pytest.raises(ModelError, match="'model_weights/kernel' is to be read from another file"):
        load_keras_file(file, tmp_path, trust_source=False)


def test_weights_without_a_structure_are_explained(h5py: Any, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file.attrs["layer_names"] = ["dense"]

    with pytest.raises(ModelError, match=r"has weights only, no structure.*model.save"):
        load_keras_file(tmp_path / "m.h5", tmp_path, trust_source=False)


def test_hdf5_file_of_something_else_is_explained(h5py: Any, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file.create_dataset("temperature", data=[1.0])

    with pytest.raises(ModelError, match="an HDF5 file, but not a Keras model"):
        load_keras_file(tmp_path / "m.h5", tmp_path, trust_source=False)


def test_truncated_hdf5_is_called_damaged(h5py: Any, tmp_path: Path) -> None:
    content = _h5(h5py, tmp_path / "m.h5", _sequential()).read_bytes()
    (tmp_path / "m.h5").write_bytes(content[: len(content) // 2])

    with pytest.raises(ModelError, match="is damaged"):
        load_keras_file(tmp_path / "m.h5", tmp_path, trust_source=False)
