"""The two tables, held against each other."""

from __future__ import annotations

from onnxprune.ops.quant import QUANT
from onnxprune.targets.qdq.kernels import FUSED_BUT_SLOW, KERNELS


def test_every_kernel_has_a_row_in_the_quantization_table() -> None:
    assert set(KERNELS.keys()) <= set(QUANT.keys())


def test_operators_that_only_other_runtimes_compute_in_integers_are_these() -> None:
    assert {key.op_type for key in set(QUANT.keys()) - set(KERNELS.keys())} == {"Tanh"}


def test_slow_kernels_are_kernels() -> None:
    keys = KERNELS.keys()

    assert {key.op_type for key in keys} >= FUSED_BUT_SLOW
