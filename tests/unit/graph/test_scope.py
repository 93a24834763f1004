"""What a glob of the user's means."""

from __future__ import annotations

import pytest

from onnxprune.contracts import CanonicalModel
from onnxprune.errors import UsageError
from onnxprune.graph.metadata import MODULE_PATH_KEY
from onnxprune.graph.scope import first_match, matches_scope, require_scopes
from tests.builders import conv_net


@pytest.mark.parametrize(
    ("glob", "path", "expected"),
    [
        ("backbone", "backbone", True),
        ("backbone", "backbone.stages.0", True),
        ("backbone", "backbone2.stages.0", False),
        ("stages", "backbone.stages.0", False),
        ("backbone.*", "backbone", False),
        ("backbone.*", "backbone.stages.0.conv", True),
        ("*.stages", "backbone.stages.0.conv", True),
        ("Backbone", "backbone", False),
        ("*", "", False),
    ],
)
def test_a_module_takes_in_everything_inside_it(glob: str, path: str, expected: bool) -> None:
    assert matches_scope(glob, module_paths=(path,)) is expected


def test_names_are_matched_whole() -> None:
    assert matches_scope("conv?", "relu", "conv1")
    assert not matches_scope("conv", "conv1", None, "")


def test_a_bar_separates_alternatives() -> None:
    assert matches_scope("fc|classifier", module_paths=("classifier.1",))
    assert matches_scope("a.*|conv?", "conv1")
    assert not matches_scope("fc|classifier", "conv1", module_paths=("backbone",))


def test_a_name_with_a_bar_in_it_is_still_itself() -> None:
    assert matches_scope("left|right", "left|right")


def test_one_alternative_is_enough_and_none_is_an_error(model: CanonicalModel) -> None:
    require_scopes(model, ("fc|head",), of="a test")
    with pytest.raises(UsageError, match=r"'fc\|neck' in a test matches no node"):
        require_scopes(model, ("fc|neck",), of="a test")


def test_the_first_glob_that_matches_is_told() -> None:
    assert first_match(("a*", "head", "*"), "b", module_paths=("head.fc",)) == "head"
    assert first_match((), "b") == ""


@pytest.fixture
def model() -> CanonicalModel:
    model = conv_net()
    for node in model.graph:
        node.metadata_props[MODULE_PATH_KEY] = "head.fc" if node.op_type == "Gemm" else "backbone.conv"
    return model


def test_nodes_weights_and_modules_are_known(model: CanonicalModel) -> None:
    require_scopes(model, ("head/gemm", "stem.weight", "backbone", "head.*"), of="a test")
    require_scopes(model, ("Gemm",), of="a test", operators=True)


@pytest.mark.parametrize("glob", ["hedd", "Gemm", "head.fc.*"])
def test_what_means_nothing_is_an_error_that_names_the_modules(model: CanonicalModel, glob: str) -> None:
    with pytest.raises(UsageError, match=r"in a test matches no node, weight or module of .* Known: backbone, head\.$"):
        require_scopes(model, (glob,), of="a test")
