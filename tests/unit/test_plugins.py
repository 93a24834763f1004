"""Passes and targets by name, ours and third parties'."""

from __future__ import annotations

import importlib.metadata
from types import SimpleNamespace

import pytest

from onnxprune import plugins
from onnxprune.errors import PluginError, UsageError


@pytest.mark.parametrize("name", plugins.PASSES)
def test_every_pass_of_the_table_can_be_imported_and_answers_to_its_name(name: str) -> None:
    assert plugins.find_pass(name).name == name


@pytest.mark.parametrize("name", plugins.TARGETS)
def test_every_target_of_the_table_can_be_imported_and_answers_to_its_name(name: str) -> None:
    assert plugins.find_target(name).name == name


def test_a_misspelt_pass_gets_a_suggestion() -> None:
    with pytest.raises(UsageError, match="Did you mean 'simplify'"):
        plugins.find_pass("simplfy")


def entry_point(name: str, value: str) -> SimpleNamespace:
    return SimpleNamespace(name=name, value=value, dist=SimpleNamespace(name="their-package"))


def test_a_third_party_that_fails_to_import_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry_point("theirs", "no_such_module:X")])
    with pytest.raises(PluginError, match="'theirs' of 'their-package' can't be imported"):
        plugins.find_pass("theirs")


def test_a_third_party_class_that_is_no_pass_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry_point("theirs", "pathlib:Path")])
    with pytest.raises(PluginError, match="is not a pass"):
        plugins.find_pass("theirs")


def test_a_third_party_cannot_replace_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry_point("prune", "pathlib:Path")])
    assert plugins.find_pass("prune").__module__.startswith("onnxprune.")
    assert [p.name for p in plugins.list_plugins("pass")].count("prune") == 1
