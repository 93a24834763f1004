"""Gemm, MatMul, Einsum and Det in LiteRT, where the official cases don't look: constants, dynamic sizes, refusals."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

pytest.importorskip("ai_edge_litert")

from onnxprune.errors import TargetError
from tests.tflite_runs import assert_same_as_ort, emitted, kinds, one_node

# Sums of some dozens of numbers around 1, added in another order.
TOLERANCES = {"relative": 1e-4, "absolute": 1e-5}


def noise(*shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class GemmCase:
    id: str
    bias: tuple[int, ...] | None
    kinds: list[str]
    attributes: dict[str, Any] = field(default_factory=dict)
    is_constant: bool = True


@pytest.mark.parametrize(
    "case",
    [
        GemmCase(id="vector", bias=(5,), kinds=["FULLY_CONNECTED"]),
        GemmCase(id="row", bias=(1, 5), kinds=["FULLY_CONNECTED"]),
        GemmCase(id="scalar", bias=(), kinds=["FULLY_CONNECTED"]),
        GemmCase(id="none", bias=None, kinds=["FULLY_CONNECTED"], attributes={"alpha": 0.5}),
        GemmCase(id="factors", bias=(5,), kinds=["FULLY_CONNECTED"], attributes={"alpha": 0.5, "beta": 3.0}),
        GemmCase(id="no-beta", bias=(5,), kinds=["FULLY_CONNECTED"], attributes={"beta": 0.0}),
        GemmCase(id="transposed", bias=(5,), kinds=["TRANSPOSE", "FULLY_CONNECTED"], attributes={"transA": 1}),
        GemmCase(id="matrix", bias=(3, 5), kinds=["FULLY_CONNECTED", "ADD"]),
        GemmCase(id="column", bias=(3, 1), kinds=["FULLY_CONNECTED", "ADD"], attributes={"alpha": 2.0, "beta": 0.1}),
        GemmCase(id="fed", bias=(5,), kinds=["BATCH_MATMUL", "RESHAPE", "ADD"], is_constant=False),
        GemmCase(
            id="fed-factors",
            bias=(3, 5),
            kinds=["MUL", "BATCH_MATMUL", "MUL", "ADD"],
            attributes={"alpha": 0.5, "beta": 2.0, "transB": 1},
            is_constant=False,
        ),
    ],
    ids=lambda case: case.id,
)
def test_gemm_is_one_operator_where_its_weight_is_constant(case: GemmCase) -> None:
    left = noise(4, 3) if case.attributes.get("transA") else noise(3, 4)
    others = {"b": noise(5, 4) if case.attributes.get("transB") else noise(4, 5)}
    if case.bias is not None:
        others["c"] = noise(*case.bias)
    feeds = {"x": left, **({} if case.is_constant else others)}
    proto = one_node(
        "Gemm", feeds, constants=others if case.is_constant else {}, inputs=["x", *others], **case.attributes
    )
    model = assert_same_as_ort(proto, feeds, **TOLERANCES)
    assert kinds(model) == case.kinds


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ((2, 3, 4), (4, 5), ["FULLY_CONNECTED"]),
        ((2, 6, 3, 4), (1, 4, 5), ["FULLY_CONNECTED"]),
        ((4,), (4, 5), ["RESHAPE", "FULLY_CONNECTED", "RESHAPE"]),
        ((3, 4), (4,), ["FULLY_CONNECTED", "RESHAPE"]),
        ((3, 4), (2, 4, 5), ["BATCH_MATMUL"]),
        ((2, 1, 3, 4), (6, 4, 5), ["BATCH_MATMUL"]),
        ((2, 1, 2, 1, 3, 4), (2, 1, 2, 1, 4, 5), ["RESHAPE", "BATCH_MATMUL", "RESHAPE"]),
    ],
    ids=str,
)
def test_product_with_a_constant(left: tuple[int, ...], right: tuple[int, ...], expected: list[str]) -> None:
    feeds = {"x": noise(*left)}
    proto = one_node("MatMul", feeds, constants={"w": noise(*right)})
    assert kinds(assert_same_as_ort(proto, feeds, **TOLERANCES)) == expected


def test_constant_on_the_left_is_multiplied_from_the_left() -> None:
    feeds = {"x": noise(2, 4, 5)}
    proto = one_node("MatMul", feeds, constants={"w": noise(3, 4)}, inputs=["w", "x"])
    assert kinds(assert_same_as_ort(proto, feeds, **TOLERANCES)) == ["BATCH_MATMUL"]


@pytest.mark.parametrize("is_constant", [True, False])
def test_product_keeps_a_dynamic_batch_and_length(is_constant: bool) -> None:
    others = {"w": noise(4, 5) if is_constant else noise(2, 4, 5)}
    feeds = {"x": noise(2, 3, 4), **({} if is_constant else others)}
    proto = one_node(
        "MatMul", feeds, constants=others if is_constant else {}, inputs=["x", "w"], dynamic={"x": [0, 1], "w": [0]}
    )
    assert len(kinds(assert_same_as_ort(proto, feeds, **TOLERANCES))) == 1


def test_transposed_keys_cost_no_transposition() -> None:
    graph = onnx.parser.parse_graph(
        "g (float[2,3,4,8] q, float[2,3,6,8] k) => (float[2,3,4,6] y)"
        "{ t = Transpose<perm=[0,1,3,2]>(k)  y = MatMul(q, t) }"
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10)
    model = assert_same_as_ort(proto, {"q": noise(2, 3, 4, 8), "k": noise(2, 3, 6, 8)}, **TOLERANCES)
    (product,) = [operator for operator in model.main.operators if operator.kind == "BATCH_MATMUL"]
    assert product.inputs == ("q", "k")
    assert product.option("adjY", default=False) is True


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_product_of_integers_is_exact_beyond_what_floats_hold(dtype: type[np.signedinteger[Any]]) -> None:
    feeds = {"x": np.full((2, 3, 4), 5_001, dtype), "w": np.full((4, 5), 5_003, dtype)}
    assert 4 * 5_001 * 5_003 > 2**24
    proto = one_node("MatMul", feeds, output_type=onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
    assert_same_as_ort(proto, feeds, relative=0, absolute=0)


def test_product_of_unsigned_integers_is_refused() -> None:
    feeds = {"x": np.ones((2, 3), np.uint32), "w": np.ones((3, 2), np.uint32)}
    with pytest.raises(TargetError, match="no product of UINT32 numbers"):
        emitted(one_node("MatMul", feeds, output_type=onnx.TensorProto.UINT32))


EQUATIONS = {
    "bc,cd->bd": ["BATCH_MATMUL"],
    "bsd,dhk->bshk": ["RESHAPE", "RESHAPE", "BATCH_MATMUL", "RESHAPE"],
    "bhqd,bhkd->bhqk": ["BATCH_MATMUL"],
    "bhqk,bhkd->bhqd": ["BATCH_MATMUL"],
    "bqhd,bkhd->bhqk": ["TRANSPOSE", "TRANSPOSE", "BATCH_MATMUL"],
    "bnqd,bnkd,bnke->bnqe": ["BATCH_MATMUL", "BATCH_MATMUL"],
    "bchw,bnc->bnhw": ["RESHAPE", "TRANSPOSE", "BATCH_MATMUL", "TRANSPOSE", "RESHAPE"],
    "ii->i": ["RESHAPE", "STRIDED_SLICE"],
    "ii": ["RESHAPE", "STRIDED_SLICE", "SUM"],
    "...ii->...i": ["RESHAPE", "STRIDED_SLICE"],
    "ij->ji": ["TRANSPOSE"],
    "ij->": ["SUM"],
    "ij,jk": ["BATCH_MATMUL"],
    "...ij,...jk->...ik": ["BATCH_MATMUL"],
    "i,i->": ["MUL", "SUM"],
    "bij,bij->bi": ["MUL", "SUM"],
    "ab,cd->acbd": ["RESHAPE", "RESHAPE", "MUL"],
    "bu,ud->bd": ["MUL"],
}
SIZES = dict(zip("abcdehijkqnsuw", (2, 3, 4, 5, 6, 3, 4, 4, 5, 6, 2, 5, 1, 7), strict=True))


def operands(equation: str) -> dict[str, npt.NDArray[np.float32]]:
    terms = equation.partition("->")[0].split(",")
    shapes = [[SIZES[label] for label in term.replace("...", "ab")] for term in terms]
    return {f"x{position}": noise(*shape) for position, shape in enumerate(shapes)}


@pytest.mark.parametrize("equation", EQUATIONS)
def test_einsum_is_a_product_of_matrices_where_it_sums(equation: str) -> None:
    feeds = operands(equation)
    model = assert_same_as_ort(one_node("Einsum", feeds, equation=equation), feeds, **TOLERANCES)
    assert kinds(model) == EQUATIONS[equation]


def test_einsum_with_a_constant_weight_is_fully_connected_for_any_batch() -> None:
    feeds = operands("bsd,dhk->bshk")
    weight = feeds.pop("x1")
    proto = one_node("Einsum", feeds, constants={"w": weight}, equation="bsd,dhk->bshk", dynamic={"x0": [0]})
    assert kinds(assert_same_as_ort(proto, feeds, **TOLERANCES)) == ["FULLY_CONNECTED", "RESHAPE"]


def test_einsum_broadcasts_ellipses_of_length_one() -> None:
    feeds = {"a": noise(1, 3, 4, 5), "b": noise(2, 1, 5, 6)}
    assert_same_as_ort(one_node("Einsum", feeds, equation="...ij,...jk->...ik"), feeds, **TOLERANCES)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_determinants_of_small_matrices_are_expanded(order: int) -> None:
    feeds = {"x": noise(2, 3, order, order)}
    assert_same_as_ort(one_node("Det", feeds, dynamic={"x": [0]}), feeds, **TOLERANCES)


def test_determinant_of_a_larger_matrix_is_refused() -> None:
    with pytest.raises(TargetError, match="factorizes no matrices"):
        emitted(one_node("Det", {"x": noise(5, 5)}))
