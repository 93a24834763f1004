"""State dicts: read without running anything, and put into modules whose names may be prefixed."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

from onnxprune.convert.pytorch_weights import load_weights, read_state_dict
from onnxprune.errors import ModelError


@pytest.fixture
def module(torch: Any) -> Any:
    torch.manual_seed(1)
    return torch.nn.Sequential(
        OrderedDict(conv=torch.nn.Conv2d(3, 4, 3), norm=torch.nn.BatchNorm2d(4), head=torch.nn.Linear(4, 2))
    )


def _trained(torch: Any, module: Any) -> dict[str, Any]:
    """Weights unlike those of `module`."""
    return {name: torch.full_like(value, 2) for name, value in module.state_dict().items()}


def _saved(torch: Any, content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def _load(module: Any, path: Path) -> tuple[str, ...]:
    return load_weights(module, read_state_dict(path), path=path)


def test_plain_state_dict_is_loaded(torch: Any, module: Any, tmp_path: Path) -> None:
    notes = _load(module, _saved(torch, _trained(torch, module), tmp_path / "w.pth"))

    assert notes == ()
    assert all(bool((value == 2).all()) for value in module.state_dict().values())


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
def test_nested_state_dict_is_found_and_its_key_noted(torch: Any, module: Any, tmp_path: Path, key: str) -> None:
    path = _saved(torch, {key: _trained(torch, module), "epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "w.pth")

    assert _load(module, path) == (f"The weights are those under '{key}' in the checkpoint.",)
    assert bool((module.conv.weight == 2).all())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_prefix_of_a_wrapper_is_taken_off(torch: Any, module: Any, tmp_path: Path, prefix: str) -> None:
    prefixed = {prefix + name: value for name, value in _trained(torch, module).items()}

    notes = _load(module, _saved(torch, prefixed, tmp_path / "w.pth"))

    assert notes == (f"The prefix '{prefix}' was taken off the names of the weights.",)
    assert bool((module.head.weight == 2).all())


def test_prefix_that_the_module_itself_has_stays(torch: Any, tmp_path: Path) -> None:
    module = torch.nn.Sequential(OrderedDict(model=torch.nn.Linear(2, 2)))

    assert _load(module, _saved(torch, _trained(torch, module), tmp_path / "w.pth")) == ()
    assert bool((module.model.weight == 2).all())


def test_weights_of_another_width_are_listed_with_both_shapes(torch: Any, module: Any, tmp_path: Path) -> None:
    weights = _trained(torch, module)
    weights["head.weight"] = torch.zeros(5, 4)

    with pytest.raises(ModelError, match=r"1 of another shape: 'head.weight \(5x4 in the file, 2x4 in the module\)'"):
        _load(module, _saved(torch, weights, tmp_path / "w.pth"))


def test_missing_and_unexpected_weights_are_listed_up_to_five(torch: Any, module: Any, tmp_path: Path) -> None:
    weights = {f"extra.{i}": torch.zeros(1) for i in range(7)} | {"conv.weight": module.conv.weight}

    with pytest.raises(ModelError) as caught:
        _load(module, _saved(torch, weights, tmp_path / "w.pth"))

    assert "7 missing: 'conv.bias', 'norm.weight', 'norm.bias', 'norm.running_mean', 'norm.running_var' and 2 more" in (
        caught.value.message
    )
    assert "7 unexpected: 'extra.0', 'extra.1', 'extra.2', 'extra.3', 'extra.4' and 2 more" in caught.value.message


def test_batch_counters_of_old_checkpoints_may_be_missing(torch: Any, module: Any, tmp_path: Path) -> None:
    weights = _trained(torch, module)
    del weights["norm.num_batches_tracked"]

    assert _load(module, _saved(torch, weights, tmp_path / "w.pth")) == ()


def test_half_precision_weights_are_converted_and_that_is_noted(torch: Any, module: Any, tmp_path: Path) -> None:
    weights = {
        name: value.half() if value.is_floating_point() else value for name, value in module.state_dict().items()
    }

    (note,) = _load(module, _saved(torch, weights, tmp_path / "w.pth"))

    assert "'conv.weight': torch.float16 to torch.float32" in note
    assert module.conv.weight.dtype is torch.float32


@pytest.mark.parametrize(
    ("extra", "labels"),
    [
        ({"classes": ["cat", "dog"]}, '["cat", "dog"]'),
        ({"class_to_idx": {"dog": 1, "cat": 0}}, '["cat", "dog"]'),
        ({"names": {0: "cat", 1: "Hündin"}}, '["cat", "Hündin"]'),
    ],
)
def test_class_names_of_a_checkpoint_become_labels(
    torch: Any, module: Any, tmp_path: Path, extra: dict[str, Any], labels: str
) -> None:
    path = _saved(torch, {"state_dict": module.state_dict(), **extra}, tmp_path / "w.pth")

    assert read_state_dict(path).metadata == {"labels": labels}


def test_safetensors_are_read_with_their_metadata(torch: Any, module: Any, tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(_trained(torch, module), tmp_path / "w.safetensors", metadata={"format": "pt", "author": "nobody"})

    state_dict = read_state_dict(tmp_path / "w.safetensors")

    assert state_dict.metadata == {"author": "nobody"}
    assert load_weights(module, state_dict, path=tmp_path) == ()
    assert bool((module.conv.weight == 2).all())


def test_truncated_files_are_called_damaged(torch: Any, module: Any, tmp_path: Path) -> None:
    pytest.importorskip("safetensors.torch").save_file(module.state_dict(), tmp_path / "w.safetensors")
    _saved(torch, module.state_dict(), tmp_path / "w.pth")
    torch.save(module.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)

    for name in ("w.safetensors", "w.pth", "old.pth"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(ModelError, match=r"damaged|can't be read"):
            read_state_dict(tmp_path / name)


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return exec, (f"open({str(self.marker)!r}, 'w').close()",)


@pytest.mark.parametrize("is_zip", [True, False])
def test_code_in_a_weights_file_is_refused_without_running(torch: Any, tmp_path: Path, is_zip: bool) -> None:
    marker = tmp_path / "ran"
    content = {"state_dict": {"a": torch.zeros(1)}, "hook": _Payload(marker)}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=is_zip)

    with pytest.raises(ModelError, match=r"would call 'builtins.exec'"):
        read_state_dict(tmp_path / "w.pth")

    assert not marker.exists()


def test_code_hidden_from_a_look_at_the_pickle_is_still_not_run(torch: Any, tmp_path: Path) -> None:
    # The names of what to call come from the memo, so that they don't stand right before STACK_GLOBAL.
    marker = tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w').close()"
    hidden = (
        b"\x80\x04\x8c\x08builtins\x940\x8c\x04exec\x940"
        b"h\x00h\x01\x93\x8c" + bytes([len(code)]) + code.encode() + b"\x85R."
    )
    assert pickle.loads(hidden) is None, "the payload itself works"
    marker.unlink()
    (tmp_path / "w.pth").write_bytes(hidden)

    with pytest.raises(ModelError):
        read_state_dict(tmp_path / "w.pth")

    assert not marker.exists()


def test_whole_module_as_weights_is_refused(torch: Any, module: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"pickled whole module.*torch.nn.modules.*Only state dicts are read"):
        read_state_dict(_saved(torch, module, tmp_path / "w.pth"))


def test_checkpoint_without_weights_says_what_it_has(torch: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="a dict without a state dict: its keys are 'epoch', 'loss'"):
        read_state_dict(_saved(torch, {"epoch": 1, "loss": 0.5}, tmp_path / "w.pth"))


def test_tensor_instead_of_a_state_dict_is_refused(torch: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="hold an object of type 'Tensor', not a state dict"):
        read_state_dict(_saved(torch, torch.zeros(3), tmp_path / "w.pth"))
