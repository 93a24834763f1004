"""Which parts of a model a user's glob means: one rule for `skip`, `exclude`, scopes and rules of all passes.

A glob is shell-like and case-sensitive (`*`, `?`, `[abc]`; `*` also crosses dots and slashes). It means a node or a
weight by its name, or a module by its path, and a module takes in everything inside it:

    glob         "backbone"    "backbone.stages.0"    "backbone.stages.0.conv"
    backbone     yes           yes                    yes
    backbone.*   no            yes                    yes
    *.0          no            yes                    yes

A bar separates alternatives: "fc|classifier" means whatever either of them does. So one recipe serves models that name
the same part differently, and a model that has none of them is still told.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

import onnx_ir as ir

from onnxprune.errors import UsageError, did_you_mean
from onnxprune.graph.metadata import module_path

__all__ = ["first_match", "matches_scope", "require_scopes", "weight_names"]


def matches_scope(glob: str, *names: str | None, module_paths: Iterable[str] = ()) -> bool:
    """True when `glob` means one of `names` (nodes, weights), one of `module_paths`, or a module around one of these.

    Empty names and paths, which stand for unknown ones, are never meant.
    """
    modules = [module for path in module_paths for module in _modules_around(path)]
    return any(
        fnmatchcase(name, alternative) for alternative in _alternatives(glob) for name in (*names, *modules) if name
    )


def first_match(globs: Iterable[str], *names: str | None, module_paths: Iterable[str] = ()) -> str:
    """The first of `globs` that `matches_scope`, or ""."""
    paths = tuple(module_paths)
    return next((glob for glob in globs if matches_scope(glob, *names, module_paths=paths)), "")


def weight_names(node: ir.Node) -> tuple[str, ...]:
    """Names of the initializers that `node` reads."""
    return tuple(value.name for value in node.inputs if value is not None and value.is_initializer() and value.name)


def require_scopes(model: ir.Model, globs: Iterable[str], *, of: str, operators: bool = False) -> None:
    """Refuse globs that mean nothing in `model`: they are misspelt, and what they were to protect would change.

    Args:
        model: The model that the pass gets.
        globs: What the user gave.
        of: Where they were given, for the message: "`skip` of pass 'prune'".
        operators: True where operators ("Softmax") may be named as well.

    Raises:
        UsageError: One matches no node, weight or module; names the outermost modules.
    """
    kinds = "node, weight, module or operator" if operators else "node, weight or module"
    nodes = list(model.graph.all_nodes())
    names = [
        *(node.name for node in nodes),
        *(name for graph in model.graphs() for name in graph.initializers),
        *(dict.fromkeys(node.op_type for node in nodes) if operators else ()),
    ]
    paths = dict.fromkeys(module_path(node) for node in nodes)
    for glob in globs:
        if not matches_scope(glob, *names, module_paths=paths):
            outermost = sorted({path.partition(".")[0] for path in paths if path})
            raise UsageError(
                f"The pattern '{glob}' in {of} matches no {kinds} of the model.",
                f"Outermost modules: {did_you_mean(glob, outermost)}"
                if outermost
                else "`onnxprune inspect` shows the names.",
            )


def _alternatives(glob: str) -> Iterable[str]:
    """What a glob with bars in it stands for: itself, as it may be a name, and each of its parts."""
    return (glob, *glob.split("|")) if "|" in glob else (glob,)


def _modules_around(path: str) -> Iterable[str]:
    """From "a.b.c": "a", "a.b", "a.b.c"."""
    parts = path.split(".") if path else []
    return (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
