"""The committed digits models do what their README says, and their data is what the generator makes."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits"
MODELS = DIGITS / "models"
README = (DIGITS / "README.md").read_text(encoding="utf-8")

# The README rounds to three decimals; another CPU's float32 kernels may move single boxes past an IoU threshold.
README_TOLERANCE = 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    name: str
    shape: tuple[int, ...]
    dtype: str


class OnnxRunner:
    """A runner as the evaluators take it, straight on ONNX Runtime."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = [
            Spec(name=value.name, shape=tuple(value.shape), dtype="float32") for value in self.session.get_inputs()
        ]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        names = [value.name for value in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, dict(feeds)), strict=True))


def _load(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """Import an example by its path; its neighbours are importable while it loads, as for a script."""
    monkeypatch.syspath_prepend(str(DIGITS))
    spec = importlib.util.spec_from_file_location(f"digits_{name}", DIGITS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    for neighbour in ("data", "detector", "resnet", "score", "slimming"):
        monkeypatch.delitem(sys.modules, neighbour, raising=False)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def score(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return _load(monkeypatch, "score")


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    return _load(monkeypatch, "data")


def _stated(model: str, figure: str) -> float:
    """Read a figure of a model from the README's table of results."""
    row = re.search(rf"^\| `{re.escape(model)}` \|.*$", README, re.MULTILINE)
    assert row is not None
    value = re.search(rf"{figure} ([01]\.\d+)", row.group())
    assert value is not None
    return float(value.group(1))


def _truth(canvases: str) -> dict[str, Any]:
    return json.loads((DIGITS / "images" / f"{canvases}.json").read_text(encoding="utf-8"))


# --- data -------------------------------------------------------------------------------------------------


def test_every_digit_belongs_to_exactly_one_split(data: ModuleType) -> None:
    splits = data.load_splits()
    everything = np.concatenate([split.indices for split in splits.values()])
    assert sorted(everything.tolist()) == list(range(1797))


def test_canvases_show_digits_of_their_own_split_only(data: ModuleType) -> None:
    splits = data.load_splits()
    for folder, (split_name, _, _) in data.CANVAS_SETS.items():
        shown = {entry["source_digit"] for entry in _truth(folder)["annotations"]}
        assert shown <= set(splits[split_name].indices.tolist())


def test_equal_seeds_give_equal_canvases_and_other_seeds_others(data: ModuleType) -> None:
    split = data.load_splits()["train"]
    first, again, other = (next(data.canvases(split, seed)) for seed in (5, 5, 6))
    assert np.array_equal(first.pixels, again.pixels)
    assert np.array_equal(first.boxes, again.boxes)
    assert not np.array_equal(first.pixels, other.pixels)


def test_boxes_lie_inside_their_canvas_and_hardly_overlap(data: ModuleType) -> None:
    stream = data.canvases(data.load_splits()["train"], 11)
    for canvas in (next(stream) for _ in range(20)):
        assert canvas.pixels.shape == (data.CANVAS_SIZE, data.CANVAS_SIZE, 3)
        assert len(canvas.boxes) == len(canvas.labels) == len(canvas.digits)
        assert (canvas.boxes[:, :2] >= 0).all()
        assert (canvas.boxes[:, 2:] <= data.CANVAS_SIZE).all()
        covered = np.zeros(canvas.pixels.shape[:2], np.int64)
        for x0, y0, x1, y1 in canvas.boxes.astype(int):
            covered[y0:y1, x0:x1] += 1
        assert (covered > 1).sum() <= data.MAX_OVERLAP * covered.sum()


def test_committed_canvases_are_what_the_generator_makes(data: ModuleType) -> None:
    from PIL import Image

    splits = data.load_splits()
    for folder, (split_name, count, seed) in data.CANVAS_SETS.items():
        stream = data.canvases(splits[split_name], seed)
        made = [next(stream) for _ in range(count)]
        names = [f"{number:04d}.jpg" for number in range(count)]
        assert data.coco_annotations(made, names) == _truth(folder)
        assert sorted(path.name for path in (DIGITS / "images" / folder).iterdir()) == names
        with Image.open(DIGITS / "images" / folder / names[0]) as picture:
            difference = np.abs(np.asarray(picture, np.int64) - made[0].pixels)
        # JPEG at quality 85 loses sensor noise; a wrong picture is 50 grey levels away.
        assert difference.mean() < 8


def test_committed_classifier_images_are_the_test_digits(data: ModuleType) -> None:
    split = data.load_splits()["test"]
    with np.load(DIGITS / "images" / "classifier_test.npz") as archive:
        images, labels = archive["image"], archive["label"]
    assert np.array_equal(labels, split.labels)
    assert images.shape == (len(split.labels), 1, data.CLASSIFIER_SIZE, data.CLASSIFIER_SIZE)
    made = np.stack([data.classifier_image(image) for image in split.images[:20]])
    # Pillow's bicubic weights may round differently from release to release.
    assert np.abs(images[:20, 0].astype(int) - made).max() <= 2


# --- score ------------------------------------------------------------------------------------------------


def _oracle(score: ModuleType, canvases: str, *, shift: float) -> dict[str, float]:
    """Score a predictor that knows the truth, its boxes moved by `shift` pixels."""
    truth = _truth(canvases)
    order = iter(truth["images"])

    def predict(_pixels: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[Any]]:
        image_id = next(order)["id"]
        entries = [entry for entry in truth["annotations"] if entry["image_id"] == image_id]
        boxes = np.asarray([entry["bbox"] for entry in entries], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        scores = np.zeros((len(entries), 10), np.float32)
        scores[np.arange(len(entries)), [entry["category_id"] for entry in entries]] = 0.9
        # Every box twice: the suppression must take one of them away.
        return np.concatenate((boxes, boxes))[None] + shift, np.concatenate((scores, scores * 0.9))[None]

    return score.coco_metrics(predict, canvases)


def test_a_predictor_that_knows_the_truth_scores_one_and_nothing_is_printed(
    score: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _oracle(score, "validation", shift=0.0)["mAP"] == pytest.approx(1.0, abs=1e-12)
    assert capsys.readouterr().out == ""


def test_boxes_that_are_off_by_pixels_lose_map_but_not_ap50(score: ModuleType) -> None:
    metrics = _oracle(score, "validation", shift=1.5)
    assert metrics["AP50"] > 0.99
    assert metrics["mAP"] < 0.9


def test_a_model_that_finds_nothing_scores_zero(score: ModuleType) -> None:
    def predict(_pixels: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[Any]]:
        return np.zeros((1, 5, 4), np.float32), np.zeros((1, 5, 10), np.float32)

    assert score.coco_metrics(predict, "validation") == {"mAP": 0.0, "AP50": 0.0, "AP75": 0.0}


def test_suppression_keeps_the_best_of_a_heap_per_class_and_sorts_by_score(score: ModuleType) -> None:
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [40, 40, 60, 60], [0, 0, 10, 10]], np.float32)
    scores = np.zeros((4, 10), np.float32)
    scores[[0, 1, 2, 3], [3, 3, 3, 5]] = [0.6, 0.8, 0.7, 0.5]
    found = score.suppress(boxes, scores)
    assert found.labels.tolist() == [3, 3, 5]
    assert found.scores.tolist() == pytest.approx([0.8, 0.7, 0.5], abs=1e-7)
    assert found.boxes.tolist() == [[1, 0, 11, 10], [40, 40, 60, 60], [0, 0, 10, 10]]


def test_classifier_score_feeds_the_layout_and_type_that_the_model_asks_for(score: ModuleType) -> None:
    fed: list[NDArray[Any]] = []

    class Recorder:
        def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
            self.inputs = [Spec(name="picture", shape=shape, dtype=dtype)]

        def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
            fed.append(feeds["picture"])
            return {"logits": np.eye(10, dtype=np.float32)[None, 0]}

    zeros = score.classifier_top1(Recorder((1, 32, 32, 1), "uint8"))
    assert zeros == score.classifier_top1(Recorder((1, 1, 32, 32), "float32"))
    channels_last, channels_first = fed[0], fed[len(fed) // 2]
    assert (channels_last.dtype, channels_last.shape) == (np.uint8, (1, 32, 32, 1))
    assert (channels_first.dtype, channels_first.shape) == (np.float32, (1, 1, 32, 32))
    assert np.array_equal(channels_first[0, 0], channels_last[0, ..., 0] * np.float32(1 / 255))


# --- models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("canvases", ["test", "validation"])
def test_detector_reaches_the_map_that_the_readme_states(score: ModuleType, canvases: str) -> None:
    evaluate = getattr(score, f"detector_map_{canvases}")
    stated = _stated("models/detector.onnx", f"{canvases} mAP")
    assert stated >= 0.75
    assert evaluate(OnnxRunner(MODELS / "detector.onnx")) == pytest.approx(stated, abs=README_TOLERANCE)


def test_detector_is_one_file_that_keeps_its_interface_and_module_paths() -> None:
    model = onnx.load(MODELS / "detector.onnx", load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    shapes = {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {"image": (1, 3, 192, 192), "boxes": (1, 2268, 4), "scores": (1, 2268, 10)}
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [18]
    assert not any(weight.external_data for weight in model.graph.initializer)
    paths = {
        prop.value
        for node in model.graph.node
        if node.op_type == "Conv"
        for prop in node.metadata_props
        if prop.key == "pkg.torch.onnx.name_scopes"
    }
    assert any("'backbone'" in path for path in paths)
    assert any("'head'" in path for path in paths)


def test_models_carry_no_path_of_the_machine_they_were_made_on() -> None:
    for path in MODELS.iterdir():
        # The exporter's stack traces name the script and torch's own files with their folders.
        assert re.search(rb"/[\w./-]+\.py\b|site-packages", path.read_bytes()) is None, path.name


def test_channels_that_training_emptied_are_exact_zeros_so_that_pruning_them_is_free() -> None:
    model = onnx.load(MODELS / "detector.onnx")
    weights = {weight.name: onnx.numpy_helper.to_array(weight) for weight in model.graph.initializer}
    filters = [weights[node.input[1]] for node in model.graph.node if node.op_type == "Conv"]
    empty = sum(int((~weight.reshape(len(weight), -1).any(axis=1)).sum()) for weight in filters)
    total = sum(len(weight) for weight in filters)
    stated = re.search(r"(\d[\d,]*) of (\d[\d,]*) filters", README)
    assert stated is not None
    assert [int(number.replace(",", "")) for number in stated.groups()] == [empty, total]


def test_examples_stay_small() -> None:
    folders = (DIGITS.glob("*.*"), MODELS.rglob("*"), (DIGITS / "images").rglob("*"))
    files = [path for folder in folders for path in folder if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8 * 2**20


def test_pytorch_classifier_reaches_the_accuracy_that_the_readme_states(
    score: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch", reason="needs the extra 'torch'")
    from safetensors.torch import load_file

    network = _load(monkeypatch, "resnet").build()["module"].eval()
    network.load_state_dict(load_file(MODELS / "classifier.safetensors"))

    class TorchRunner:
        inputs = (Spec(name="image", shape=(1, 1, 32, 32), dtype="float32"),)

        def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
            with torch.no_grad():
                return {"logits": network(torch.from_numpy(feeds["image"])).numpy()}

    assert score.classifier_top1(TorchRunner()) == pytest.approx(
        _stated("models/classifier.safetensors", "test top-1"), abs=README_TOLERANCE
    )


# TensorFlow's own imports warn about NumPy and protobuf.
@pytest.mark.filterwarnings("ignore")
def test_keras_classifier_reaches_the_accuracy_that_the_readme_states(score: ModuleType) -> None:
    keras = pytest.importorskip("keras", reason="needs the extra 'tensorflow'")
    network = keras.models.load_model(MODELS / "classifier.keras", compile=False)

    class KerasRunner:
        """Answers from one batch: 359 calls into Keras would take half a minute."""

        inputs = (Spec(name="image", shape=(1, 32, 32, 1), dtype="float32"),)

        def __init__(self) -> None:
            with np.load(DIGITS / "images" / "classifier_test.npz") as archive:
                images = archive["image"].transpose(0, 2, 3, 1) * np.float32(1 / 255)
            answers = network.predict(images, batch_size=128, verbose=0)
            self.answers = {image.tobytes(): answer for image, answer in zip(images, answers, strict=True)}

        def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
            return {"probabilities": self.answers[feeds["image"][0].tobytes()][None]}

    assert score.classifier_top1(KerasRunner()) == pytest.approx(
        _stated("models/classifier.keras", "test top-1"), abs=README_TOLERANCE
    )


# --- group-sparse training --------------------------------------------------------------------------------


def test_lasso_zeroes_the_weak_channels_and_settling_changes_no_output(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="needs the extra 'torch'")
    slimming = _load(monkeypatch, "slimming")
    torch.manual_seed(3)
    conv, norm = torch.nn.Conv2d(3, 16, 3, bias=False), torch.nn.BatchNorm2d(16)
    strengths = torch.linspace(0.01, 1.0, 16)
    norm.weight.data.copy_(strengths)
    group = slimming.ChannelGroup(name="only", norms=(norm,), producers=(conv,))
    slimming.shrink([group], step=0.2)
    (alive,) = slimming.alive_channels([group])
    # The threshold is step * sqrt(2); the eight strongest are never touched.
    assert alive.tolist() == [float(index >= 8 or value > 0.2 * 2**0.5) for index, value in enumerate(strengths)]
    assert torch.equal(norm.weight[8:], strengths[8:])
    assert 0 < slimming.dead_ratio([group]) <= 0.5

    block = torch.nn.Sequential(conv, norm).eval()
    image = torch.rand(1, 3, 9, 9)
    before = block(image)
    slimming.settle([group])
    assert torch.equal(block(image), before)
    assert not conv.weight[alive == 0].any()
