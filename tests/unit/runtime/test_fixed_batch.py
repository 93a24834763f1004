from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxprune.errors import BadDataError
from onnxprune.runtime.fixed_batch import FixedBatchRunner
from onnxprune.runtime.litert import litert_runner_from_path
from onnxprune.targets.tflite.emit import emit
from onnxprune.targets.tflite.serialize import write_tflite
from tests.builders import canonical, conv_net_proto

X = np.random.default_rng(0).standard_normal((10, 3, 8, 8), dtype=np.float32)


@pytest.fixture(scope="module")
def runners(tmp_path_factory: pytest.TempPathFactory) -> tuple[FixedBatchRunner, FixedBatchRunner]:
    """The same network for four samples at a time, and for one."""
    folder: Path = tmp_path_factory.mktemp("batch")
    made = []
    for batch in (4, 1):
        path = folder / f"{batch}.tflite"
        write_tflite(emit(canonical(conv_net_proto(batch=batch))).model, path)
        made.append(FixedBatchRunner(litert_runner_from_path(path), batch))
    return made[0], made[1]


@pytest.mark.parametrize("count", [1, 3, 4, 10])
def test_any_number_of_samples_gives_what_they_give_one_by_one(
    runners: tuple[FixedBatchRunner, FixedBatchRunner], count: int
) -> None:
    four, one = runners
    found, expected = four.run({"x": X[:count]})["y"], one.run({"x": X[:count]})["y"]
    assert found.shape == (count, 10)
    # Kernels of another batch add in another order.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_batch_is_open_to_whoever_feeds(runners: tuple[FixedBatchRunner, FixedBatchRunner]) -> None:
    assert [spec.shape for spec in (*runners[0].inputs, *runners[0].outputs)] == [(None, 3, 8, 8), (None, 10)]


def test_whole_batch_is_filled_up_with_the_last_sample(runners: tuple[FixedBatchRunner, FixedBatchRunner]) -> None:
    np.testing.assert_array_equal(runners[0].whole({"x": X[:2]})["x"], X[[0, 1, 1, 1]])
    np.testing.assert_array_equal(runners[0].whole({"x": X})["x"], X[:4])


@pytest.mark.parametrize("feeds", [{"x": X[:0]}, {"x": X[:2], "z": X[:3]}])
def test_no_samples_or_unequal_numbers_are_refused(
    runners: tuple[FixedBatchRunner, FixedBatchRunner], feeds: dict[str, np.ndarray]
) -> None:
    with pytest.raises(BadDataError, match="the same number of samples"):
        runners[0].run(feeds)
