"""Trained models with real data: float networks, calibration samples, and how to score a runner.

Data come from the folder `ONNXPRUNE_SHARED_DATA`, or `../shared/data` beside the repository; what it lacks is left out.
Calibration and test samples are disjoint, and calibration never sees a label.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from PIL import Image

from onnxprune.contracts import Batch, CanonicalModel, ModelState, PassContext, Runner
from onnxprune.convert.source import SourceRequest, open_source
from onnxprune.passes.harness import run_pass
from onnxprune.passes.simplify import SimplifyConfig, SimplifyPass

REPOSITORY = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("ONNXPRUNE_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
DIGITS = REPOSITORY / "examples" / "digits"
NETWORKS = Path(__file__).with_name("torch_networks.py")

FloatArray = npt.NDArray[np.float32]
Scores = Mapping[str, float]
"""Metric -> value from 0 to 1; the first one counts."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One model of the table."""

    name: str
    kind: str
    """"ResNet", "MobileNet", "detector" or "other": which goal counts."""
    needs: tuple[Path, ...]
    open_model: Callable[[], CanonicalModel]
    calibration: Callable[[], FloatArray]
    """(samples, ...) as the model takes them."""
    score: Callable[[Runner], Scores]
    """On the test samples."""
    probe: Callable[[], FloatArray]
    """Some test samples, for the signal-to-noise ratio of outputs."""

    @property
    def is_there(self) -> bool:
        """True when nothing is missing."""
        return all(path.exists() for path in self.needs)


class ArrayBatches:
    """A `CalibrationSource`: samples one by one."""

    def __init__(self, name: str, array: FloatArray) -> None:
        self._name, self._array = name, array

    @property
    def num_samples(self) -> int:
        """All."""
        return len(self._array)

    @property
    def content_hash(self) -> str:
        """sha256 of the samples."""
        return hashlib.sha256(self._array.tobytes()).hexdigest()

    def __iter__(self) -> Iterator[Batch]:
        for sample in self._array:
            yield {self._name: sample[np.newaxis]}


def simplified(request: SourceRequest) -> CanonicalModel:
    """The network as the `quant` pass meets it in a recipe."""
    source = open_source(request).model
    return run_pass(SimplifyPass(SimplifyConfig()), ModelState(model=source), PassContext()).state.model


# --- classifiers ----------------------------------------------------------------------------------------------


def classified(runner: Runner, images: Callable[[], FloatArray], labels: Callable[[], npt.NDArray[np.int64]]) -> Scores:
    """Top-1 accuracy, one image at a time."""
    name = runner.inputs[0].name
    found = [np.argmax(next(iter(runner.run({name: image[np.newaxis]}).values()))) for image in images()]
    return {"top-1": float(np.mean(np.array(found) == labels()))}


def picture(path: Path, *, short_side: int, crop: int) -> npt.NDArray[np.uint8]:
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    factor = short_side / min(image.size)
    width, height = (round(side * factor) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - crop) // 2, (height - crop) // 2
    return np.asarray(image.crop((left, top, left + crop, top + crop)))


def as_imagenet(pixels: npt.NDArray[np.uint8]) -> FloatArray:
    """(N, H, W, 3) bytes -> (N, 3, H, W), with torchvision's mean and standard deviation."""
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    normal = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(normal.transpose(0, 3, 1, 2), dtype=np.float32)


def table(folder: Path) -> list[tuple[Path, int]]:
    rows = [line.split(",") for line in (folder / "labels.csv").read_text().splitlines()[1:]]
    return [(folder / "images" / row[0], int(row[1])) for row in rows]


@cache
def imagenet_test() -> tuple[FloatArray, npt.NDArray[np.int64]]:
    rows = table(DATA / "imagenet500")
    pixels = np.stack([picture(path, short_side=256, crop=224) for path, _ in rows])
    return as_imagenet(pixels), np.array([label for _, label in rows])


@cache
def imagenette() -> FloatArray:
    files = sorted((DATA / "imagenette160_calib200" / "images").iterdir())
    return as_imagenet(np.stack([picture(path, short_side=256, crop=224) for path in files]))


