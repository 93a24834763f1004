from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from onnx import helper

from onnxprune.contracts import Batch, TensorSpec
from onnxprune.errors import BadDataError, ModelError, UsageError
from onnxprune.runtime.feeds import random_feeds, resolve_shapes, working_feeds
from onnxprune.runtime.sessions import ort_runner_from_model
from tests.builders import proto_of


def spec(name: str, *shape: int | str | None, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def test_same_seed_gives_the_same_values_and_another_seed_others() -> None:
    specs = [spec("x", 1, 4)]
    np.testing.assert_array_equal(random_feeds(specs, seed=3)["x"], random_feeds(specs, seed=3)["x"])
    assert not np.array_equal(random_feeds(specs, seed=3)["x"], random_feeds(specs, seed=4)["x"])


def test_values_of_an_input_do_not_depend_on_the_other_inputs() -> None:
    alone = random_feeds([spec("x", 1, 4)], seed=0)["x"]
    together = random_feeds([spec("a", 7), spec("x", 1, 4)], seed=0)["x"]
    np.testing.assert_array_equal(alone, together)


@pytest.mark.parametrize(
    ("dtype", "shape", "low", "high"),
    [
        ("int64", (1, 200), 0, 1),
        ("int32", (1, 200), 0, 1),
        ("uint8", (1, 3, 40, 40), 0, 255),
        ("int8", (1, 3, 40, 40), -128, 127),
        ("uint8", (200,), 0, 1),
        ("uint64", (200,), 0, 1),
    ],
)
def test_integers_cover_the_documented_range(dtype: str, shape: tuple[int, ...], low: int, high: int) -> None:
    values = random_feeds([spec("ids", *shape, dtype=dtype)], seed=0)["ids"]
    assert values.dtype == dtype
    assert (values.min(), values.max()) == (low, high)


def test_masks_are_all_ones_so_that_no_row_is_masked_whole() -> None:
    specs = [spec("attention_mask", 1, 9, dtype="int64"), spec("key_mask", 1, 9, dtype="bool")]
    feeds = random_feeds(specs, seed=0)
    assert feeds["attention_mask"].all()
    assert feeds["key_mask"].all()
    assert feeds["key_mask"].dtype == bool


def test_floats_strings_and_booleans_have_their_declared_types() -> None:
    specs = [
        spec("half", 5, dtype="float16"),
        spec("brain", 5, dtype="bfloat16"),
        spec("double", 5, dtype="float64"),
        spec("text", 50, dtype="object"),
        spec("flag", 50, dtype="bool"),
    ]
    feeds = random_feeds(specs, seed=0)
    assert [feeds[s.name].dtype.name for s in specs] == ["float16", "bfloat16", "float64", "object", "bool"]
    assert feeds["brain"].dtype == ml_dtypes.bfloat16
    assert set(feeds["text"]) <= set("abcdefgh")
    assert 0 < feeds["flag"].sum() < 50


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (("N", 3, 8, 8), (2, 3, 8, 8)),
        ((None, 3, "H", "W"), (2, 3, 64, 64)),
        (("batch_size", "seq"), (2, 64)),
        (("seq", "batch"), (2, 2)),
        ((None, None, 224, 224), (2, 3, 224, 224)),
        ((None, 224, 224, None), (2, 224, 224, 3)),
        ((1, 3, 224, 224), (1, 3, 224, 224)),
        ((), ()),
    ],
    ids=str,
)
def test_dynamic_dimensions_get_the_documented_sizes(
    shape: tuple[int | str | None, ...], expected: tuple[int, ...]
) -> None:
    assert resolve_shapes([spec("x", *shape)], batch=2) == {"x": expected}


def test_symbol_has_one_size_wherever_it_stands_and_sums_are_computed() -> None:
    specs = [
        spec("ids", "batch", "seq"),
        spec("past", "batch", 4, "past_len", 8),
        spec("mask", "batch", "past_len + seq"),
        spec("next", "batch", "seq + 1"),
    ]
    sizes = resolve_shapes(specs, shapes={"past": (3, 4, 7, 8)}, free_size=16)
    assert sizes == {"ids": (3, 16), "past": (3, 4, 7, 8), "mask": (3, 23), "next": (3, 17)}


def test_unknown_rank_becomes_a_scalar() -> None:
    assert resolve_shapes([TensorSpec(name="x", dtype="float32", shape=None)]) == {"x": ()}


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (1, 3, 8), (0, 3, 8, 8)], ids=["size", "rank", "zero"])
def test_given_shape_that_contradicts_the_declared_one_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"does not fit input 'x', which is declared as Nx3x8x8"):
        random_feeds([spec("x", "N", 3, 8, 8)], seed=0, shapes={"x": shape})


def test_shape_for_an_unknown_input_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'img', which is no input\. .*Known: image"):
        random_feeds([spec("image", 1)], seed=0, shapes={"img": (1,)})


def test_given_shape_may_be_without_elements_where_the_model_says_so() -> None:
    assert resolve_shapes([spec("x", "N", 0)], shapes={"x": (2, 0)}) == {"x": (2, 0)}


def test_absurd_size_is_refused_before_memory_is_asked_for() -> None:
    with pytest.raises(BadDataError, match=r"more than 2\*\*30 elements"):
        random_feeds([spec("x", 1 << 40, 1 << 40)], seed=0)


def test_working_feeds_find_a_size_that_the_model_takes() -> None:
    # Reshape to (-1, 224): of the sizes that are tried, only 224 divides.
    proto = proto_of(
        [helper.make_node("Reshape", ["x", "shape"], ["y"], name="rows")],
        inputs={"x": ["N", "side"]},
        outputs={"y": [None, 224]},
        weights={"shape": np.array([-1, 224], np.int64)},
    )
    feeds = working_feeds(ort_runner_from_model(ir.from_proto(proto)), seed=0)
    assert feeds["x"].shape == (1, 224)


def test_working_feeds_say_why_when_no_size_runs() -> None:
    class Picky:
        inputs = (spec("x", "N", "L"),)
        outputs = ()

        def __init__(self) -> None:
            self.tried: list[int] = []

        def run(self, feeds: Batch) -> dict[str, npt.NDArray[np.float32]]:
            self.tried.append(feeds["x"].shape[1])
            raise ModelError(f"no {feeds['x'].shape[1]}")

    runner = Picky()
    with pytest.raises(ModelError, match=r"^no 64$"):
        working_feeds(runner, seed=0)
    assert runner.tried == [64, 224, 32, 256, 16, 8, 320, 640, 1]
