"""Trained networks on real pictures: int8 keeps what they know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from onnx import NodeProto, helper

from onnxprune.contracts import CanonicalModel, TensorSpec
from onnxprune.convert.onnx_file import load_onnx
from onnxprune.data.labelled import open_labelled
from onnxprune.data.preprocess import Preprocess
from onnxprune.data.source import open_data
from onnxprune.evaluate.classification import ClassificationEvaluator
from onnxprune.runtime.sessions import ort_runner_from_model
from onnxprune.targets.qdq import place, spell
from tests.builders import canonical, proto_of
from tests.quantization import plan_for, signal_to_noise_db

IMAGENET = Preprocess(resize=256, center_crop=224, scale=1 / 255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

PICTURE = (TensorSpec(name="x", dtype="float32", shape=(1, 3, 224, 224)),)


def squeezenet(weights: dict[str, npt.NDArray[Any]]) -> CanonicalModel:
    """SqueezeNet 1.1 as in torchvision, on pictures [1,3,224,224] to scores [1,1000]."""
    nodes: list[NodeProto] = []

    def conv(data: str, name: str, **attributes: Any) -> str:
        nodes.append(
            helper.make_node("Conv", [data, f"{name}.weight", f"{name}.bias"], [f"{name}.raw"], name=name, **attributes)
        )
        nodes.append(helper.make_node("Relu", [f"{name}.raw"], [name], name=f"{name}.relu"))
        return name

    def pool(data: str, name: str) -> str:
        nodes.append(
            helper.make_node("MaxPool", [data], [name], name=name, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
        )
        return name

    data = pool(conv("x", "features.0", strides=[2, 2]), "features.2")
    for index in (3, 4, 6, 7, 9, 10, 11, 12):
        squeezed = conv(data, f"features.{index}.squeeze")
        branches = [
            conv(squeezed, f"features.{index}.expand1x1"),
            conv(squeezed, f"features.{index}.expand3x3", pads=[1] * 4),
        ]
        data = f"features.{index}"
        nodes.append(helper.make_node("Concat", branches, [data], name=data, axis=1))
        if index in (4, 7):
            data = pool(data, f"features.{index + 1}")
    data = conv(data, "classifier.1")
    nodes.append(helper.make_node("GlobalAveragePool", [data], ["pooled"], name="pool"))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["y"], name="flatten"))
    return canonical(proto_of(nodes, inputs={"x": [1, 3, 224, 224]}, outputs={"y": [1, 1000]}, weights=weights))


@pytest.fixture(scope="module")
def trained_squeezenet(shared_data: Path) -> CanonicalModel:
    torch = pytest.importorskip("torch", reason="reading the weights needs torch")
    path = shared_data / "squeezenet1_1" / "squeezenet1_1_torchvision_norm.pth"
    state = torch.load(path, weights_only=True)
    return squeezenet({name: tensor.numpy() for name, tensor in state.items()})


@pytest.fixture(scope="module")
def evaluator(shared_data: Path) -> ClassificationEvaluator:
    labelled = open_labelled(str(shared_data / "imagenet500"), inputs=PICTURE, preprocess=IMAGENET, limit=100)
    return ClassificationEvaluator(labelled)


@pytest.fixture(scope="module")
def float_accuracy(trained_squeezenet: CanonicalModel, evaluator: ClassificationEvaluator) -> float:
    return evaluator.evaluate(ort_runner_from_model(trained_squeezenet)).value


@pytest.mark.slow
@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_squeezenet_in_int8_loses_at_most_two_pictures_of_a_hundred(
    trained_squeezenet: CanonicalModel,
    evaluator: ClassificationEvaluator,
    float_accuracy: float,
    shared_data: Path,
    method: str,
) -> None:
    folder = str(shared_data / "imagenette160_calib200")
    calibration = open_data(folder, inputs=PICTURE, preprocess=IMAGENET, limit=16)

    plan = plan_for(trained_squeezenet, calibration, calibration_method=method)
    # The 7-bit weights of "x86" are exact on every processor that tests run on.
    spelled = spell(trained_squeezenet, plan, place(trained_squeezenet, plan, "x86"), "x86")

    assert float_accuracy > 0.5
    # The noise of the comparison: pictures near a boundary change sides in either direction.
    assert evaluator.evaluate(ort_runner_from_model(spelled)).value >= float_accuracy - 0.02


def test_fastestdet_in_int8_keeps_its_scores_and_its_decoding_in_float(shared_data: Path) -> None:
    model = load_onnx(shared_data / "fastestdet" / "FastestDet.onnx")
    (image,) = model.graph.inputs
    inputs = [TensorSpec(name=image.name or "", dtype="float32", shape=(1, 3, 352, 352))]
    preprocess = Preprocess(resize=(352, 352), scale=1 / 255, channel_order="bgr")
    folder = shared_data / "coco_tiny"
    calibration = open_data(str(folder / "train2017"), inputs=inputs, preprocess=preprocess, limit=16)
    held = open_data(str(folder / "val2017"), inputs=inputs, preprocess=preprocess, limit=8)

    plan = plan_for(model, calibration, calibration_method="percentile")
    placement = place(model, plan, "x86")
    spelled = spell(model, plan, placement, "x86")

    before, after = (
        np.concatenate([runner.run(batch)[output] for batch in held])
        for runner, output in (
            (ort_runner_from_model(graph), graph.graph.outputs[0].name or "") for graph in (model, spelled)
        )
    )
    # Channels are 1 objectness, 4 numbers of a box, 80 classes. onnxruntime's own quantize_static, with weights of
    # 7 bits and MinMax, gives 13.5 and 10.3 dB here.
    assert signal_to_noise_db(before[:, 0], after[:, 0]) > 14.5
    assert signal_to_noise_db(before[:, 5:], after[:, 5:]) > 12
    tail = [node for node in model.graph if node.op_type in ("Sigmoid", "Softmax") or node.outputs[0].is_graph_output()]
    assert {node.op_type for node in tail} == {"Sigmoid", "Softmax", "Concat"}
    assert {node.name for node in tail} <= set(placement.float_nodes)