@cache
def cifar(file: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    with np.load(DATA / file) as archive:
        return archive["X"], archive["y"].astype(np.int64)


CIFAR_TEST = "cifar10_jpeg/cifar10_test_jpegdecoded_1000.npz"
CIFAR_TRAIN = "cifar10_jpeg/cifar10_train_jpegdecoded_10000.npz"
NUM_CIFAR_CALIBRATION = 256


def cifar_pixels(file: str, limit: int | None = None) -> FloatArray:
    """(N, 32, 32, 3), 0 to 255: what the ResNet-8 of MLPerf Tiny takes."""
    return cifar(file)[0][:limit].astype(np.float32)


@cache
def kws_samples() -> tuple[FloatArray, npt.NDArray[np.int64]]:
    with np.load(DATA / "kws" / "kws01_mfcc_int8.npz") as archive:
        real = (archive["X"].astype(np.float32) - archive["zero_point"]) * archive["scale"]
        return real.astype(np.float32), archive["y"].astype(np.int64)


@cache
def vww_samples() -> tuple[FloatArray, npt.NDArray[np.int64]]:
    rows = table(DATA / "vww")
    images = [np.asarray(Image.open(path).convert("RGB"), np.float32) / np.float32(255) for path, _ in rows]
    return np.stack(images), np.array([label for _, label in rows])


def fourth(samples: Callable[[], tuple[FloatArray, npt.NDArray[np.int64]]], part: int, *, calibrates: bool) -> Any:
    """Every fourth sample calibrates, the others test: there is only one set."""
    array = samples()[part]
    chosen = np.arange(len(array)) % 4 == 0
    return array[chosen if calibrates else ~chosen]


# --- detectors ------------------------------------------------------------------------------------------------

FASTESTDET_SIDE = 352


@cache
def coco_images(split: str) -> FloatArray:
    """(N, 3, 352, 352), BGR from 0 to 1, stretched."""
    truth = json.loads((DATA / "coco_tiny" / f"instances_{split}.json").read_text())
    images = []
    for entry in truth["images"]:
        with Image.open(DATA / "coco_tiny" / split / entry["file_name"]) as opened:
            image = opened.convert("RGB").resize((FASTESTDET_SIDE, FASTESTDET_SIDE), Image.Resampling.BILINEAR)
        images.append(np.asarray(image)[:, :, ::-1].transpose(2, 0, 1))
    return np.stack(images).astype(np.float32) / np.float32(255)


def fastestdet_detections(output: FloatArray, width: int, height: int) -> tuple[FloatArray, FloatArray, Any]:
    """Boxes (D, 4) as x, y, width, height in pixels, scores (D,), classes (D,), before suppression.

    Args:
        output: (85, H, W): objectness, 4 numbers of a box, 80 classes.
        width: Of the picture.
        height: Of the picture.
    """
    grid_y, grid_x = np.mgrid[: output.shape[1], : output.shape[2]]
    classes = output[5:].argmax(axis=0)
    scores = output[0] ** 0.6 * output[5:].max(axis=0) ** 0.4
    centre_x = (np.tanh(output[1]) + grid_x) / output.shape[2]
    centre_y = (np.tanh(output[2]) + grid_y) / output.shape[1]
    box_width, box_height = (1 / (1 + np.exp(-output[channel])) for channel in (3, 4))
    left, top = (centre_x - box_width / 2) * width, (centre_y - box_height / 2) * height
    boxes = np.stack([left, top, box_width * width, box_height * height], axis=-1).reshape(-1, 4)
    kept = scores.reshape(-1) > 0.001
    return boxes[kept], scores.reshape(-1)[kept], classes.reshape(-1)[kept]


def suppressed(boxes: FloatArray, scores: FloatArray, classes: Any, threshold: float) -> list[int]:
    """Greedy non-maximum suppression within each class; positions, best first."""
    order = np.argsort(-scores, kind="stable")
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    areas = boxes[:, 2] * boxes[:, 3]
    alive = np.ones(len(order), bool)
    kept: list[int] = []
    for index in order:
        if not alive[index]:
            continue
        kept.append(int(index))
        low = np.maximum(corners[index, :2], corners[:, :2])
        high = np.minimum(corners[index, 2:], corners[:, 2:])
        shared = np.clip(high - low, 0, None).prod(axis=1)
        overlap = shared / np.maximum(areas[index] + areas - shared, 1e-9)
        alive &= ~((overlap > threshold) & (classes == classes[index]))
    return kept[:100]


def fastestdet_map(runner: Runner) -> Scores:
    """COCO mAP on the 64 test images."""
    truth_data = json.loads((DATA / "coco_tiny" / "instances_val2017.json").read_text())
    name = runner.inputs[0].name
    results = []
    for entry, image in zip(truth_data["images"], coco_images("val2017"), strict=True):
        output = next(iter(runner.run({name: image[np.newaxis]}).values()))[0]
        boxes, scores, classes = fastestdet_detections(output, entry["width"], entry["height"])
        results += [
            {
                "image_id": entry["id"],
                "category_id": int(classes[index]) + 1,
                "bbox": [float(number) for number in boxes[index]],
                "score": float(scores[index]),
            }
            for index in suppressed(boxes, scores, classes, 0.45)
        ]
    return coco_scores(truth_data, results)


def coco_scores(truth_data: dict[str, Any], results: list[dict[str, Any]]) -> Scores:
    """COCO mAP and AP50 of `results`."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    for entry in truth_data["annotations"]:
        entry.setdefault("iscrowd", 0)
        entry.setdefault("area", entry["bbox"][2] * entry["bbox"][3])
    # pycocotools reports its progress with print.
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = truth_data
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {"mAP": float(evaluation.stats[0]), "AP50": float(evaluation.stats[1])}


def digits_score() -> Any:
    """The module `examples/digits/score.py`."""
    spec = importlib.util.spec_from_file_location("digits_score", DIGITS / "score.py")
    if spec is None or spec.loader is None:
        raise SystemExit("examples/digits/score.py is missing")
    module = importlib.util.module_from_spec(spec)
    sys.modules["digits_score"] = module
    spec.loader.exec_module(module)
    return module


@cache
def digits_pictures(folder: str) -> FloatArray:
    files = sorted((DIGITS / "images" / folder).glob("*.jpg"))
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in files])
    return pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)


def digits_detected(runner: Runner) -> Scores:
    return dict(digits_score().detector_metrics(runner, "test"))


class SplitRunner:
    """A `Runner` of `boxes_beside_scores` that gives boxes and scores again."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.inputs, self.outputs, self.threads = runner.inputs, runner.outputs, runner.threads

    def run(self, feeds: Batch) -> dict[str, FloatArray]:
        """The two outputs."""
        (joined,) = self._runner.run(feeds).values()
        return {"boxes": joined[..., :4], "scores": joined[..., 4:]}


def boxes_beside_scores() -> CanonicalModel:
    """The digits detector with one output (1, 2268, 14), as YOLO's exporters write it: naive int8 destroys that."""
    model = simplified(SourceRequest(source=DIGITS / "models" / "detector.onnx"))
    boxes, scores = model.graph.outputs
    node = ir.node("Concat", [boxes, scores], attributes={"axis": 2}, name="joined")
    joined = node.outputs[0]
    joined.name, joined.type = "joined", ir.TensorType(ir.DataType.FLOAT)
    joined.shape = ir.Shape([1, 2268, 14])
    model.graph.append(node)
    model.graph.outputs[:] = [joined]
    return model


@cache
def digit_images(part: str) -> FloatArray:
    """(N, 1, 32, 32), 0 to 1."""
    with np.load(DIGITS / "images" / f"classifier_{part}.npz") as archive:
        return archive["image"].astype(np.float32) / np.float32(255)


# --- the list -------------------------------------------------------------------------------------------------


def chosen_models(parts_of_names: Sequence[str]) -> Iterator[Trained]:
    """Models whose names have one of these parts (none given: all); those that lack their data are named on stderr."""
    for trained in trained_models():
        if parts_of_names and not any(part in trained.name for part in parts_of_names):
            continue
        if not trained.is_there:
            print(f"skipped, its data are not here: {trained.name}", file=sys.stderr)
            continue
        yield trained


def trained_models() -> list[Trained]:
    """All models; some may lack their data (`is_there`)."""
    tiny = DATA / "mlperf_tiny_models"
    squeezenet = DATA / "squeezenet1_1" / "squeezenet1_1_torchvision_norm.pth"
    resnet20 = DATA / "resnet20_cifar10" / "resnet20-12fca82f.th"
    fastestdet = DATA / "fastestdet" / "FastestDet.onnx"

    def split(name: str, kind: str, source: Path, samples: Any, shape: tuple[int, ...], data: Path) -> Trained:
        test = partial(fourth, samples, 0, calibrates=False)
        return Trained(
            name=name,
            kind=kind,
            needs=(source, data),
            open_model=lambda: simplified(SourceRequest(source=source, shapes={"input_1": shape})),
            calibration=partial(fourth, samples, 0, calibrates=True),
            score=partial(classified, images=test, labels=partial(fourth, samples, 1, calibrates=False)),
            probe=lambda: test()[:64],
        )

    return [
        Trained(
            name="ResNet-20, CIFAR-10",
            kind="ResNet",
            needs=(resnet20, DATA / CIFAR_TEST, DATA / CIFAR_TRAIN),
            open_model=lambda: simplified(SourceRequest(source=f"{NETWORKS}:resnet20", weights=resnet20)),
            calibration=lambda: as_imagenet(cifar(CIFAR_TRAIN)[0][:NUM_CIFAR_CALIBRATION]),
            score=partial(
                classified, images=lambda: as_imagenet(cifar(CIFAR_TEST)[0]), labels=lambda: cifar(CIFAR_TEST)[1]
            ),
            probe=lambda: as_imagenet(cifar(CIFAR_TEST)[0][:64]),
        ),
        Trained(
            name="ResNet-8, CIFAR-10",
            kind="ResNet",
            needs=(tiny / "resnet8_cifar10.h5", DATA / CIFAR_TEST, DATA / CIFAR_TRAIN),
            open_model=lambda: simplified(
                SourceRequest(source=tiny / "resnet8_cifar10.h5", shapes={"input_1": (1, 32, 32, 3)})
            ),
            calibration=lambda: cifar_pixels(CIFAR_TRAIN, NUM_CIFAR_CALIBRATION),
            score=partial(classified, images=lambda: cifar_pixels(CIFAR_TEST), labels=lambda: cifar(CIFAR_TEST)[1]),
            probe=lambda: cifar_pixels(CIFAR_TEST, 64),
        ),
        split(
            "MobileNetV1-0.25, visual wake words",
            "MobileNet",
            tiny / "vww_mobilenetv1_025_96.h5",
            vww_samples,
            (1, 96, 96, 3),
            DATA / "vww",
        ),
        split("DS-CNN, keywords", "MobileNet", tiny / "kws_savedmodel", kws_samples, (1, 49, 10, 1), DATA / "kws"),
        Trained(
            name="SqueezeNet 1.1, ImageNet",
            kind="other",
            needs=(squeezenet, DATA / "imagenet500", DATA / "imagenette160_calib200"),
            open_model=lambda: simplified(SourceRequest(source=f"{NETWORKS}:squeezenet", weights=squeezenet)),
            calibration=imagenette,
            score=partial(classified, images=lambda: imagenet_test()[0], labels=lambda: imagenet_test()[1]),
            probe=lambda: imagenet_test()[0][::16],
        ),
        Trained(
            name="FastestDet, COCO",
            kind="detector",
            needs=(fastestdet, DATA / "coco_tiny"),
            open_model=lambda: simplified(SourceRequest(source=fastestdet)),
            calibration=lambda: coco_images("train2017"),
            score=fastestdet_map,
            probe=lambda: coco_images("val2017")[::2],
        ),
        Trained(
            name="MobileNetV2-SSD, digits",
            kind="detector",
            needs=(DIGITS / "models" / "detector.onnx",),
            open_model=lambda: simplified(SourceRequest(source=DIGITS / "models" / "detector.onnx")),
            calibration=lambda: digits_pictures("calibration"),
            score=digits_detected,
            probe=lambda: digits_pictures("test")[::4],
        ),
        Trained(
            name="MobileNetV2-SSD, digits, boxes beside scores",
            kind="detector",
            needs=(DIGITS / "models" / "detector.onnx",),
            open_model=boxes_beside_scores,
            calibration=lambda: digits_pictures("calibration"),
            score=lambda runner: digits_detected(SplitRunner(runner)),
            probe=lambda: digits_pictures("test")[::4],
        ),
        Trained(
            name="MobileNetV2-like, digits",
            kind="MobileNet",
            needs=(DIGITS / "models" / "classifier.keras",),
            open_model=lambda: simplified(
                SourceRequest(source=DIGITS / "models" / "classifier.keras", shapes={"image": (1, 32, 32, 1)})
            ),
            calibration=lambda: digit_images("calibration").transpose(0, 2, 3, 1),
            score=lambda runner: {"top-1": float(digits_score().classifier_top1(runner))},
            probe=lambda: digit_images("test").transpose(0, 2, 3, 1)[:64],
        ),
    ]
