"""Top-1 and top-5, and the evaluators that `--eval` opens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from onnxprune.contracts import Batch, Score, TensorSpec
from onnxprune.data.labelled import open_labelled
from onnxprune.data.preprocess import Preprocess
from onnxprune.data.source import open_data, overlap_warning
from onnxprune.errors import BadDataError, PluginError, UsageError
from onnxprune.evaluate import open_evaluator
from onnxprune.evaluate.classification import ClassificationEvaluator, rank_of_label
from onnxprune.evaluate.function import FunctionEvaluator

INPUT = TensorSpec(name="x", dtype="float32", shape=("batch", 8))


class FakeRunner:
    """Gives `function(x)` as its outputs."""

    def __init__(
        self,
        function: Callable[[npt.NDArray[Any]], dict[str, npt.NDArray[Any]]],
        *outputs: TensorSpec,
        dtype: str = "float32",
    ) -> None:
        self._function = function
        self.inputs: Sequence[TensorSpec] = (TensorSpec(name="x", dtype=dtype, shape=("batch", 8)),)
        self.outputs: Sequence[TensorSpec] = outputs or (output("scores", "batch", 8),)
        self.fed_dtypes: set[str] = set()

    def run(self, feeds: Batch) -> dict[str, npt.NDArray[Any]]:
        self.fed_dtypes.add(feeds["x"].dtype.name)
        return self._function(feeds["x"])


def output(name: str, *shape: int | str | None, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def identity(x: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
    return {"scores": x}


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """Six rows whose largest value stands at 0, 1, 2, 3, 4, 5; the labels of the last two are wrong."""
    path = tmp_path / "eval.npz"
    np.savez(path, x=np.eye(8, dtype=np.float32)[:6], y=[0, 1, 2, 3, 0, 7])
    return path


def evaluator(path: Path, *, batch_size: int = 1, output: str | None = None) -> ClassificationEvaluator:
    opened = open_labelled(str(path), inputs=[INPUT], preprocess=Preprocess(), batch_size=batch_size)
    return ClassificationEvaluator(opened, output=output)


# --- ranks ----------------------------------------------------------------------------------------------------


def test_rank_counts_the_classes_that_come_before() -> None:
    scores = np.array([[0.1, 0.9, 0.5], [0.1, 0.9, 0.5], [0.1, 0.9, 0.5]])
    assert rank_of_label(scores, np.array([1, 2, 0])).tolist() == [0, 1, 2]


def test_equal_scores_rank_by_index_so_that_a_dead_model_does_not_score() -> None:
    scores = np.zeros((4, 4), np.uint8)
    assert rank_of_label(scores, np.arange(4)).tolist() == [0, 1, 2, 3]


def test_unsigned_scores_do_not_wrap_and_nan_ranks_last() -> None:
    assert rank_of_label(np.array([[200, 255]], np.uint8), np.array([0])).tolist() == [1]
    assert rank_of_label(np.array([[np.nan, 1, 0]]), np.array([1])).tolist() == [3]


# --- classification -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4])
def test_top1_and_top5_are_shares_of_all_samples(samples: Path, batch_size: int) -> None:
    # Ties are ranked by index: label 0 of row 4 comes second, label 7 of row 5 last.
    score = evaluator(samples, batch_size=batch_size).evaluate(FakeRunner(identity))
    assert score == Score(metric="top-1 accuracy", value=4 / 6, details={"samples": 6.0, "classes": 8.0, "top5": 5 / 6})


def test_samples_with_nan_outputs_are_wrong_and_counted(samples: Path) -> None:
    def spoils_the_first(x: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        return {"scores": np.where(x[:, :1] == 1, np.nan, x)}

    score = evaluator(samples).evaluate(FakeRunner(spoils_the_first))
    assert score.value == 3 / 6
    assert score.details["nan_samples"] == 1


def test_half_precision_model_is_fed_half_precision(samples: Path) -> None:
    runner = FakeRunner(identity, dtype="float16")
    assert evaluator(samples).evaluate(runner).value == 4 / 6
    assert runner.fed_dtypes == {"float16"}


def test_trailing_axes_of_one_are_dropped(samples: Path) -> None:
    score = evaluator(samples).evaluate(FakeRunner(lambda x: {"scores": x[:, :, None, None]}))
    assert score.value == 4 / 6


def test_label_beyond_the_models_classes_is_bad_data(samples: Path) -> None:
    with pytest.raises(BadDataError, match="has the class 3, but output 'scores' has 3 classes"):
        evaluator(samples).evaluate(FakeRunner(lambda x: {"scores": x[:, :3]}))


@pytest.mark.parametrize("shape", [(1, 8, 2), (1, 1), (8, 0)])
def test_output_that_is_no_table_of_classes_is_refused(samples: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(BadDataError, match="does not hold one value for each class and sample"):
        evaluator(samples).evaluate(FakeRunner(lambda x: {"scores": np.zeros(shape, np.float32)}))


def test_output_with_classes_is_chosen_among_several(samples: Path) -> None:
    def three(x: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        return {"map": np.zeros((len(x), 4, 4, 4)), "scores": x, "best": x.argmax(1)[:, None]}

    outputs = [output("map", "batch", 4, 4, 4), output("scores", "batch", 8), output("best", "batch", 1)]
    assert evaluator(samples).evaluate(FakeRunner(three, *outputs)).value == 4 / 6


def test_ambiguous_outputs_are_refused_unless_one_is_named(samples: Path) -> None:
    def two(x: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        return {"a": np.zeros_like(x), "b": x}

    runner = FakeRunner(two, output("a", "batch", 8), output("b", "batch", 8))
    with pytest.raises(UsageError, match="can't be told: 'a', 'b'"):
        evaluator(samples).evaluate(runner)
    assert evaluator(samples, output="b").evaluate(runner).value == 4 / 6
    with pytest.raises(UsageError, match="no output 'c'"):
        evaluator(samples, output="c").evaluate(runner)


# --- functions ------------------------------------------------------------------------------------------------


@pytest.fixture
def user_function(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    before = list(sys.path)

    def write(body: str) -> str:
        path = tmp_path / "score.py"
        path.write_text(body, encoding="utf-8")
        return f"{path}:my_metric"

    yield write
    sys.path[:] = before


def score_of(spec: str) -> Score:
    return FunctionEvaluator(spec).evaluate(FakeRunner(identity))


def test_number_becomes_a_score_named_like_the_function(user_function: Callable[[str], str]) -> None:
    spec = user_function("import numpy as np\ndef my_metric(runner): return np.float32(0.5)\n")
    assert score_of(spec) == Score(metric="my_metric", value=0.5)


def test_mapping_gives_the_score_first_and_details_after(user_function: Callable[[str], str]) -> None:
    spec = user_function("def my_metric(runner): return {'mAP': 0.25, 'AP50': 1}\n")
    assert score_of(spec) == Score(metric="mAP", value=0.25, details={"AP50": 1.0})


def test_score_object_is_taken_as_it_is(user_function: Callable[[str], str]) -> None:
    spec = user_function(
        "from onnxprune.contracts import Score\n"
        "def my_metric(runner): return Score(metric='loss', value=2.0, higher_is_better=False)\n"
    )
    assert score_of(spec) == Score(metric="loss", value=2.0, higher_is_better=False)


def test_function_runs_the_model(user_function: Callable[[str], str]) -> None:
    spec = user_function(
        "import numpy as np\n"
        "def my_metric(runner):\n"
        "    name = runner.inputs[0].name\n"
        "    return float(runner.run({name: np.ones((1, 8), np.float32)})['scores'].sum())\n"
    )
    assert score_of(spec).value == 8.0


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("def my_metric(runner): return 'good'\n", "must return a number, .* but gave str"),
        ("def my_metric(runner): return None\n", "but gave NoneType"),
        ("def my_metric(runner): return True\n", "but gave bool"),
        ("def my_metric(runner): return {}\n", "but gave dict"),
        ("def my_metric(runner): return {'mAP': 'high'}\n", "but gave str for 'mAP'"),
        ("def my_metric(runner): return float('nan')\n", "gave nan, which is no score"),
        ("def my_metric(runner):\n    return 1 / 0\n", r"score\.py:2: ZeroDivisionError"),
        ("def my_metric(): return 1\n", "TypeError: my_metric"),
    ],
)
def test_functions_without_a_usable_score_are_plug_in_errors(
    user_function: Callable[[str], str], body: str, says: str
) -> None:
    with pytest.raises(PluginError, match=says):
        score_of(user_function(body))


# --- open_evaluator -------------------------------------------------------------------------------------------


def test_path_opens_a_classification_and_a_function_itself(samples: Path, user_function: Callable[[str], str]) -> None:
    opened = open_evaluator(str(samples), inputs=[INPUT], preprocess=Preprocess(), limit=3)
    assert isinstance(opened, ClassificationEvaluator)
    assert opened.evaluate(FakeRunner(identity)).details["samples"] == 3
    spec = user_function("def my_metric(runner): return 1\n")
    assert open_evaluator(spec, inputs=[INPUT], preprocess=Preprocess()).name == "my_metric"


def test_calibration_on_the_evaluation_samples_gives_a_warning(samples: Path) -> None:
    opened = open_evaluator(str(samples), inputs=[INPUT], preprocess=Preprocess())
    calibration = open_data(str(samples), inputs=[INPUT], preprocess=Preprocess())
    assert overlap_warning(calibration, opened).startswith("6 samples are in both")
