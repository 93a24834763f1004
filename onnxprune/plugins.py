"""Which passes and targets there are: one literal table for our own, entry points for third parties.

Listing names imports nothing; a class is imported when it is asked for.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from onnxprune.contracts import Pass, Target
from onnxprune.errors import PluginError, UsageError, did_you_mean

__all__ = ["PASSES", "TARGETS", "Plugin", "find_pass", "find_target", "list_plugins", "plugin_version"]

Kind: TypeAlias = Literal["pass", "target"]

# In the order in which they make sense in one recipe.
PASSES: dict[str, str] = {
    "simplify": "onnxprune.passes.simplify:SimplifyPass",
    "prune": "onnxprune.passes.prune:PrunePass",
    "sparsify": "onnxprune.passes.sparsify:SparsifyPass",
    "fp16": "onnxprune.passes.fp16:Fp16Pass",
    "equalize": "onnxprune.passes.equalize:EqualizePass",
    "smoothquant": "onnxprune.passes.smoothquant:SmoothQuantPass",
    "quant": "onnxprune.passes.quant:QuantPass",
    "adaround": "onnxprune.passes.adaround:AdaRoundPass",
    "bias-correction": "onnxprune.passes.bias_correction:BiasCorrectionPass",
}
TARGETS: dict[str, str] = {
    "onnx": "onnxprune.targets.onnx:OnnxTarget",
    "ort-mobile": "onnxprune.targets.ort_mobile:OrtMobileTarget",
    "tflite": "onnxprune.targets.tflite.target:TfliteTarget",
}
ENTRY_POINT_GROUPS: dict[Kind, str] = {"pass": "onnxprune.passes", "target": "onnxprune.targets"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugin:
    """A pass or target by name; `origin` is "onnxprune" or the distribution that brings it."""

    name: str
    kind: Kind
    location: str
    origin: str


def list_plugins(kind: Kind) -> tuple[Plugin, ...]:
    """Our own first, in the table's order, then third parties' by name. A third party can't replace our own."""
    table = PASSES if kind == "pass" else TARGETS
    own = [Plugin(name=name, kind=kind, location=location, origin="onnxprune") for name, location in table.items()]
    entry_points = sorted(importlib.metadata.entry_points(group=ENTRY_POINT_GROUPS[kind]), key=lambda e: e.name)
    others = [
        Plugin(name=e.name, kind=kind, location=e.value, origin=e.dist.name if e.dist else "unknown")
        for e in entry_points
        if e.name not in table
    ]
    return (*own, *others)


def find_pass(name: str) -> type[Pass[Any, Any]]:
    """The pass class called `name`.

    Raises:
        UsageError: There is none of that name.
        PluginError: It can't be imported, or is not a pass.
    """
    found = _find("pass", name)
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise PluginError(f"Plug-in '{name}' is not a pass: '{found!r}' does not derive from onnxprune.contracts.Pass.")
    return found


def find_target(name: str) -> type[Target[Any]]:
    """The target class called `name`; raises as `find_pass` does."""
    found = _find("target", name)
    if not (isinstance(found, type) and issubclass(found, Target)):
        raise PluginError(
            f"Plug-in '{name}' is not a target: '{found!r}' does not derive from onnxprune.contracts.Target."
        )
    return found


def plugin_version(kind: Kind, name: str) -> str:
    """'onnxprune', or the distribution that brings a third party's plug-in and its version."""
    origin = next((plugin.origin for plugin in list_plugins(kind) if plugin.name == name), "unknown")
    try:
        return f"{origin} {importlib.metadata.version(origin)}"
    except importlib.metadata.PackageNotFoundError:
        return origin


def _find(kind: Kind, name: str) -> object:
    plugins = {plugin.name: plugin for plugin in list_plugins(kind)}
    plugin = plugins.get(name)
    if plugin is None:
        raise UsageError(f"Unknown {kind} '{name}'.", did_you_mean(name, list(plugins)))
    module_name, _, attribute = plugin.location.partition(":")
    if plugin.origin == "onnxprune":
        return getattr(importlib.import_module(module_name), attribute)
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # third-party code may fail in any way
        raise PluginError(
            f"{kind.capitalize()} '{name}' of '{plugin.origin}' can't be imported from '{plugin.location}': {error}",
            f"Reinstall or remove '{plugin.origin}'.",
        ) from error
