"""Module paths ("backbone.layer1.conv"): where in the source network a node came from."""

from __future__ import annotations

import ast

import onnx_ir as ir

__all__ = ["MODULE_PATH_KEY", "SHARED_FROM_KEY", "adopt_module_paths", "derived_module_path", "module_path"]

MODULE_PATH_KEY = "onnxprune.module_path"
SHARED_FROM_KEY = "onnxprune.shared_from"
"""On the copies of one initializer that several nodes used: the initializer's name in the source."""


def module_path(node: ir.Node) -> str:
    """Dotted path of the module that `node` belongs to, or "" where the source did not say."""
    return node.metadata_props.get(MODULE_PATH_KEY, "")


def adopt_module_paths(model: ir.Model) -> None:
    """Give every node a module path under our own key, from the exporter's metadata or the node's name."""
    for node in model.graph.all_nodes():
        if MODULE_PATH_KEY in node.metadata_props:
            continue
        path = derived_module_path(node)
        if path:
            node.metadata_props[MODULE_PATH_KEY] = path


def derived_module_path(node: ir.Node) -> str:
    """The module path that the exporter's metadata or the node's name say, or ""."""
    return _path_from_torch(node) or _path_from_name(node.name or "")


def _path_from_torch(node: ir.Node) -> str:
    # torch.onnx writes a Python list of dotted names, from the whole model ('') down to the operator itself.
    text = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if not text:
        return ""
    try:
        scopes = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return ""
    if not isinstance(scopes, list) or len(scopes) < 2:
        return ""
    return str(scopes[-2])


def _path_from_name(name: str) -> str:
    # '/backbone/layer1/conv/Conv' (TorchScript exporter) and 'model/block1/conv/Conv2D' (tf2onnx).
    parts = [part for part in name.strip("/").split("/") if part]
    return ".".join(parts[:-1])
