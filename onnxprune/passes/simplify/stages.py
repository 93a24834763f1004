"""The stages of `simplify`, in order, each with the reason for its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from onnxprune.graph.cleanup import remove_dead_code
from onnxprune.graph.folding import fold_constants
from onnxprune.graph.foreign import run_foreign_tool
from onnxprune.passes.simplify.duplicates import merge_duplicates
from onnxprune.passes.simplify.linear import fold_affine, fold_batchnorm, fuse_matmul_add
from onnxprune.passes.simplify.noops import remove_noops
from onnxprune.passes.simplify.pads import fold_pads
from onnxprune.passes.simplify.transposes import cancel_transposes

__all__ = ["MAX_FOLDED_BYTES", "STAGES", "OwnStage", "Stage", "ToolLimits", "ToolStage"]

MAX_FOLDED_BYTES = 1 << 20
"""A constant that folding makes may be larger by this much than what it replaces (the canonical form's own limit)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolLimits:
    """What a foreign tool may use."""

    timeout_s: float
    memory_limit_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnStage:
    """A rewrite of our own: changes the model in place and says how often (or whether) it did."""

    name: str
    rewrite: Callable[[ir.Model], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolStage:
    """A foreign tool ("module:function"), run in a child process."""

    name: str
    function: str

    def run(self, model: ir.Model, limits: ToolLimits) -> ir.Model:
        """A new model; `model` stays. Raises `ForeignToolError` when the tool fails, hangs or dies."""
        return run_foreign_tool(
            model,
            self.function,
            arguments={"max_folded_bytes": MAX_FOLDED_BYTES},
            timeout_s=limits.timeout_s,
            memory_limit_bytes=limits.memory_limit_bytes,
        )


Stage = OwnStage | ToolStage

STAGES: tuple[Stage, ...] = (
    # First what costs nothing and makes all later matching easier.
    OwnStage(name="dead-code", rewrite=remove_dead_code),
    OwnStage(name="no-ops", rewrite=remove_noops),
    # Before all rules that ask for a constant weight, bias or shape.
    OwnStage(name="constants", rewrite=fold_constants),
    # Before anything that looks at neighbours: Keras and tf2onnx graphs hide them behind layout changes.
    OwnStage(name="transposes", rewrite=cancel_transposes),
    # Before `batchnorm`: a MatMul + Add is only a linear operator with a bias once it is a Gemm.
    OwnStage(name="matmul-add", rewrite=fuse_matmul_add),
    # Before `pads`: a BatchNormalization between Pad and Conv would hide the Pad.
    OwnStage(name="batchnorm", rewrite=fold_batchnorm),
    # After `batchnorm`: exporters write bias and scale of a layer after its normalization.
    OwnStage(name="affine", rewrite=fold_affine),
    # After the folds that need a convolution without padding.
    OwnStage(name="pads", rewrite=fold_pads),
    OwnStage(name="duplicates", rewrite=merge_duplicates),
    # The tools last: the smaller the graph they get, the faster they are, and what we did ourselves is exact and keeps
    # groups, names and module paths. onnxsim folds shape arithmetic, which onnxscript's rules then need not see.
    ToolStage(name="onnxsim", function="onnxprune.passes.simplify_tools:run_onnxsim"),
    ToolStage(name="onnxscript", function="onnxprune.passes.simplify_tools:run_onnxscript"),
)
