"""What factories may return, and what is said when they return something else or fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onnxprune.convert.pytorch_factory import as_torch_model
from onnxprune.convert.source import SourceRequest, open_source
from onnxprune.errors import ModelError, PluginError, UsageError

pytestmark = pytest.mark.usefixtures("convert_here")


@pytest.fixture
def net(torch: Any, write_module: Callable[..., Path]) -> Path:
    return write_module()


def test_module_alone_tuple_and_dict_are_read(torch: Any) -> None:
    module, image = torch.nn.Linear(3, 2), torch.ones(1, 3)

    alone = as_torch_model(module, subject="f")
    pair = as_torch_model((module, image), subject="f")
    triple = as_torch_model((module, (image,), {"input": None}), subject="f")
    named = as_torch_model(
        {
            "module": module,
            "example_inputs": {"input": image},
            "output_names": ["y"],
            "metadata": {"labels": ["a", "b"]},
        },
        subject="f",
    )

    assert alone.args is None
    assert pair.args == triple.args == (image,)
    assert triple.dynamic_shapes == {"input": None}
    assert (named.args, dict(named.kwargs), named.output_names) == ((), {"input": image}, ("y",))
    assert json.loads(named.metadata["labels"]) == ["a", "b"]


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        (None, r"returned nothing \(None\) where an nn.Module belongs"),
        ("net", "an object of type 'str'"),
        ((), "returned a tuple of 0"),
        ({"modul": 1}, r"unknown keys 'modul'.*Did you mean 'module'\?"),
    ],
)
def test_anything_else_is_refused(torch: Any, returned: object, reason: str) -> None:
    with pytest.raises(PluginError, match=reason):
        as_torch_model(returned, subject="f")


def test_class_instead_of_an_instance_is_explained(torch: Any) -> None:
    with pytest.raises(PluginError, match=r"return an instance, 'Linear\(\)'"):
        as_torch_model(torch.nn.Linear, subject="f")


def test_state_dict_instead_of_a_module_is_explained(torch: Any) -> None:
    with pytest.raises(PluginError, match="returned a state dict, not a module"):
        as_torch_model(torch.nn.Linear(2, 2).state_dict(), subject="f")


def test_factory_with_shape_is_converted_with_names_and_module_paths(net: Path) -> None:
    converted = open_source(SourceRequest(source=f"{net}:make", shapes={"image": (1, 3, 16, 16)}))

    report = converted.report
    assert [(spec.name, spec.dtype, spec.shape) for spec in report.inputs] == [("image", "float32", (1, 3, 16, 16))]
    assert [(spec.name, spec.shape) for spec in report.outputs] == [("output", (1, 5))]
    assert report.shape_used == {"image": (1, 3, 16, 16)}
    assert report.difference is not None
    assert report.difference.max_rel < 1e-5
    assert 18 <= report.opset <= 24
    paths = {node.op_type: node.metadata_props.get("onnxprune.module_path") for node in converted.model.graph}
    assert paths["Conv"] in ("backbone.0", "backbone.1")
    assert paths["Gemm"] == "head"


def test_nothing_of_this_machine_is_left_in_the_model(net: Path) -> None:
    model = open_source(SourceRequest(source=f"{net}:make", shapes={"image": (1, 3, 16, 16)})).model

    texts = [*model.metadata_props.values(), *model.graph.metadata_props.values()]
    texts += [text for node in model.graph for text in (*node.metadata_props.values(), node.doc_string or "")]
    assert not [text for text in texts if str(net.parent) in text or "site-packages" in text]


def test_axis_with_a_name_stays_dynamic(net: Path) -> None:
    report = open_source(SourceRequest(source=f"{net}:make", shapes={"image": ("batch", 3, 16, 16)})).report

    assert report.inputs[0].shape == ("batch", 3, 16, 16)
    assert report.outputs[0].shape == ("batch", 5)
    assert report.num_comparisons == 3


def test_training_mode_of_a_factory_does_not_matter(torch: Any, write_module: Callable[..., Path]) -> None:
    net = write_module(
        """
        import torch
        def make():
            return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5)).train(), torch.ones(1, 4)
        """
    )

    report = open_source(SourceRequest(source=f"{net}:make")).report

    assert report.difference is not None
    assert report.difference.max_abs < 1e-6


def test_shape_of_the_example_inputs_can_be_replaced(net: Path) -> None:
    report = open_source(SourceRequest(source=f"{net}:make_with_inputs", shapes={"image": (2, 3, 20, 20)})).report

    assert report.inputs[0].shape == (2, 3, 20, 20)


def test_inputs_and_outputs_can_be_renamed(net: Path) -> None:
    request = SourceRequest(source=f"{net}:make_with_inputs", inputs=("picture",), outputs=("scores",))

    report = open_source(request).report

    assert [spec.name for spec in report.inputs] == ["picture"]
    assert [spec.name for spec in report.outputs] == ["scores"]


def test_too_many_output_names_are_refused(net: Path) -> None:
    with pytest.raises(UsageError, match=r"2 output names are given \('a', 'b'\), but the model has 1 outputs"):
        open_source(SourceRequest(source=f"{net}:make_with_inputs", outputs=("a", "b")))


def test_weights_are_loaded_into_the_factory_s_module(torch: Any, net: Path, tmp_path: Path) -> None:
    bias = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    weights = {
        "module.backbone.0.weight": torch.zeros(8, 3, 3, 3),
        "module.backbone.0.bias": torch.zeros(8),
        "module.backbone.1.weight": torch.ones(8),
        "module.backbone.1.bias": torch.zeros(8),
        "module.backbone.1.running_mean": torch.zeros(8),
        "module.backbone.1.running_var": torch.ones(8),
        "module.head.weight": torch.zeros(5, 8),
        "module.head.bias": bias,
    }
    torch.save({"state_dict": weights, "classes": list("abcde")}, tmp_path / "w.pth")

    converted = open_source(SourceRequest(source=f"{net}:make_with_inputs", weights=tmp_path / "w.pth"))

    biases = [v.const_value.numpy().tolist() for v in converted.model.graph.initializers.values() if v.const_value]
    assert bias.tolist() in biases
    assert converted.report.notes == (
        "The weights are those under 'state_dict' in the checkpoint.",
        "The prefix 'module.' was taken off the names of the weights.",
    )
    assert json.loads(converted.model.metadata_props["labels"]) == list("abcde")


def test_missing_shape_is_asked_for_with_what_the_first_layer_tells(net: Path) -> None:
    with pytest.raises(ModelError, match=r"'Net' needs example inputs.*--shape image=1,3,HEIGHT,WIDTH"):
        open_source(SourceRequest(source=f"{net}:make"))


def test_shape_for_an_unknown_argument_suggests_the_nearest(net: Path) -> None:
    with pytest.raises(UsageError, match=r"'imge', which is no argument of forward.*Did you mean 'image'\?"):
        open_source(SourceRequest(source=f"{net}:make", shapes={"imge": (1, 3, 16, 16)}))


def test_shape_that_the_module_can_t_take_names_the_line(net: Path) -> None:
    with pytest.raises(PluginError, match=r"Module 'Net' failed at .*net.py:\d+: RuntimeError: .*--shape"):
        open_source(SourceRequest(source=f"{net}:make", shapes={"image": (1, 4, 16, 16)}))


def test_factory_that_raises_is_an_error_with_file_and_line(write_module: Callable[..., Path]) -> None:
    net = write_module("def make():\n    raise ValueError('bad width')\n")

    with pytest.raises(PluginError, match=r"Factory '.*net.py:make' failed at .*net.py:2: ValueError: bad width"):
        open_source(SourceRequest(source=f"{net}:make"))


def test_factory_that_does_not_exist_suggests_the_nearest(write_module: Callable[..., Path]) -> None:
    net = write_module("def make_net():\n    pass\n")

    with pytest.raises(UsageError, match=r"there is no function 'make_nett'.*Did you mean 'make_net'\?"):
        open_source(SourceRequest(source=f"{net}:make_nett"))


def test_factory_with_required_arguments_is_explained(write_module: Callable[..., Path]) -> None:
    net = write_module("def make(width):\n    pass\n")

    with pytest.raises(PluginError, match=r"needs the arguments 'width', but is called without any"):
        open_source(SourceRequest(source=f"{net}:make"))


def test_syntax_error_in_the_factory_s_file_names_the_line(write_module: Callable[..., Path]) -> None:
    net = write_module("def make(:\n    pass\n")

    with pytest.raises(PluginError, match=r"net.py:1: SyntaxError"):
        open_source(SourceRequest(source=f"{net}:make"))


def test_forward_that_can_t_be_traced_is_refused_with_the_reason(torch: Any, write_module: Callable[..., Path]) -> None:
    net = write_module(
        """
        import torch
        class Net(torch.nn.Module):
            def forward(self, x):
                return x * 2 if x.sum().item() > 0 else x
        def make():
            return Net(), torch.ones(1, 3)
        """
    )

    with pytest.raises(ModelError, match=r"PyTorch's exporter can't convert 'Net': .*data-dependent"):
        open_source(SourceRequest(source=f"{net}:make"))
