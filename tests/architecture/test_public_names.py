"""The public API is what this file says: a change here is a change for users."""

from __future__ import annotations

import onnxprune
from onnxprune.errors import OnnxPruneError


def test_the_package_offers_exactly_these_names() -> None:
    assert sorted(onnxprune.__all__) == [
        "ModelState",
        "OnnxPruneError",
        "RunReport",
        "__version__",
        "apply",
        "build",
        "compare",
        "convert_model",
        "load",
        "run",
        "save",
    ]


def test_every_public_name_can_be_loaded() -> None:
    for name in onnxprune.__all__:
        assert getattr(onnxprune, name) is not None


def test_exit_codes_are_the_documented_ones() -> None:
    def family(cls: type[OnnxPruneError]) -> list[type[OnnxPruneError]]:
        return [cls, *(member for child in cls.__subclasses__() for member in family(child))]

    codes = {cls.__name__: cls.exit_code for cls in family(OnnxPruneError)}
    assert {name: codes[name] for name in sorted(codes) if not name.startswith("_")}.items() >= {
        "BadDataError": 10,
        "BudgetMissedError": 8,
        "InterruptedRunError": 130,
        "MissingExtraError": 4,
        "ModelError": 3,
        "OutputError": 11,
        "PassError": 5,
        "PluginError": 9,
        "PreconditionError": 2,
        "TargetError": 7,
        "UsageError": 2,
        "VerificationError": 6,
    }.items()


def test_no_public_name_is_hidden_by_a_folder_of_the_same_name() -> None:
    # Importing `onnxprune.convert` binds that module to the package's attribute, and would hide a function `convert`.
    from pathlib import Path

    folders = {path.name for path in Path(onnxprune.__file__).parent.iterdir() if path.is_dir()}
    modules = {path.stem for path in Path(onnxprune.__file__).parent.glob("*.py")}
    assert not (folders | modules) & set(onnxprune.__all__)
