"""Train the digits detector and export it to `models/detector.onnx`.

    python examples/digits/train_detector.py

Every picture is a fresh canvas of training digits, so no picture is seen twice. Losses: quality focal
loss (Li et al., NeurIPS 2020: the target of a class score is the IoU that its box reaches) and GIoU
(Rezatofighi et al., CVPR 2019). Until enough channels are zero the group lasso of `slimming.py` is on;
after that the zeros are held and the rest is trained to the end.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import data
import numpy as np
import onnx
import score
import slimming
import torch
from detector import CLASSES, Detector, anchor_boxes, build, channel_groups
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

HERE = Path(__file__).resolve().parent
BACKGROUND, IGNORED = -1, -2
POSITIVE_IOU, IGNORE_IOU, FALLBACK_IOU = 0.5, 0.4, 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a run depends on besides the digits."""

    seed: int
    steps: int
    batch: int
    learning_rate: float
    weight_decay: float
    lasso: float
    dead_target: float
    out: Path


class CanvasStream(IterableDataset[tuple[Tensor, Tensor, Tensor]]):
    """Endless (image, class per anchor, box per anchor) of training digits."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        worker = get_worker_info()
        seed = [self.seed, 0 if worker is None else worker.id]
        generator = np.random.default_rng(seed)
        split = data.load_splits()["train"]
        anchors = _corners(anchor_boxes().numpy())
        while True:
            canvas = data.make_canvas(split, generator)
            labels, boxes = match(anchors, canvas)
            image = torch.from_numpy(np.ascontiguousarray(canvas.pixels.transpose(2, 0, 1)))
            yield image, torch.from_numpy(labels), torch.from_numpy(boxes)


def match(anchors: NDArray[np.float32], canvas: data.Canvas) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Give each anchor (A, 4 corners) its class, BACKGROUND or IGNORED (A,), and its box (A, 4).

    An anchor takes the digit it overlaps most, from `POSITIVE_IOU` on. Each digit also gets its two
    best anchors, from `FALLBACK_IOU` on, so that odd shapes are learned too.
    """
    labels = np.full(len(anchors), BACKGROUND, np.int64)
    boxes = np.zeros((len(anchors), 4), np.float32)
    if len(canvas.labels) == 0:
        return labels, boxes
    overlap = _pairwise_iou(anchors, canvas.boxes)
    nearest, reached = overlap.argmax(axis=1), overlap.max(axis=1)
    labels[reached >= IGNORE_IOU] = IGNORED
    chosen = reached >= POSITIVE_IOU
    labels[chosen] = canvas.labels[nearest[chosen]]
    boxes[chosen] = canvas.boxes[nearest[chosen]]
    for digit, column in enumerate(overlap.T):
        for anchor in np.argsort(-column, kind="stable")[:2]:
            if column[anchor] >= FALLBACK_IOU:
                labels[anchor] = canvas.labels[digit]
                boxes[anchor] = canvas.boxes[digit]
    return labels, boxes


