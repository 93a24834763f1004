"""TensorFlow, Keras and TFLite sources, converted and compared."""

from __future__ import annotations

import io
import json
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxprune.convert.report import ConvertedModel
from onnxprune.convert.source import SourceRequest, open_source
from onnxprune.errors import ModelError, OnnxPruneError, UsageError
from onnxprune.runtime.sessions import ort_runner_from_model

pytestmark = pytest.mark.usefixtures("tf")


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class Sources:
    """The same small networks in every format."""

    sequential: Any
    two_headed: Any
    folder: Path

    def path(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="module")
def sources(tf: Any, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    import keras

    folder = tmp_path_factory.mktemp("tensorflow")
    keras.utils.set_random_seed(0)
    layers = keras.layers
    sequential = keras.Sequential(
        [
            keras.Input((12, 12, 3), name="image"),
            layers.Conv2D(4, 3, strides=2, padding="same"),
            layers.BatchNormalization(),
            layers.ReLU(6.0),
            layers.DepthwiseConv2D(3, padding="same"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(5, activation="softmax", name="probabilities"),
        ]
    )
    image, extra = keras.Input((8, 8, 3), name="image"), keras.Input((2,), name="extra")
    features = layers.Flatten()(layers.Conv2D(3, 3, name="stem")(image))
    joined = layers.Concatenate()([features, extra])
    two_headed = keras.Model(
        [image, extra], [layers.Dense(4, name="zebra")(joined), layers.Dense(2, name="ant")(joined)]
    )
    with _quiet():
        sequential.save(folder / "net.keras")
        sequential.save(folder / "net.h5")
        two_headed.save(folder / "two.keras")
        _save_signatures(tf, folder / "saved")
        _save_frozen(tf, folder / "frozen.pb")
    return Sources(sequential=sequential, two_headed=two_headed, folder=folder)


def _save_signatures(tf: Any, folder: Path) -> None:
    module = tf.Module()
    module.weight = tf.Variable(np.arange(12, dtype=np.float32).reshape(3, 4))

    @tf.function(input_signature=[tf.TensorSpec([None, 3], tf.float32, name="features")])
    def score(features: Any) -> dict[str, Any]:
        return {"zoo": features @ module.weight, "ape": tf.nn.relu(features)}

    @tf.function(input_signature=[tf.TensorSpec([1, 3], tf.float32, name="row")])
    def double(row: Any) -> dict[str, Any]:
        return {"twice": row * 2}

    tf.saved_model.save(module, str(folder), signatures={"score": score, "double": double})
    (folder / "assets").mkdir(exist_ok=True)
    (folder / "assets" / "labels.txt").write_text("cat\ndog\n")


def _save_frozen(tf: Any, path: Path) -> None:
    with tf.Graph().as_default() as graph:
        x = tf.compat.v1.placeholder(tf.float32, [None, 6], name="x")
        weight = tf.constant(np.linspace(-1, 1, 12, dtype=np.float32).reshape(6, 2))
        tf.nn.softmax(tf.matmul(x, weight), name="y")
    path.write_bytes(graph.as_graph_def().SerializeToString())


def _convert(source: object, **options: Any) -> ConvertedModel:
    with _quiet():
        return open_source(SourceRequest(source=source, **options))


def _max_rel(converted: ConvertedModel) -> float:
    assert converted.report.difference is not None
    return converted.report.difference.max_rel


@pytest.mark.usefixtures("convert_here")
@pytest.mark.parametrize("name", ["net.keras", "net.h5"])
def test_keras_file_keeps_names_nhwc_and_its_dynamic_batch(sources: Sources, name: str) -> None:
    converted = _convert(sources.path(name))

    report = converted.report
    assert [(spec.name, spec.shape) for spec in report.inputs] == [("image", ("batch", 12, 12, 3))]
    assert [(spec.name, spec.shape) for spec in report.outputs] == [("probabilities", ("batch", 5))]
    assert report.shape_used == {"image": (1, 12, 12, 3)}
    assert report.num_comparisons == 2
    assert _max_rel(converted) < 1e-5


@pytest.mark.usefixtures("convert_here")
def test_result_computes_what_keras_computes(sources: Sources) -> None:
    image = np.random.default_rng(3).standard_normal((4, 12, 12, 3)).astype(np.float32)

    outputs = ort_runner_from_model(_convert(sources.path("net.keras")).model).run({"image": image})

    expected = sources.sequential(image, training=False).numpy()
    # Float32 sums of a few hundred terms in another order.
    np.testing.assert_allclose(outputs["probabilities"], expected, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("convert_here")
def test_statistics_of_a_normalization_layer_are_constants_and_no_inputs(tf: Any, tmp_path: Path) -> None:
    import keras

    normalization = keras.layers.Normalization(mean=[0.5, -1.0, 2.0], variance=[4.0, 0.25, 9.0])
    network = keras.Sequential([keras.Input((6, 6, 3), name="image"), normalization, keras.layers.Conv2D(2, 3)])
    with _quiet():
        network.save(tmp_path / "normalized.keras")

    converted = _convert(tmp_path / "normalized.keras")

    assert [spec.name for spec in converted.report.inputs] == ["image"]
    assert _max_rel(converted) < 1e-5


@pytest.mark.usefixtures("convert_here")
def test_batch_is_fixed_by_a_shape(sources: Sources) -> None:
    report = _convert(sources.path("net.keras"), shapes={"image": (2, 12, 12, 3)}).report

    assert report.inputs[0].shape == (2, 12, 12, 3)
    assert report.outputs[0].shape == (2, 5)
    assert report.shape_used == {"image": (2, 12, 12, 3)}


@pytest.mark.usefixtures("convert_here")
def test_shape_that_contradicts_the_model_is_refused(sources: Sources) -> None:
    with pytest.raises(UsageError, match=r"--shape image=1,24,24,3 does not fit"):
        _convert(sources.path("net.keras"), shapes={"image": (1, 24, 24, 3)})
    with pytest.raises(UsageError, match=r"'imge', which is no input.*Did you mean 'image'\?"):
        _convert(sources.path("net.keras"), shapes={"imge": (1, 12, 12, 3)})


@pytest.mark.usefixtures("convert_here")
def test_several_inputs_and_outputs_keep_their_order(sources: Sources) -> None:
    converted = _convert(sources.path("two.keras"))

    assert [spec.name for spec in converted.report.inputs] == ["image", "extra"]
    assert [spec.name for spec in converted.report.outputs] == ["zebra", "ant"]
    assert _max_rel(converted) < 1e-5


@pytest.mark.usefixtures("convert_here")
def test_keras_object_is_converted_and_stays_as_it_was(sources: Sources) -> None:
    weights = [value.copy() for value in sources.two_headed.get_weights()]

    converted = _convert(sources.two_headed)

    assert [spec.name for spec in converted.report.inputs] == ["image", "extra"]
    assert [spec.name for spec in converted.report.outputs] == ["zebra", "ant"]
    assert _max_rel(converted) < 1e-5
    assert all(np.array_equal(a, b) for a, b in zip(weights, sources.two_headed.get_weights(), strict=True))


@pytest.mark.usefixtures("convert_here")
def test_module_paths_come_from_the_layers(sources: Sources) -> None:
    model = _convert(sources.path("two.keras")).model

    paths = [node.metadata_props.get("onnxprune.module_path", "") for node in model.graph if node.op_type == "Conv"]
    assert len(paths) == 1
    assert "stem" in paths[0]


@pytest.mark.usefixtures("convert_here")
def test_signature_is_chosen_by_name(sources: Sources) -> None:
    scored = _convert(sources.path("saved"), signature="score")
    doubled = _convert(sources.path("saved"), signature="double")

    assert [spec.name for spec in scored.report.inputs] == ["features"]
    # A signature is a map without an order.
    assert [spec.name for spec in scored.report.outputs] == ["ape", "zoo"]
    assert json.loads(scored.model.metadata_props["labels"]) == ["cat", "dog"]
    assert doubled.report.inputs[0].shape == (1, 3)
    assert max(_max_rel(scored), _max_rel(doubled)) < 1e-5


@pytest.mark.usefixtures("convert_here")
def test_several_signatures_without_a_default_have_to_be_chosen_from(sources: Sources) -> None:
    with pytest.raises(UsageError, match=r"several signatures.*--signature: .*score"):
        _convert(sources.path("saved"))
    with pytest.raises(UsageError, match=r"no signature 'scor'.*Did you mean 'score'\?"):
        _convert(sources.path("saved"), signature="scor")


@pytest.mark.usefixtures("convert_here")
def test_frozen_graph_is_converted_between_named_tensors(sources: Sources) -> None:
    converted = _convert(sources.path("frozen.pb"), inputs=("x:0",), outputs=("y",))

    assert [(spec.name, spec.shape) for spec in converted.report.inputs] == [("x", ("batch", 6))]
    assert [spec.name for spec in converted.report.outputs] == ["y"]
    assert _max_rel(converted) < 1e-5


@pytest.mark.usefixtures("convert_here")
def test_frozen_graph_needs_its_tensors_named(sources: Sources) -> None:
    with pytest.raises(UsageError, match="--inputs input:0 --outputs"):
        _convert(sources.path("frozen.pb"))
    with pytest.raises(UsageError, match=r"--inputs: the graph has no tensor 'xx'.*Did you mean 'x'\?"):
        _convert(sources.path("frozen.pb"), inputs=("xx",), outputs=("y",))


@pytest.mark.usefixtures("convert_here")
def test_graph_that_would_run_python_or_write_files_is_refused(tf: Any, tmp_path: Path) -> None:
    with tf.Graph().as_default() as graph:
        x = tf.compat.v1.placeholder(tf.float32, [1], name="x")
        with tf.control_dependencies([tf.io.write_file(str(tmp_path / "ran"), "x")]):
            tf.identity(x, name="y")
    (tmp_path / "bad.pb").write_bytes(graph.as_graph_def().SerializeToString())

    with pytest.raises(ModelError, match=r"operators 'WriteFile' run Python code or touch files"):
        _convert(tmp_path / "bad.pb", inputs=("x",), outputs=("y",))

    assert not (tmp_path / "ran").exists()


@pytest.mark.usefixtures("convert_here")
def test_saved_model_that_would_write_files_is_refused(tf: Any, tmp_path: Path) -> None:
    module = tf.Module()

    @tf.function(input_signature=[tf.TensorSpec([1], tf.float32, name="x")])
    def call(x: Any) -> Any:
        tf.io.write_file(str(tmp_path / "ran"), "x")
        return {"y": x}

    with _quiet():
        tf.saved_model.save(module, str(tmp_path / "saved"), signatures=call)

    with pytest.raises(ModelError, match="'WriteFile'"):
        _convert(tmp_path / "saved")

    assert not (tmp_path / "ran").exists()


@pytest.mark.usefixtures("convert_here")
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_lambda_layer_s_code_does_not_run_unless_trusted(
    tf: Any, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import keras

    marker = tmp_path / "ran"
    # The path is a constant of the code: that is all of a function that Keras writes to the file.
    code = eval(f"lambda x: (open({str(marker)!r}, 'w').close(), x)[1]")
    net = keras.Sequential([keras.Input((3,), name="x"), keras.layers.Lambda(code)])
    with _quiet():
        net.save(tmp_path / f"net{suffix}")
    marker.unlink()

    with pytest.raises(ModelError, match=r"is a Lambda, whose Python code would run.*--trust-source"):
        _convert(tmp_path / f"net{suffix}")
    assert not marker.exists()

    assert _max_rel(_convert(tmp_path / f"net{suffix}", trust_source=True)) == 0.0
    assert marker.exists()


@pytest.mark.usefixtures("convert_here")
def test_custom_layer_is_refused_with_the_way_out(tf: Any, tmp_path: Path) -> None:
    import keras

    class Mine(keras.layers.Layer):  # type: ignore[misc]
        def call(self, x: Any) -> Any:
            return x * 2

    keras.Sequential([keras.Input((3,)), Mine()]).save(tmp_path / "net.keras")

    with pytest.raises(ModelError, match=r"'Mine'.*convert the object"):
        _convert(tmp_path / "net.keras")


@pytest.mark.usefixtures("convert_here")
@pytest.mark.parametrize("name", ["net.keras", "net.h5", "frozen.pb"])
@pytest.mark.parametrize("kept", [0.3, 0.95])
def test_truncated_file_is_refused(sources: Sources, tmp_path: Path, name: str, kept: float) -> None:
    content = sources.path(name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * kept)])
    tensors = {"inputs": ("x",), "outputs": ("y",)} if name == "frozen.pb" else {}

    with pytest.raises(OnnxPruneError, match=r"damaged|can't load|has no tensor") as caught:
        _convert(tmp_path / name, **tensors)

    assert caught.value.exit_code in (2, 3)


@pytest.mark.usefixtures("convert_here")
def test_saved_model_without_its_variables_is_refused(sources: Sources, tmp_path: Path) -> None:
    shutil.copytree(sources.path("saved"), tmp_path / "saved")
    shutil.rmtree(tmp_path / "saved" / "variables")

    with pytest.raises(ModelError, match=r"can't load SavedModel 'saved'.*variables"):
        _convert(tmp_path / "saved", signature="score")


@pytest.mark.usefixtures("convert_here")
def test_truncated_saved_model_is_refused(sources: Sources, tmp_path: Path) -> None:
    shutil.copytree(sources.path("saved"), tmp_path / "saved")
    content = (tmp_path / "saved" / "saved_model.pb").read_bytes()
    (tmp_path / "saved" / "saved_model.pb").write_bytes(content[: len(content) // 2])

    with pytest.raises(ModelError, match="'saved' is damaged"):
        _convert(tmp_path / "saved", signature="score")


@pytest.mark.usefixtures("convert_here")
def test_labels_packed_into_a_tflite_file_survive(shared_data: Path, tmp_path: Path) -> None:
    content = (shared_data / "mlperf_tiny_models" / "kws_int8.tflite").read_bytes()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("labels.txt", "yes\nno\n")
    (tmp_path / "net.tflite").write_bytes(content + packed.getvalue())

    converted = _convert(tmp_path / "net.tflite")

    assert json.loads(converted.model.metadata_props["labels"]) == ["yes", "no"]


def test_truncated_tflite_that_crashes_tensorflow_is_an_error_here(shared_data: Path, tmp_path: Path) -> None:
    # TensorFlow's interpreter follows offsets behind the end of the file.
    content = (shared_data / "mlperf_tiny_models" / "kws_int8.tflite").read_bytes()
    (tmp_path / "half.tflite").write_bytes(content[: len(content) // 2])

    with pytest.raises(ModelError, match=r"half.tflite.*(crashed in native code|can't be loaded as TFLite)"):
        _convert(tmp_path / "half.tflite")


@dataclass(frozen=True)
class Real:
    """A real model, its interface, and how close the conversion must come."""

    file: str
    input_name: str
    output_name: str
    tolerance: float


@pytest.mark.usefixtures("convert_here")
@pytest.mark.parametrize(
    "real",
    [
        Real("kws_savedmodel", "input_1", "dense", 1e-5),
        Real("resnet8_cifar10.h5", "input_1", "dense", 1e-5),
        Real("resnet8_cifar10_float.tflite", "input_1", "Identity", 1e-5),
        # Quantized: TFLite's own two sets of kernels differ by 0.08 on ResNet-8; rounding, amplified by a softmax.
        Real("kws_float.tflite", "input_1", "Identity", 0.1),
        Real("resnet8_cifar10_int8.tflite", "input_1_int8", "Identity_int8", 0.6),
    ],
    ids=lambda real: real.file,
)
def test_real_model_is_converted(shared_data: Path, real: Real) -> None:
    converted = _convert(shared_data / "mlperf_tiny_models" / real.file)

    assert [spec.name for spec in converted.report.inputs] == [real.input_name]
    assert [spec.name for spec in converted.report.outputs] == [real.output_name]
    assert _max_rel(converted) < real.tolerance


def test_keras_2_file_that_keras_3_refuses_is_converted_in_the_child(shared_data: Path) -> None:
    converted = _convert(shared_data / "mlperf_tiny_models" / "vww_mobilenetv1_025_96.h5")

    assert converted.report.notes == (
        "Written by Keras 2: 'DepthwiseConv2D.groups' left out of the config, which Keras 3 does not read.",
    )
    assert converted.report.inputs[0].shape == ("batch", 96, 96, 3)
    assert _max_rel(converted) < 1e-5


@pytest.mark.usefixtures("convert_here")
def test_converted_int8_model_agrees_with_tflite_on_real_images(shared_data: Path) -> None:
    image_module = pytest.importorskip("PIL.Image")
    lines = (shared_data / "cifar10_ic01" / "labels.csv").read_text().splitlines()
    files = sorted((shared_data / "cifar10_ic01" / "images").iterdir())[:40]
    images = np.stack([np.asarray(image_module.open(file)) for file in files]).astype(np.int16) - 128
    assert len(lines) >= 40

    quantized = ort_runner_from_model(
        _convert(shared_data / "mlperf_tiny_models" / "resnet8_cifar10_int8.tflite").model
    )
    real = ort_runner_from_model(_convert(shared_data / "mlperf_tiny_models" / "resnet8_cifar10_float.tflite").model)

    of_int8 = quantized.run({"input_1_int8": images.astype(np.int8)})["Identity_int8"].argmax(1)
    of_float = real.run({"input_1": (images + 128).astype(np.float32)})["Identity"].argmax(1)
    # Quantization itself changes a class now and then.
    assert np.mean(of_int8 == of_float) >= 0.9
