"""Train the PyTorch classifier of `resnet.py` and save its weights to `models/classifier.safetensors`.

    python examples/digits/train_classifier_torch.py

Each epoch shows every training digit once, shifted, turned, scaled and slanted anew. Group-sparse as
described in `slimming.py`. The test digits are looked at once, after the last step.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import data
import numpy as np
import slimming
import torch
from resnet import ResidualBlock, ResNet
from safetensors.torch import save_file
from slimming import ChannelGroup
from torch import Tensor, nn
from torch.nn import functional

HERE = Path(__file__).resolve().parent
PIXEL_SCALE = 1.0 / 255.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a run depends on besides the digits."""

    seed: int
    epochs: int
    batch: int
    learning_rate: float
    weight_decay: float
    lasso: float
    dead_target: float


def train(settings: Settings) -> ResNet:
    """Give the trained network, in evaluation mode."""
    torch.manual_seed(settings.seed)
    generator = np.random.default_rng(settings.seed)
    splits = data.load_splits()
    labels = torch.from_numpy(splits["train"].labels)
    model = ResNet().train()
    groups = channel_groups(model)
    slimming.start_low(groups)
    decayed = [value for value in model.parameters() if value.ndim > 1]
    free = [value for value in model.parameters() if value.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": settings.weight_decay},
            {"params": free, "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
    )
    alive: list[Tensor] | None = None
    steps_per_epoch = len(labels) // settings.batch
    for epoch in range(settings.epochs):
        pictures = np.stack([data.classifier_image(image, generator) for image in splits["train"].images])
        images = torch.from_numpy(pictures)[:, None].to(torch.float32) * PIXEL_SCALE
        order = torch.from_numpy(generator.permutation(len(labels)))
        for step in range(steps_per_epoch):
            progress = (epoch * steps_per_epoch + step) / (settings.epochs * steps_per_epoch)
            rate = settings.learning_rate * min(1.0, progress / 0.05 + 0.01)
            rate *= 0.5 * (1.0 + math.cos(math.pi * progress))
            for part in optimizer.param_groups:
                part["lr"] = rate
            chosen = order[step * settings.batch : (step + 1) * settings.batch]
            loss = functional.cross_entropy(model(images[chosen]), labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if alive is not None:
                slimming.hold_zeros(groups, alive)
            elif progress > 0.1:
                slimming.shrink(groups, step=rate * settings.lasso)
                if slimming.dead_ratio(groups) >= settings.dead_target:
                    alive = slimming.alive_channels(groups)
        print(
            f"epoch {epoch + 1} loss {loss.item():.4f} dead {slimming.dead_ratio(groups):.3f} "
            f"validation {accuracy(model, splits['validation']):.4f}",
            flush=True,
        )
    slimming.settle(groups)
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, split: data.DigitSplit) -> float:
    """Give the share of right answers on upright, unchanged digits; the mode is kept."""
    training = model.training
    model.eval()
    pictures = np.stack([data.classifier_image(image) for image in split.images])[:, np.newaxis]
    logits = model(torch.from_numpy(pictures).to(torch.float32) * PIXEL_SCALE)
    model.train(training)
    return float((logits.argmax(dim=1).numpy() == split.labels).mean())


def channel_groups(model: ResNet) -> list[ChannelGroup]:
    """Name the channels that live or die together: one inside each block, one stream per stage."""
    groups = []
    stream = [(model.stem[0], model.stem[1])]
    for number, stage in enumerate(model.stages):
        if not isinstance(stage, nn.Sequential):
            raise TypeError(f"stage {number} is no sequence of blocks")
        for index, block in enumerate(stage):
            if not isinstance(block, ResidualBlock):
                raise TypeError(f"block {index} of stage {number} is no ResidualBlock")
            name = f"stages.{number}.{index}.hidden"
            groups.append(_group(name, [(block.conv1, block.norm1)]))
            stream.append((block.conv2, block.norm2))
            if isinstance(block.shortcut, nn.Sequential):
                stream.append((block.shortcut[0], block.shortcut[1]))
        groups.append(_group(f"stages.{number}.stream", stream))
        stream = []
    return groups


def _group(name: str, pairs: list[tuple[nn.Module, nn.Module]]) -> ChannelGroup:
    convs, norms = [], []
    for conv, norm in pairs:
        if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
            raise TypeError(f"'{name}' is not made of convolutions and BatchNorms")
        convs.append(conv)
        norms.append(norm)
    return ChannelGroup(name=name, norms=tuple(norms), producers=tuple(convs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--lasso", type=float, default=0.5, help="strength of the group lasso")
    parser.add_argument("--dead-target", type=float, default=0.45, help="share of zero channels")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "models" / "classifier.safetensors")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = train(
        Settings(
            seed=given.seed,
            epochs=given.epochs,
            batch=given.batch,
            learning_rate=given.learning_rate,
            weight_decay=given.weight_decay,
            lasso=given.lasso,
            dead_target=given.dead_target,
        )
    )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), given.out)
    print(f"test accuracy {accuracy(model, data.load_splits()['test']):.4f}")


if __name__ == "__main__":
    main()
