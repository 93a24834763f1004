"""What every placement says and is held to, whatever target it is for."""

from __future__ import annotations

import onnx_ir as ir

from onnxprune.contracts import Placement
from onnxprune.errors import TargetError, quoted_list

__all__ = ["INSIDE_BODY_REASON", "check_placement", "reasons_inside_bodies"]

INSIDE_BODY_REASON = "it stands inside the body of an If, Loop or Scan"


def reasons_inside_bodies(model: ir.Model) -> dict[str, str]:
    """Every node of a subgraph, with the reason why it stays float."""
    main_nodes = set(model.graph)
    return {node.name or "": INSIDE_BODY_REASON for node in model.graph.all_nodes() if node not in main_nodes}


def check_placement(model: ir.Model, placement: Placement) -> None:
    """Refuse a placement that makes nodes integer which `model` does not have.

    Raises:
        TargetError: It was made for another model.
    """
    known = {node.name for node in model.graph}
    unknown = [name for name in placement.integer_nodes if name not in known]
    if unknown:
        raise TargetError(
            f"The placement was made for another model: this one has no node {quoted_list(unknown)}.",
            "Make the placement anew by running without `--plan`.",
        )
