"""A small residual network for the digits, as a factory that `onnxprune` can call.

    onnxprune convert examples/digits/resnet.py:build --weights examples/digits/models/classifier.safetensors

Input `image` (N, 1, 32, 32), grey from 0 to 1, ink bright; output logits (N, 10).
The file imports nothing but torch, so that it can be loaded on its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 10
WIDTHS = (16, 32, 64)
BLOCKS_PER_STAGE = 2


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions; the input is added back, projected where width or stride changes."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.activation = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, features: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        hidden = self.activation(self.norm1(self.conv1(features)))
        joined: Tensor = self.activation(self.norm2(self.conv2(hidden)) + self.shortcut(features))
        return joined


class ResNet(nn.Module):
    """Stem, three stages of residual blocks, global average pooling, one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, WIDTHS[0], 3, padding=1, bias=False), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU()
        )
        self.stages = nn.Sequential()
        inputs = WIDTHS[0]
        for stage, width in enumerate(WIDTHS):
            blocks = nn.Sequential()
            for block in range(BLOCKS_PER_STAGE):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(ResidualBlock(inputs, width, stride=stride))
                inputs = width
            self.stages.append(blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classify = nn.Linear(inputs, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        """(N, 1, 32, 32) -> logits (N, 10)."""
        features = self.pool(self.stages(self.stem(image)))
        logits: Tensor = self.classify(features.flatten(1))
        return logits


def build() -> dict[str, Any]:
    """Give the network with fresh weights, one example of its input, and the name of its output."""
    return {
        "module": ResNet(),
        "example_inputs": {"image": torch.zeros(1, 1, 32, 32)},
        "output_names": ["logits"],
    }
