"""Scores of the digits models: COCO mAP of the detector, top-1 of the classifiers.

Each public function takes a runner and gives a number from 0 to 1, so it serves `onnxprune` as
`module:function`. A runner has `inputs` (name, shape, dtype) and `run({name: array}) -> {name: array}`;
which runtime is behind it makes no difference. Nothing is printed.

Needs numpy, Pillow and pycocotools; no training framework.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

IMAGES = Path(__file__).resolve().parent / "images"

# Pixels are fed as value / 255; a model whose input is uint8 takes the bytes as they are.
PIXEL_SCALE = 1.0 / 255.0
SCORE_THRESHOLD = 0.01
NMS_IOU = 0.5
MAX_CANDIDATES = 400
MAX_DETECTIONS = 100


class TensorSpec(Protocol):
    """Name, shape and NumPy type name of an input."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def shape(self) -> Sequence[int | str | None] | None: ...  # noqa: D102
    @property
    def dtype(self) -> str: ...  # noqa: D102


class Runner(Protocol):
    """What `onnxprune` hands to an evaluator."""

    @property
    def inputs(self) -> Sequence[TensorSpec]: ...  # noqa: D102
    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        """All outputs by name for one batch."""
        ...


class Detections(NamedTuple):
    """What is left after non-maximum suppression, best first.

    Attributes:
        boxes: (D, 4), x0 y0 x1 y1 in pixels.
        scores: (D,), 0 to 1.
        labels: (D,), 0 to 9.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]


def detector_map_test(runner: Runner) -> float:
    """COCO mAP (IoU 0.50 to 0.95) on the test canvases."""
    return detector_metrics(runner, "test")["mAP"]


def detector_map_validation(runner: Runner) -> float:
    """COCO mAP (IoU 0.50 to 0.95) on the validation canvases: the set to choose ratios on."""
    return detector_metrics(runner, "validation")["mAP"]


def detector_metrics(runner: Runner, canvases: str) -> dict[str, float]:
    """Give mAP, AP50 and AP75 on one folder of canvases ("test" or "validation")."""
    spec = runner.inputs[0]

    def predict(pixels: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[Any]]:
        chw = np.ascontiguousarray(pixels.transpose(2, 0, 1))[np.newaxis]
        outputs = runner.run({spec.name: _as_input(chw, spec.dtype)})
        return outputs["boxes"], outputs["scores"]

    return coco_metrics(predict, canvases)


def classifier_top1(runner: Runner) -> float:
    """Share of the 359 test digits whose highest class score is the right one."""
    with np.load(IMAGES / "classifier_test.npz") as archive:
        images, labels = archive["image"], archive["label"]
    spec = runner.inputs[0]
    # PyTorch's classifier takes (N, 1, 32, 32), Keras' takes (N, 32, 32, 1).
    if spec.shape is not None and spec.shape[-1] == 1:
        images = images.transpose(0, 2, 3, 1)
    right = 0
    for image, label in zip(images, labels, strict=True):
        outputs = runner.run({spec.name: _as_input(image[np.newaxis], spec.dtype)})
        right += int(np.argmax(next(iter(outputs.values()))) == label)
    return right / len(labels)


def coco_metrics(
    predict: Callable[[NDArray[np.uint8]], tuple[NDArray[Any], NDArray[Any]]], canvases: str
) -> dict[str, float]:
    """Give mAP, AP50 and AP75 of `predict` on a folder of canvases.

    Args:
        predict: Takes the pixels (H, W, 3) uint8 of one canvas, gives boxes (1, A, 4) in pixels and
            scores (1, A, 10) before non-maximum suppression.
        canvases: Folder under `images/` with a COCO file of the same name next to it.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth_data = json.loads((IMAGES / f"{canvases}.json").read_text(encoding="utf-8"))
    results: list[dict[str, Any]] = []
    for image_id, pixels in _pictures(truth_data, IMAGES / canvases):
        boxes, scores = predict(pixels)
        found = suppress(boxes[0], scores[0])
        for box, score, label in zip(found.boxes, found.scores, found.labels, strict=True):
            x0, y0, x1, y1 = (float(value) for value in box)
            results.append(
                {
                    "image_id": image_id,
                    "category_id": int(label),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "score": float(score),
                }
            )
    if not results:
        return {"mAP": 0.0, "AP50": 0.0, "AP75": 0.0}
    # pycocotools reports its progress with print.
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = truth_data
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    mean, at_50, at_75 = (float(value) for value in evaluation.stats[:3])
    return {"mAP": mean, "AP50": at_50, "AP75": at_75}


def suppress(boxes: NDArray[Any], scores: NDArray[Any]) -> Detections:
    """Greedy non-maximum suppression per class.

    Args:
        boxes: (A, 4), x0 y0 x1 y1 in pixels.
        scores: (A, 10), 0 to 1.
    """
    anchors, labels = np.nonzero(scores > SCORE_THRESHOLD)
    values = scores[anchors, labels].astype(np.float32)
    best = np.argsort(-values, kind="stable")[:MAX_CANDIDATES]
    corners, values, labels = boxes[anchors[best]].astype(np.float32), values[best], labels[best]
    # Boxes of different classes never meet when each class has a plane of its own.
    span = float(np.abs(corners).max(initial=0.0)) * 2 + 1
    overlap = _iou(corners + (labels * span)[:, np.newaxis])
    alive = np.ones(len(values), bool)
    kept: list[int] = []
    for index in range(len(values)):
        if not alive[index]:
            continue
        kept.append(index)
        alive &= overlap[index] <= NMS_IOU
    kept = kept[:MAX_DETECTIONS]
    return Detections(boxes=corners[kept], scores=values[kept], labels=labels[kept])


def _iou(boxes: NDArray[Any]) -> NDArray[Any]:
    """Intersection over union of every pair: (D, 4) -> (D, D)."""
    low = np.maximum(boxes[:, np.newaxis, :2], boxes[np.newaxis, :, :2])
    high = np.minimum(boxes[:, np.newaxis, 2:], boxes[np.newaxis, :, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=-1)
    area = np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(axis=-1)
    union = area[:, np.newaxis] + area[np.newaxis, :] - shared
    overlap: NDArray[Any] = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return overlap


def _pictures(annotations: Mapping[str, Any], folder: Path) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    from PIL import Image

    for entry in annotations["images"]:
        with Image.open(folder / entry["file_name"]) as picture:
            yield entry["id"], np.asarray(picture.convert("RGB"))


def _as_input(pixels: NDArray[np.uint8], dtype: str) -> NDArray[Any]:
    if dtype == "uint8":
        return pixels
    return (pixels * np.float32(PIXEL_SCALE)).astype(dtype)
