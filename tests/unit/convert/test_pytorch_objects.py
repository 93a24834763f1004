"""Modules and ExportedPrograms that the caller holds: exported in this process, and left as they were."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxprune.convert.report import ConvertedModel, SourceKind
from onnxprune.convert.source import SourceRequest, open_source
from onnxprune.errors import ModelError, PluginError, UsageError
from onnxprune.runtime.sessions import ort_runner_from_model


def _convert(source: object, **options: Any) -> ConvertedModel:
    return open_source(SourceRequest(source=source, **options))


def _max_rel(converted: ConvertedModel) -> float:
    assert converted.report.difference is not None
    return converted.report.difference.max_rel


def test_module_keeps_the_mode_of_every_submodule(torch: Any) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(4))
    module[2].eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}

    converted = _convert(module, example_inputs=torch.ones(2, 4))

    assert [child.training for child in module] == [True, True, False]
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert converted.report.kind is SourceKind.TORCH_OBJECT
    assert converted.report.source_name == "Sequential"
    assert _max_rel(converted) < 1e-5


def test_several_inputs_and_structured_outputs_get_good_names(torch: Any) -> None:
    class Net(torch.nn.Module):
        def forward(self, image: Any, scale: Any) -> dict[str, Any]:
            return {"boxes": image * scale, "scores": (image.sum(1), image.mean(1))}

    report = _convert(Net(), example_inputs=(torch.ones(1, 3, 4), torch.ones(1, 1, 1))).report

    assert [spec.name for spec in report.inputs] == ["image", "scale"]
    assert [spec.name for spec in report.outputs] == ["boxes", "scores_0", "scores_1"]


def test_tuple_outputs_are_numbered_and_output_names_win(torch: Any) -> None:
    class Net(torch.nn.Module):
        def forward(self, x: Any) -> tuple[Any, Any]:
            return x + 1, x * 2

    numbered = _convert(Net(), example_inputs=torch.ones(1, 3)).report
    named = _convert(Net(), example_inputs=torch.ones(1, 3), outputs=("sum", "product")).report

    assert [spec.name for spec in numbered.outputs] == ["output_0", "output_1"]
    assert [spec.name for spec in named.outputs] == ["sum", "product"]


def test_token_ids_stay_as_the_example_has_them(torch: Any) -> None:
    # Any other value might be out of the table's range.
    module = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 2))
    tokens = torch.tensor([[6, 5, 0]])

    converted = _convert(module, example_inputs={"input": tokens})

    assert converted.report.inputs[0].dtype == "int64"
    assert _max_rel(converted) < 1e-5


def test_embedding_network_gets_integer_inputs_from_a_shape(torch: Any) -> None:
    module = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 2))

    report = _convert(module, shapes={"input": (1, 5)}).report

    assert (report.inputs[0].dtype, report.inputs[0].shape) == ("int64", (1, 5))


def test_dynamic_shapes_are_passed_on_and_named(torch: Any) -> None:
    converted = _convert(
        torch.nn.Conv2d(3, 4, 3),
        example_inputs=torch.ones(2, 3, 8, 8),
        dynamic_shapes={"input": {0: torch.export.Dim("batch")}},
    )

    assert converted.report.inputs[0].shape == ("batch", 3, 8, 8)
    runner = ort_runner_from_model(converted.model)
    assert runner.run({"input": np.zeros((5, 3, 8, 8), np.float32)})["output"].shape == (5, 4, 6, 6)


def test_axis_that_the_module_fixes_can_t_be_dynamic(torch: Any) -> None:
    with pytest.raises(UsageError, match="keeps axis 1 dynamic, which the model fixes: 1,4"):
        _convert(torch.nn.Linear(4, 2), shapes={"input": (1, "width")}, example_inputs=torch.ones(1, 4))


def test_exported_program_object_is_converted(torch: Any) -> None:
    program = torch.export.export(torch.nn.Linear(4, 2).eval(), (torch.ones(1, 4),))

    report = _convert(program).report

    assert (report.inputs[0].name, report.outputs[0].name) == ("input", "output")


def test_exported_program_has_its_inputs_already(torch: Any) -> None:
    program = torch.export.export(torch.nn.Linear(4, 2).eval(), (torch.ones(1, 4),))

    with pytest.raises(UsageError, match="leave 'example_inputs' out"):
        _convert(program, example_inputs=torch.ones(1, 4))


def test_exported_program_s_shapes_are_fixed_where_they_are_dynamic(torch: Any) -> None:
    program = torch.export.export(
        torch.nn.Linear(4, 2).eval(), (torch.ones(3, 4),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )

    report = _convert(program, shapes={"input": (1, 4)}).report

    assert report.inputs[0].shape == (1, 4)
    assert report.shape_used == {"input": (1, 4)}
    with pytest.raises(UsageError, match="changes axis 1, which the model fixes"):
        _convert(program, shapes={"input": (1, 5)})


def test_torchscript_object_is_refused(torch: Any) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2))

    with pytest.raises(ModelError, match="TorchScript module"):
        _convert(scripted)


def test_example_inputs_that_don_t_fit_are_the_user_s_error(torch: Any) -> None:
    with pytest.raises(PluginError, match=r"Module 'Linear' failed.*mat1 and mat2.*example inputs"):
        _convert(torch.nn.Linear(4, 2), example_inputs=torch.ones(1, 3))


def test_module_with_random_outputs_fails_the_comparison_and_says_why(torch: Any) -> None:
    class Noisy(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x + torch.rand_like(x)

    with pytest.raises(ModelError, match=r"differ on the same inputs.*other outputs each time"):
        _convert(Noisy(), example_inputs=torch.ones(1, 64))


def test_output_that_is_named_like_an_inner_value_keeps_its_name(torch: Any) -> None:
    class Net(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return (x.relu() + 1).relu() * 2

    first = _convert(Net(), example_inputs=torch.ones(1, 3))
    inner = [value.name for node in first.model.graph for value in node.outputs]
    again = _convert(Net(), example_inputs=torch.ones(1, 3), outputs=(str(inner[0]),))

    assert [spec.name for spec in again.report.outputs] == [inner[0]]
    assert _max_rel(again) == 0.0


def test_weights_shared_by_two_layers_survive(torch: Any) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

        def forward(self, x: Any) -> Any:
            return self.layer(self.layer(x))

    assert _max_rel(_convert(Net(), example_inputs=torch.ones(1, 4))) < 1e-5
