"""The code of docs/howto/prune-criteria.md does what the page says."""

from __future__ import annotations

import re
import types
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import nn

from onnxprune.contracts import ModelState, PassContext
from onnxprune.passes.harness import run_pass
from onnxprune.passes.prune import PruneConfig, PrunePass
from onnxprune.passes.prune.criteria import CRITERIA
from tests.builders import canonical, conv_net, proto_of

PAGE = Path(__file__).resolve().parents[4] / "docs" / "howto" / "prune-criteria.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def script() -> types.ModuleType:
    """The page's script for gradients as a module."""
    module = types.ModuleType("gradients_script")
    exec(BLOCKS[0], module.__dict__)
    return module


class Network(nn.Module):
    """Convolution and BatchNorm, then two square layers, so that only values tell how they lie."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.hidden = nn.Linear(8, 8)
        self.last = nn.Linear(8, 8, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.norm(self.conv(images))).mean(dim=(2, 3))
        result: torch.Tensor = self.last(torch.relu(self.hidden(features)))
        return result


def exported(module: nn.Module) -> onnx.ModelProto:
    """What exporters make of the folded network: one layer as Gemm, the other transposed under another name."""
    weights = {name: tensor.detach().numpy() for name, tensor in module.named_parameters()}
    weights["val_7"] = np.ascontiguousarray(weights.pop("last.weight").T)
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight", "conv.bias"], ["c"], name="conv"),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "hidden.weight", "hidden.bias"], ["h"], name="gemm", transB=1),
        helper.make_node("Relu", ["h"], ["hr"], name="relu2"),
        helper.make_node("MatMul", ["hr", "val_7"], ["y"], name="matmul"),
    ]
    return proto_of(nodes, inputs={"x": ["N", 3, 4, 4]}, outputs={"y": ["N", 8]}, weights=weights)


# torch.fx.experimental.optimization imports what torch itself deprecates.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_the_script_writes_gradients_under_the_names_and_in_the_layout_of_the_onnx_file(
    script: types.ModuleType, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = Network()
    network.norm.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    network.norm.weight.data.uniform_(0.5, 2.0)
    folded = script.fold(network)
    onnx.save(exported(folded), tmp_path / "model.onnx")
    minibatches = [(torch.randn(4, 3, 4, 4), torch.randn(4, 8)) for _ in range(3)]
    file = tmp_path / "gradients.npz"
    script.save_gradients(folded, tmp_path / "model.onnx", minibatches, nn.functional.mse_loss, file)
    with np.load(file) as archive:
        shapes = {name: archive[name].shape for name in archive.files}
        turned = archive["val_7"]
    assert shapes["conv.weight"] == (3, 8, 3, 1, 1)
    assert set(shapes) == {"conv.weight", "conv.bias", "hidden.weight", "hidden.bias", "val_7"}
    last = dict(folded.named_parameters())["last.weight"]
    np.testing.assert_array_equal(turned[2], last.grad.numpy().T)
    settings = PruneConfig(criterion="taylor", gradients=str(file), ratio=0.5, min_channels=1, channel_multiple=1)
    outcome = run_pass(PrunePass(settings), ModelState(model=canonical(exported(folded))), PassContext())
    assert [len(group.removed) for group in outcome.plan.groups] == [4, 4]


def test_the_criterion_of_the_page_ranks_by_the_largest_weight(tmp_path: Path) -> None:
    (tmp_path / "my_criterion.py").write_text(BLOCKS[1], encoding="utf-8")
    spec = f"{tmp_path / 'my_criterion.py'}:largest_weight"
    settings = PruneConfig(criterion=spec, ratio=0.5, min_channels=1, channel_multiple=1)
    model = conv_net()
    outcome = run_pass(PrunePass(settings), ModelState(model=model), PassContext())
    filters = [model.graph.initializers[name].const_value.numpy() for name in ("stem.weight", "block.weight")]  # type: ignore[union-attr]
    largest = np.max([np.abs(array).max(axis=(1, 2, 3)) for array in filters], axis=0)
    assert outcome.plan.groups[0].removed == tuple(sorted(np.argsort(largest)[:8].tolist()))


def test_the_page_lists_every_criterion() -> None:
    listed = re.findall(r"^\| `([a-z0-9-]+)`", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name in listed if name in CRITERIA] == list(CRITERIA)
