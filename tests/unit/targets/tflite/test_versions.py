"""Versions of operators: those that TensorFlow's converter wrote into its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxprune.targets.tflite.graph import Constant, Graph, Operator, OptionValue, Quantization, Tensor
from onnxprune.targets.tflite.schema import schema
from onnxprune.targets.tflite.versions import operator_version

pytest.importorskip("ai_edge_litert")

FILES = (
    "resnet8_cifar10_float",
    "resnet8_cifar10_int8",
    "kws_float",
    "kws_int8",
    "vww_96_float",
    "vww_96_int8",
)


@dataclass(frozen=True)
class Read:
    """The first graph of a file, and the version that the file gives to each kind."""

    graph: Graph
    versions: Mapping[str, int]


def read(content: bytes) -> Read:
    module = schema()
    model = module.ModelT.InitFromPackedBuf(content)
    subgraph = model.subgraphs[0]
    kinds = _names(module.BuiltinOperator)
    codes = [(kinds[max(code.builtinCode, code.deprecatedBuiltinCode)], code.version) for code in model.operatorCodes]
    tensors = [_tensor(module, model, one, index) for index, one in enumerate(subgraph.tensors)]
    operators = tuple(
        Operator(
            kind=codes[one.opcodeIndex][0],
            inputs=tuple(tensors[index].name if index >= 0 else "" for index in one.inputs),
            outputs=tuple(tensors[index].name for index in one.outputs),
            options=_options(module, one.builtinOptions),
        )
        for one in subgraph.operators
    )
    graph = Graph(name="main", tensors={one.name: one for one in tensors}, operators=operators, inputs=(), outputs=())
    return Read(graph, dict(codes))


def _names(enumeration: type) -> dict[int, str]:
    return {value: name for name, value in vars(enumeration).items() if not name.startswith("_")}


def _tensor(module: Any, model: Any, tensor: Any, index: int) -> Tensor:
    content = model.buffers[tensor.buffer].data
    form = tensor.quantization
    has_scales = form is not None and form.scale is not None and len(form.scale)
    return Tensor(
        name=f"t{index}",
        type=_names(module.TensorType)[tensor.type],
        shape=tuple(int(dim) for dim in tensor.shape) if tensor.shape is not None else (),
        constant=Constant.of(np.zeros(0)) if content is not None and len(content) else None,
        quantization=Quantization(
            scales=tuple(map(float, form.scale)),
            zero_points=tuple(map(int, form.zeroPoint)),
            axis=int(form.quantizedDimension),
        )
        if has_scales
        else None,
    )


def _options(module: Any, table: Any) -> dict[str, OptionValue]:
    found = {} if table is None else {name: value for name, value in vars(table).items() if value is not None}
    if "fusedActivationFunction" in found:
        found["fusedActivationFunction"] = _names(module.ActivationFunctionType)[found["fusedActivationFunction"]]
    return found


def highest_versions(graph: Graph) -> dict[str, int]:
    """One version for each kind, as the converter writes it: the highest that one of its operators wants."""
    found: dict[str, int] = {}
    for operator in graph.operators:
        found[operator.kind] = max(found.get(operator.kind, 1), operator_version(operator, graph))
    return found


def used_versions(made: Read) -> dict[str, int]:
    """What the file says of kinds that it has operators of: the quantizer leaves others behind."""
    return {operator.kind: made.versions[operator.kind] for operator in made.graph.operators}


@pytest.mark.parametrize("name", FILES)
def test_versions_are_those_of_the_converters_file(name: str, shared_data: Path) -> None:
    path = shared_data / "mlperf_tiny_models" / f"{name}.tflite"
    if not path.exists():
        pytest.skip(f"the shared data lack {path.name}")

    made = read(path.read_bytes())

    # That file's FULLY_CONNECTED is float: its weight was too small for the quantizer, which had counted it already.
    wanted = {**used_versions(made), **({"FULLY_CONNECTED": 1} if name == "kws_float" else {})}
    assert highest_versions(made.graph) == wanted


def keras_model() -> Any:
    """One of each operator that a converter meets most."""
    keras = pytest.importorskip("keras")
    layers = keras.layers
    x = image = keras.Input((16, 16, 3), batch_size=1)
    x = layers.Conv2D(32, 3, strides=2, padding="same", activation="relu")(x)
    x = layers.Conv2D(32, 3, padding="same", dilation_rate=2)(x)
    x = layers.Conv2D(32, 3, padding="same", groups=2, activation="relu6")(x)
    x = layers.DepthwiseConv2D(3, padding="same")(x)
    y = layers.LeakyReLU(0.1)(x)
    x = layers.Concatenate()([layers.Add()([x, y]), layers.Multiply()([x, y]), layers.Maximum()([x, y])])
    x = layers.MaxPool2D()(x)
    x = layers.UpSampling2D(2, interpolation="bilinear")(x)
    x = layers.UpSampling2D(2)(x)
    x = layers.ZeroPadding2D(1)(x)
    x = layers.Conv2DTranspose(32, 3, strides=2, padding="same")(x)
    x = layers.AveragePooling2D(2)(x)
    x = layers.Activation("tanh")(x)
    x = layers.Permute((2, 1, 3))(x)
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dense(64, activation="sigmoid")(x)
    x = layers.Dense(20, use_bias=False)(x)
    return keras.Model(image, layers.Softmax()(x))


def float32(_converter: Any, _tf: Any) -> None:
    """As it is."""


def float16(converter: Any, tf: Any) -> None:
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.target_spec.supported_types = [tf.float16]


def dynamic(converter: Any, tf: Any) -> None:
    converter.optimizations = [tf.lite.Optimize.DEFAULT]


def int8(converter: Any, tf: Any) -> None:
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    rng = np.random.default_rng(0)
    converter.representative_dataset = lambda: (
        [rng.standard_normal((1, 16, 16, 3)).astype(np.float32)] for _ in range(4)
    )


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("tensorflow")
    folder = tmp_path_factory.mktemp("keras") / "saved"
    keras_model().export(folder, format="tf_saved_model", verbose=False)
    return str(folder)


@pytest.mark.parametrize("settings", [float32, float16, dynamic, int8])
def test_versions_are_those_of_a_model_converted_here(settings: Callable[[Any, Any], None], saved_model: str) -> None:
    tf = pytest.importorskip("tensorflow")
    converter = tf.lite.TFLiteConverter.from_saved_model(saved_model)
    settings(converter, tf)

    made = read(converter.convert())

    # A scale for each unit: the converter says 4, and we say 12, where such scales were specified.
    wanted = {**used_versions(made), **({"FULLY_CONNECTED": 12} if settings is int8 else {})}
    assert highest_versions(made.graph) == wanted
