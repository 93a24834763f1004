"""The canonical form of a model, and the only function that makes it."""

from __future__ import annotations

from typing import NewType

import onnx
import onnx_ir as ir

from onnxprune.errors import ModelError, quoted_list
from onnxprune.graph.cleanup import remove_dead_code, remove_no_ops
from onnxprune.graph.constants import lift_constants, remove_initializers_from_inputs, unshare_initializers
from onnxprune.graph.folding import FoldingBudget, fold_constants
from onnxprune.graph.form import MAX_IR_VERSION, MAX_OPSET, MIN_OPSET, check_nodes
from onnxprune.graph.functions import inline_functions
from onnxprune.graph.metadata import adopt_module_paths
from onnxprune.graph.names import give_unique_names, printable
from onnxprune.graph.shapes import ShapeRules, infer_source_shapes
from onnxprune.graph.verify import verify

__all__ = ["MAX_IR_VERSION", "MAX_OPSET", "MIN_OPSET", "CanonicalModel", "canonicalize"]

CanonicalModel = NewType("CanonicalModel", ir.Model)
"""An `onnx_ir.Model` in canonical form; made by `canonicalize` only."""

# Folding a shape computation can make the next one static; real chains end after two or three rounds.
_MAX_FOLDING_ROUNDS = 8


def canonicalize(model: ir.Model, *, shape_rules: ShapeRules) -> CanonicalModel:
    """Bring `model` into canonical form, in place, and return it.

    1. Opset 18 to 24; a model outside is refused (below 18: `onnxprune.convert.onnx_file.load_onnx` upgrades it).
       IR version 10 to 13.
    2. Nodes in topological order, functions inlined.
    3. Every constant is a typed initializer that is not an input of the model. Constant nodes are gone, and what can be
       computed within bounds is computed (`onnxprune.graph.folding`).
    4. No Identity (unless the interface needs it), no Dropout in inference mode, nothing that no output depends on.
    5. Every initializer has one user.
    6. Nodes and values have names that are unique in the whole model. Names of inputs and outputs never change, other
       names only where two are equal.
    7. Every node knows its module path under `MODULE_PATH_KEY`, where the source says one.
    8. Types and shapes are those that inference finds.

    Model metadata, doc strings, producer and the names of dynamic dimensions stay. A second call changes nothing.

    Args:
        model: From `onnxprune.graph.io.load_model` or an exporter; must not be used apart from the result afterwards.
        shape_rules: For operators that ONNX does not define.

    Raises:
        ModelError: The opset is out of range (naming the operators that block), functions can't be inlined, or the
            graph contradicts itself.
    """
    _check_opset(model)
    _sort(model)
    inline_functions(model)
    lift_constants(model)
    remove_initializers_from_inputs(model)
    give_unique_names(model)
    adopt_module_paths(model)
    remove_no_ops(model)
    remove_dead_code(model)
    _settle_imports(model)
    check_nodes(model)
    infer_source_shapes(model, shape_rules)
    budget = FoldingBudget()
    for _ in range(_MAX_FOLDING_ROUNDS):
        if not fold_constants(model, budget=budget):
            break
        remove_no_ops(model)
        remove_dead_code(model)
        infer_source_shapes(model, shape_rules)
    unshare_initializers(model)
    give_unique_names(model)
    adopt_module_paths(model)
    verify(model)
    return CanonicalModel(model)


def _check_opset(model: ir.Model) -> None:
    opset = model.opset_imports.get("", MIN_OPSET)
    if opset < MIN_OPSET:
        raise ModelError(
            f"The model is in opset {opset}; canonical models are in {MIN_OPSET} to {MAX_OPSET}.",
            "Load the file with onnxprune.convert.onnx_file.load_onnx, which upgrades it.",
        )
    if opset <= MAX_OPSET:
        return
    blocking: set[str] = set()
    for node in model.graph.all_nodes():
        if node.domain in ("", "ai.onnx") and onnx.defs.has(node.op_type, opset, ""):
            since = onnx.defs.get_schema(node.op_type, opset, "").since_version
            if since > MAX_OPSET:
                blocking.add(f"{node.op_type}-{since}")
    text = f"The model is in opset {opset}; onnxprune and the runtimes it builds for go up to {MAX_OPSET}. "
    if blocking:
        raise ModelError(
            f"{text}These operators are newer and can't be taken back: {quoted_list(sorted(blocking))}.",
            f"Export the model with opset {MIN_OPSET} to {MAX_OPSET}.",
        )
    raise ModelError(
        f"{text}None of its operators is newer than that.", f"Export the model with opset {MIN_OPSET} to {MAX_OPSET}."
    )


def _sort(model: ir.Model) -> None:
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    for graph in graphs:
        try:
            graph.sort()
        except ValueError as error:
            raise ModelError(f"The graph '{printable(graph.name or '')}' has a cycle: {error}.") from error


def _settle_imports(model: ir.Model) -> None:
    """Import exactly the domains in use, in every graph alike, and the IR version that they need."""
    used = {"" if node.domain == "ai.onnx" else node.domain for node in model.graph.all_nodes()} | {""}
    imports = {domain: version for domain, version in model.opset_imports.items() if domain in used}
    imports.setdefault("", MIN_OPSET)
    for graph in model.graphs():
        # Subgraphs of a parsed model know no imports; operator tables look them up there.
        graph.opset_imports.clear()
        graph.opset_imports.update(sorted(imports.items()))
    # 10 is the first with metadata on nodes; ONNX Runtime 1.31 refuses 14.
    needed = onnx.helper.OP_SET_ID_VERSION_MAP.get(("ai.onnx", imports[""]), MAX_IR_VERSION)
    model.ir_version = min(max(model.ir_version, needed, 10), MAX_IR_VERSION)
