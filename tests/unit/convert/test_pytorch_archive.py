"""Crafted `.pt2` files: refused with the reason, and nothing in them runs."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from onnxprune.convert.pytorch_archive import (
    check_exported_archive,
    copy_archive,
    is_harmless_expression,
    read_extra_texts,
)
from onnxprune.convert.source import SourceRequest, open_source
from onnxprune.errors import ModelError


@pytest.fixture(scope="module")
def exported(torch: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An honest ExportedProgram with a dynamic batch, two outputs by name, and labels beside it."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3)

        def forward(self, image: Any) -> dict[str, Any]:
            features = self.conv(image)
            return {"features": features, "mean": features.mean((2, 3)) + image.shape[0]}

    path = tmp_path_factory.mktemp("exported") / "net.pt2"
    program = torch.export.export(
        Net().eval(), (torch.ones(2, 3, 8, 8),), dynamic_shapes={"image": {0: torch.export.Dim("batch")}}
    )
    torch.export.save(program, path, extra_files={"labels.txt": "cat\ndog\n", "author": "nobody"})
    return path


def _changed(
    source: Path,
    target: Path,
    *,
    edit: Mapping[str, Callable[[bytes], bytes]] | None = None,
    add: Mapping[str, bytes] | None = None,
) -> Path:
    """A copy of an archive with members changed (by the end of their name) or added (to its one folder)."""
    edit = dict(edit or {})
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        for info in old.infolist():
            content = old.read(info)
            for ending in [ending for ending in edit if info.filename.endswith(ending)]:
                content = edit.pop(ending)(content)
            new.writestr(info.filename, content)
        for name, content in (add or {}).items():
            new.writestr(f"{root}/{name}", content)
    assert not edit, f"no member ends in {list(edit)}"
    return target


def _edited_json(change: Callable[[Any], None]) -> Callable[[bytes], bytes]:
    def edit(content: bytes) -> bytes:
        document = json.loads(content)
        change(document)
        return json.dumps(document).encode()

    return edit


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return exec, (f"open({str(self.marker)!r}, 'w').close()",)


def test_honest_archive_passes_and_lists_its_pickles_and_texts(exported: Path) -> None:
    assert check_exported_archive(exported) == ("net/data/sample_inputs/model.pt",)
    assert read_extra_texts(exported) == {"labels.txt": "cat\ndog\n", "author": "nobody"}


def test_copy_of_an_archive_has_the_same_members(exported: Path, tmp_path: Path) -> None:
    copy_archive(exported, tmp_path / "copy.pt2")

    with zipfile.ZipFile(exported) as old, zipfile.ZipFile(tmp_path / "copy.pt2") as new:
        assert {n: new.read(n) for n in new.namelist()} == {n: old.read(n) for n in old.namelist()}


@pytest.mark.usefixtures("convert_here")
def test_exported_program_keeps_names_dynamic_axes_and_labels(exported: Path) -> None:
    converted = open_source(SourceRequest(source=exported))

    (image,) = converted.report.inputs
    assert (image.name, image.shape[1:] if image.shape else None) == ("image", (3, 8, 8))
    assert isinstance(image.shape[0] if image.shape else 0, str)
    assert [output.name for output in converted.report.outputs] == ["features", "mean"]
    assert converted.report.metadata == {"labels": '["cat", "dog"]', "author": "nobody"}
    assert converted.model.metadata_props["labels"] == '["cat", "dog"]'
    # Example inputs, seeded inputs, and one sample more on the dynamic axis.
    assert converted.report.num_comparisons == 3
    assert converted.report.difference is not None
    assert converted.report.difference.max_rel < 1e-5


@pytest.mark.usefixtures("convert_here")
def test_code_in_the_sample_inputs_is_refused_without_running(exported: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    crafted = _changed(
        exported, tmp_path / "bad.pt2", edit={"sample_inputs/model.pt": lambda _: pickle.dumps(_Payload(marker))}
    )

    with pytest.raises(ModelError, match=r"'net/data/sample_inputs/model.pt' is a pickle that calls more") as caught:
        open_source(SourceRequest(source=crafted))

    assert "--trust-source" in caught.value.hint
    assert not marker.exists()


@pytest.mark.usefixtures("convert_here")
def test_trusted_file_is_loaded_as_it_is(exported: Path, tmp_path: Path, torch: Any) -> None:
    # Harmless, but more than the restricted unpickler takes: PyTorch itself falls back to the unrestricted one.
    marker = tmp_path / "ran"
    buffer = io.BytesIO()
    torch.save(((torch.ones(2, 3, 8, 8),), {}, _Payload(marker)), buffer)
    crafted = _changed(exported, tmp_path / "own.pt2", edit={"sample_inputs/model.pt": lambda _: buffer.getvalue()})

    # What was unpickled is a tuple of three where PyTorch expects two; by then the code has run.
    with pytest.raises((ModelError, ValueError)):
        open_source(SourceRequest(source=crafted, trust_source=True))

    assert marker.exists()


@pytest.mark.usefixtures("convert_here")
def test_code_in_a_weight_that_is_declared_as_pickled_is_refused(exported: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    def declare_pickled(document: Any) -> None:
        next(iter(document["config"].values()))["use_pickle"] = True

    crafted = _changed(
        exported,
        tmp_path / "bad.pt2",
        edit={
            "model_weights_config.json": _edited_json(declare_pickled),
            "weights/weight_0": lambda _: pickle.dumps(_Payload(marker)),
        },
    )

    with pytest.raises(ModelError, match=r"'net/data/weights/weight_0' is a pickle"):
        open_source(SourceRequest(source=crafted))

    assert not marker.exists()


@dataclass(frozen=True)
class Attack:
    """A change of an honest archive, and the reason that the refusal gives."""

    id: str
    reason: str
    edit: Mapping[str, Callable[[bytes], bytes]] | None = None
    add: Mapping[str, bytes] | None = None


def _set_first_node(key: str, value: Any) -> Callable[[bytes], bytes]:
    def change(document: Any) -> None:
        document["graph_module"]["graph"]["nodes"][0][key] = value

    return _edited_json(change)


def _set_size(expression: str) -> Callable[[bytes], bytes]:
    def change(document: Any) -> None:
        image = document["graph_module"]["graph"]["tensor_values"]["image"]
        image["sizes"][0] = {"as_expr": {"expr_str": expression, "hint": {"as_int": 2}}}

    return _edited_json(change)


def _set_guard(document: Any) -> None:
    document["guards_code"] = ["__import__('os').system('touch /tmp/x') == 0"]


def _rename_weight(document: Any) -> None:
    document["config"]['x", __import__("os"), "'] = next(iter(document["config"].values()))


def _import_by_tree(document: Any) -> None:
    signature = document["graph_module"]["module_call_graph"][0]["signature"]
    signature["in_spec"] = signature["in_spec"].replace("null", '{"default_factory_module": "antigravity"}', 1)


ATTACKS = [
    Attack("shared library", "compiled machine code", add={"data/aotinductor/model/model.so": b"\x7fELF"}),
    Attack("torchbind object", "pickled object", add={"data/constants/custom_obj_0": b"x"}),
    Attack("opaque object", "pickled object", add={"data/constants/opaque_obj_0": b"x"}),
    Attack("name leaving the folder", "not a plain relative name", add={"../../escape": b"x"}),
    Attack("system call", "not an operator", edit={"model.json": _set_first_node("target", "torch.os.system")}),
    Attack("hub", "not an operator", edit={"model.json": _set_first_node("target", "torch.hub.load")}),
    Attack(
        "attribute walk", "not an operator", edit={"model.json": _set_first_node("target", "torch.ops.aten.__class__")}
    ),
    Attack(
        "operator file", "not an operator", edit={"model.json": _set_first_node("target", "torch.ops.aten.from_file")}
    ),
    Attack("size expression", "run as Python", edit={"model.json": _set_size("__import__('os').getpid()")}),
    Attack("nested size string", "run as Python", edit={"model.json": _set_size("Max('exit()', 1)")}),
    Attack("guard", "run as Python", edit={"model.json": _edited_json(_set_guard)}),
    Attack("node name", "generated code", edit={"model.json": _set_first_node("name", "x'+y")}),
    Attack("weight name", "generated code", edit={"model_weights_config.json": _edited_json(_rename_weight)}),
    Attack("tree import", "import a module", edit={"model.json": _edited_json(_import_by_tree)}),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.id)
def test_archive_that_could_run_code_is_refused(exported: Path, tmp_path: Path, attack: Attack) -> None:
    crafted = _changed(exported, tmp_path / "bad.pt2", edit=attack.edit, add=attack.add)

    with pytest.raises(ModelError, match=attack.reason) as caught:
        check_exported_archive(crafted)

    assert "is refused" in caught.value.message


def test_archive_that_unpacks_to_far_more_than_the_file_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("net/models/model.json", "{}")
        archive.writestr("net/data/weights/weight_0", bytes(40 << 20))

    with pytest.raises(ModelError, match="unpacks to far more"):
        check_exported_archive(tmp_path / "bomb.pt2")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_member_that_is_there_twice_is_refused(exported: Path, tmp_path: Path) -> None:
    crafted = _changed(exported, tmp_path / "bad.pt2", add={"archive_format": b"pt2"})

    with pytest.raises(ModelError, match="is there twice"):
        check_exported_archive(crafted)


@pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
def test_truncated_archive_is_called_damaged(exported: Path, tmp_path: Path, kept: float) -> None:
    content = exported.read_bytes()
    (tmp_path / "net.pt2").write_bytes(content[: int(len(content) * kept)])

    with pytest.raises(ModelError, match="is damaged"):
        open_source(SourceRequest(source=tmp_path / "net.pt2"))


@pytest.mark.usefixtures("convert_here")
def test_flipped_bytes_inside_a_member_are_found(exported: Path, tmp_path: Path) -> None:
    content = bytearray(exported.read_bytes())
    start = content.index(b'{"graph_module"')
    content[start + 2 : start + 8] = b"xxxxxx"
    (tmp_path / "net.pt2").write_bytes(content)

    with pytest.raises(ModelError, match="is damaged: Bad CRC-32"):
        open_source(SourceRequest(source=tmp_path / "net.pt2"))


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s40', positive=True, integer=True)",
        "Mul(Integer(24), Max(Integer(1), Add(Symbol('s73', positive=True, integer=True), Integer(-2))))",
        "FloorDiv(Symbol('s0', positive=True, integer=True), 2)",
        "Float('0.5', precision=53)",
        "2*s0 + 1",
        "L['x'].size()[0] <= 16",
    ],
)
def test_size_arithmetic_is_harmless(text: str) -> None:
    assert is_harmless_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "Symbol('__import__(\"os\")')",
        "sympify('1')",
        "Symbol.__class__",
        "(lambda: 1)()",
        "[x for x in (1,)]",
        "f'{1}'",
        "Add('exit()', 1)",
        "L['x'].data.copy_(1)",
        "(" * 2000,
    ],
)
def test_anything_but_size_arithmetic_is_not(text: str) -> None:
    assert not is_harmless_expression(text)


@pytest.mark.usefixtures("convert_here")
def test_program_exported_in_training_mode_is_refused(torch: Any, tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.5)).train()
    torch.export.save(torch.export.export(module, (torch.ones(1, 3),)), tmp_path / "net.pt2")

    with pytest.raises(ModelError, match=r"exported in training mode: .*dropout.*model.eval\(\)"):
        open_source(SourceRequest(source=tmp_path / "net.pt2"))
