"""ONNX Runtime's own operators in LiteRT against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("ai_edge_litert")

from onnxprune.errors import TargetError
from tests.tflite_runs import assert_same_as_ort, emitted, kinds, one_node

# Kernels approximate erf and tanh.
TOLERANCES = {"relative": 1e-4, "absolute": 5e-6}
DOMAIN = "com.microsoft"


def noise(*shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("op_type", "has_bias", "expected"),
    [
        ("Gelu", False, ["GELU"]),
        ("BiasGelu", True, ["ADD", "GELU"]),
        ("FastGelu", False, ["GELU"]),
        ("FastGelu", True, ["ADD", "GELU"]),
        ("QuickGelu", False, ["MUL", "LOGISTIC", "MUL"]),
    ],
)
def test_gelus_of_onnx_runtime(op_type: str, has_bias: bool, expected: list[str]) -> None:
    feeds = {"x": 2 * noise(2, 3, 8)}
    constants = {"bias": noise(8)} if has_bias else {}
    proto = one_node(op_type, feeds, constants=constants, domain=DOMAIN, dynamic={"x": [0]})
    assert kinds(assert_same_as_ort(proto, feeds, **TOLERANCES)) == expected


@pytest.mark.parametrize("is_constant", [True, False])
@pytest.mark.parametrize("attributes", [{"alpha": 0.5}, {"transA": 1}, {"transB": 1, "alpha": 3.0}])
def test_fused_product(attributes: dict[str, Any], is_constant: bool) -> None:
    left = noise(2, 4, 3) if attributes.get("transA") else noise(2, 3, 4)
    right = noise(5, 4) if attributes.get("transB") else noise(4, 5)
    feeds = {"x": left} if is_constant else {"x": left, "w": right}
    constants = {"w": right} if is_constant else {}
    proto = one_node("FusedMatMul", feeds, constants=constants, domain=DOMAIN, **attributes)
    assert_same_as_ort(proto, feeds, **TOLERANCES)


def test_product_with_transposed_batches_is_refused() -> None:
    feeds = {"x": noise(2, 3, 4), "w": noise(3, 4, 5)}
    with pytest.raises(TargetError, match="its batch axes are transposed"):
        emitted(one_node("FusedMatMul", feeds, domain=DOMAIN, transBatchA=1))
