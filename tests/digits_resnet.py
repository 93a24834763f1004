"""The trained digits classifier of the examples as plain ONNX that keeps its BatchNorm, with its data and gradients."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, helper

from onnxprune.contracts import CanonicalModel
from onnxprune.runtime.sessions import ort_runner_from_model
from tests.builders import canonical, proto_of

DIGITS = Path(__file__).resolve().parents[1] / "examples" / "digits"
WEIGHTS = DIGITS / "models" / "classifier.safetensors"
STAGES, BLOCKS_PER_STAGE = 3, 2


def classifier() -> CanonicalModel:
    """`image` [N,1,32,32] -> `logits` [N,10]; initializers are named like the parameters of `resnet.py`."""
    from safetensors.numpy import load_file

    weights = {name: array for name, array in load_file(WEIGHTS).items() if not name.endswith("num_batches_tracked")}
    nodes: list[NodeProto] = []

    def conv_norm(source: str, conv: str, norm: str, *, kernel: int = 3, stride: int = 1) -> str:
        nodes.append(
            helper.make_node(
                "Conv", [source, f"{conv}.weight"], [conv], name=conv, strides=[stride] * 2, pads=[kernel // 2] * 4
            )
        )
        parameters = [f"{norm}.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
        nodes.append(helper.make_node("BatchNormalization", [conv, *parameters], [norm], name=norm))
        return norm

    def relu(source: str) -> str:
        nodes.append(helper.make_node("Relu", [source], [f"{source}.relu"], name=f"{source}.relu"))
        return f"{source}.relu"

    features = relu(conv_norm("image", "stem.0", "stem.1"))
    for stage in range(STAGES):
        for block in range(BLOCKS_PER_STAGE):
            path = f"stages.{stage}.{block}"
            stride = 2 if stage > 0 and block == 0 else 1
            hidden = relu(conv_norm(features, f"{path}.conv1", f"{path}.norm1", stride=stride))
            hidden = conv_norm(hidden, f"{path}.conv2", f"{path}.norm2")
            if f"{path}.shortcut.0.weight" in weights:
                features = conv_norm(features, f"{path}.shortcut.0", f"{path}.shortcut.1", kernel=1, stride=stride)
            nodes.append(helper.make_node("Add", [hidden, features], [f"{path}.sum"], name=f"{path}.sum"))
            features = relu(f"{path}.sum")
    nodes += [
        helper.make_node("GlobalAveragePool", [features], ["pooled"], name="pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], name="flatten"),
        helper.make_node("Gemm", ["flat", "classify.weight", "classify.bias"], ["logits"], name="classify", transB=1),
    ]
    return canonical(
        proto_of(nodes, inputs={"image": ["N", 1, 32, 32]}, outputs={"logits": ["N", 10]}, weights=weights)
    )


def images(part: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Images (N,1,32,32) from 0 to 1 and their labels; `part` is "calibration" or "test"."""
    with np.load(DIGITS / "images" / f"classifier_{part}.npz") as archive:
        labels = archive["label"] if "label" in archive.files else np.zeros(0, np.int64)
        return (archive["image"] / np.float32(255)).astype(np.float32), labels


class Calibration:
    """256 training digits in batches of 32, as `contracts.CalibrationSource`."""

    num_samples = 256
    content_hash = "digits"

    def __iter__(self) -> Any:
        data, _ = images("calibration")
        for start in range(0, len(data), 32):
            yield {"image": data[start : start + 32]}


def top1(model: CanonicalModel) -> float:
    """Share of the test digits that `model` names rightly."""
    data, labels = images("test")
    outputs: Mapping[str, Any] = ort_runner_from_model(model).run({"image": data})
    return float((outputs["logits"].argmax(axis=1) == labels).mean())


def gradients(minibatches: int) -> dict[str, npt.NDArray[np.float32]]:
    """Gradients of the cross-entropy by all parameters, one for each minibatch: name -> (minibatches, *shape)."""
    import torch
    from safetensors.torch import load_file

    spec = importlib.util.spec_from_file_location("digits_resnet_module", DIGITS / "resnet.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.ResNet().eval()
    network.load_state_dict(load_file(WEIGHTS))
    data = torch.from_numpy(images("calibration")[0])
    found: dict[str, list[npt.NDArray[np.float32]]] = {}
    for part in data.tensor_split(minibatches):
        network.zero_grad()
        logits = network(part)
        # The network names its training digits rightly, so that its answers stand for the labels.
        torch.nn.functional.cross_entropy(logits, logits.detach().argmax(dim=1)).backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None
            found.setdefault(name, []).append(parameter.grad.numpy().copy())
    return {name: np.stack(arrays) for name, arrays in found.items()}