def losses(logits: Tensor, boxes: Tensor, labels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Give the class loss and the box loss, both per digit anchor.

    Args:
        logits: (N, A, 10).
        boxes: (N, A, 4) decoded, pixels.
        labels: (N, A), a class, BACKGROUND or IGNORED.
        targets: (N, A, 4), pixels; read where the label is a class.
    """
    positive = labels >= 0
    count = positive.sum().clamp_min(1)
    overlap, generalized = _iou_and_giou(boxes[positive], targets[positive])
    quality = torch.zeros_like(logits)
    quality[positive] = (
        functional.one_hot(labels[positive], CLASSES).to(logits.dtype) * overlap.detach().clamp(0, 1)[:, None]
    )
    focus = (logits.sigmoid() - quality).square().detach()
    entropy = functional.binary_cross_entropy_with_logits(logits, quality, reduction="none")
    per_anchor = (focus * entropy).sum(dim=-1)
    class_loss = per_anchor[labels != IGNORED].sum() / count
    return class_loss, (1.0 - generalized).sum() / count


def train(settings: Settings) -> Detector:
    """Give the trained detector, in evaluation mode; checkpoints go to `settings.out`."""
    torch.manual_seed(settings.seed)
    model = build().train().to(memory_format=torch.channels_last)
    groups = channel_groups(model)
    slimming.start_low(groups)
    optimizer = _optimizer(model, settings)
    loader = iter(DataLoader(CanvasStream(settings.seed), batch_size=settings.batch, num_workers=1))
    alive: list[Tensor] | None = None
    started = time.monotonic()
    sums = np.zeros(2)
    for step in range(settings.steps):
        rate = _learning_rate(step, settings)
        for part in optimizer.param_groups:
            part["lr"] = rate
        images, labels, targets = next(loader)
        pixels = images.to(torch.float32).mul_(score.PIXEL_SCALE)
        logits, offsets = model.predict(pixels.contiguous(memory_format=torch.channels_last))
        class_loss, box_loss = losses(logits, model.decode(offsets), labels, targets)
        optimizer.zero_grad(set_to_none=True)
        (class_loss + 2.0 * box_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        if alive is not None:
            slimming.hold_zeros(groups, alive)
        elif step > settings.steps // 10:
            slimming.shrink(groups, step=rate * settings.lasso)
            if slimming.dead_ratio(groups) >= settings.dead_target:
                alive = slimming.alive_channels(groups)
                print(f"step {step + 1}: zeros are held from here on", flush=True)
        sums += (class_loss.item(), box_loss.item())
        if (step + 1) % 50 == 0:
            print(
                f"step {step + 1} class {sums[0] / 50:.4f} box {sums[1] / 50:.4f} "
                f"dead {slimming.dead_ratio(groups):.3f} {time.monotonic() - started:.0f} s",
                flush=True,
            )
            sums[:] = 0
        if (step + 1) % max(1, settings.steps // 8) == 0:
            print(f"step {step + 1} {evaluate(model, 'validation')}", flush=True)
            torch.save(model.state_dict(), settings.out.with_suffix(".checkpoint.pt"))
    slimming.settle(groups)
    for group, mask in zip(groups, slimming.alive_channels(groups), strict=True):
        print(f"{group.name}: {int(mask.sum())} of {len(mask)} channels alive")
    return model.eval()


@torch.no_grad()
def evaluate(model: Detector, canvases: str) -> dict[str, float]:
    """Give mAP, AP50 and AP75 of the PyTorch model; it is left in the mode it was in."""
    training = model.training
    model.eval()

    def predict(pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        image = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]
        boxes, scores = model(image.to(torch.float32) * score.PIXEL_SCALE)
        return boxes.numpy(), scores.numpy()

    metrics = score.coco_metrics(predict, canvases)
    model.train(training)
    return metrics


def export(model: Detector, path: Path) -> None:
    """Write the detector as one ONNX file: opset 18, static shapes, module paths kept.

    The exporter also notes the stack trace of each node, with the folders of this machine; that is
    taken out, for the file must not depend on where it was made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        model.eval().to(memory_format=torch.contiguous_format),
        (torch.zeros(1, 3, data.CANVAS_SIZE, data.CANVAS_SIZE),),
        path,
        input_names=["image"],
        output_names=["boxes", "scores"],
        opset_version=18,
        dynamo=True,
        external_data=False,
    )
    graph = onnx.load(path)
    for node in graph.graph.node:
        kept = [entry for entry in node.metadata_props if not entry.key.endswith("stack_trace")]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    onnx.save(graph, path)


def _optimizer(model: Detector, settings: Settings) -> torch.optim.AdamW:
    """Decay the weights of convolutions only; scales, shifts and biases have the lasso or nothing."""
    decayed = [value for value in model.parameters() if value.ndim > 1]
    free = [value for value in model.parameters() if value.ndim == 1]
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": settings.weight_decay},
            {"params": free, "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
    )


def _learning_rate(step: int, settings: Settings) -> float:
    """Rise over the first 3 %, then fall along a half cosine."""
    warm_up = max(1, settings.steps * 3 // 100)
    if step < warm_up:
        return settings.learning_rate * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, settings.steps - warm_up)
    return settings.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


def _corners(anchors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Centre and size -> corners."""
    half = anchors[:, 2:] / 2
    return np.concatenate((anchors[:, :2] - half, anchors[:, :2] + half), axis=1)


def _pairwise_iou(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float32]:
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=-1)
    area = (first[:, 2:] - first[:, :2]).prod(axis=-1)[:, None]
    other = (second[:, 2:] - second[:, :2]).prod(axis=-1)[None, :]
    overlap: NDArray[np.float32] = shared / (area + other - shared)
    return overlap


def _iou_and_giou(boxes: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    low = torch.maximum(boxes[:, :2], targets[:, :2])
    high = torch.minimum(boxes[:, 2:], targets[:, 2:])
    shared = (high - low).clamp_min(0).prod(dim=-1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=-1)
    union = area + (targets[:, 2:] - targets[:, :2]).prod(dim=-1) - shared
    overlap = shared / union
    hull_low = torch.minimum(boxes[:, :2], targets[:, :2])
    hull_high = torch.maximum(boxes[:, 2:], targets[:, 2:])
    hull = (hull_high - hull_low).prod(dim=-1)
    return overlap, overlap - (hull - union) / hull


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.02)
    parser.add_argument("--lasso", type=float, default=0.25, help="strength of the group lasso")
    parser.add_argument("--dead-target", type=float, default=0.45, help="share of zero channels")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "models" / "detector.onnx")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    settings = Settings(
        seed=given.seed,
        steps=given.steps,
        batch=given.batch,
        learning_rate=given.learning_rate,
        weight_decay=given.weight_decay,
        lasso=given.lasso,
        dead_target=given.dead_target,
        out=given.out,
    )
    model = train(settings)
    export(model, settings.out)
    print("validation", evaluate(model, "validation"))
    print("test", evaluate(model, "test"))


if __name__ == "__main__":
    main()
