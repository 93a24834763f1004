"""A MobileNetV2-SSD-like detector for digits on 192x192 canvases.

    image (N, 3, 192, 192), RGB from 0 to 1
      backbone  stem /2, inverted residuals /4, /8 (24x24), /16 (12x12), /32 (6x6)
      head      per feature map: depthwise 3x3, then 1x1 for classes and 1x1 for boxes (SSDLite)
    boxes  (N, 2268, 4)   x0 y0 x1 y1 in pixels, decoded from the anchors in the graph
    scores (N, 2268, 10)  sigmoid, one per digit; no background class

Non-maximum suppression is left to the application (`score.py`): it is no work for a graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from slimming import ChannelGroup
from torch import Tensor, nn

IMAGE_SIZE = 192
CLASSES = 10
# Anchor (width, height) in pixels per stride; ink is 0.35 to 1.05 times as wide as high.
ANCHORS: dict[int, tuple[tuple[float, float], ...]] = {
    8: ((14.0, 22.0), (19.0, 30.0), (14.0, 34.0)),
    16: ((26.0, 40.0), (34.0, 54.0), (24.0, 56.0)),
    32: ((44.0, 68.0), (56.0, 82.0), (34.0, 80.0)),
}
CENTRE_VARIANCE = 0.1
SIZE_VARIANCE = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Inverted residual blocks of one width; the first block changes width and stride."""

    channels: int
    expansion: int
    stride: int
    blocks: int


STAGES = (
    Stage(channels=24, expansion=3, stride=2, blocks=2),
    Stage(channels=40, expansion=4, stride=2, blocks=3),
    Stage(channels=80, expansion=5, stride=2, blocks=3),
    Stage(channels=112, expansion=5, stride=2, blocks=2),
)
STEM_CHANNELS = 16


def conv_norm(inputs: int, outputs: int, *, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution and BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection; added to the input where shapes allow."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = conv_norm(inputs, hidden)
        self.depthwise = conv_norm(hidden, hidden, kernel=3, stride=stride, groups=hidden)
        self.project = conv_norm(hidden, outputs)
        self.activation = nn.ReLU6()
        self.residual = stride == 1 and inputs == outputs

    def forward(self, features: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        hidden = self.activation(self.expand(features))
        hidden = self.activation(self.depthwise(hidden))
        projected: Tensor = self.project(hidden)
        return features + projected if self.residual else projected


class Backbone(nn.Module):
    """Image -> feature maps of stride 8, 16 and 32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_norm(3, STEM_CHANNELS, kernel=3, stride=2), nn.ReLU6())
        self.stages = nn.ModuleList()
        inputs = STEM_CHANNELS
        for stage in STAGES:
            blocks = []
            for number in range(stage.blocks):
                blocks.append(
                    InvertedResidual(
                        inputs,
                        stage.channels,
                        stride=stage.stride if number == 0 else 1,
                        expansion=stage.expansion,
                    )
                )
                inputs = stage.channels
            self.stages.append(nn.Sequential(*blocks))

    def forward(self, image: Tensor) -> list[Tensor]:
        """(N, 3, 192, 192) -> one (N, channels, 192 / stride, 192 / stride) per stride of `ANCHORS`."""
        features = self.stem(image)
        maps = []
        for stage in self.stages:
            features = stage(features)
            maps.append(features)
        return maps[1:]


class Branch(nn.Module):
    """SSDLite predictor: 1x1 widening, 3x3 depthwise, then a linear 1x1 with a bias."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.widen = conv_norm(inputs, hidden)
        self.depthwise = conv_norm(hidden, hidden, kernel=3, groups=hidden)
        self.activation = nn.ReLU6()
        self.predict = nn.Conv2d(hidden, outputs, 1)

    def forward(self, features: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H, W)."""
        hidden = self.activation(self.widen(features))
        hidden = self.activation(self.depthwise(hidden))
        prediction: Tensor = self.predict(hidden)
        return prediction


class Head(nn.Module):
    """Feature maps -> class logits (N, A, 10) and box offsets (N, A, 4), A anchors in all."""

    def __init__(self) -> None:
        super().__init__()
        widths = [stage.channels for stage in STAGES[1:]]
        anchors = [len(sizes) for sizes in ANCHORS.values()]
        self.classes = nn.ModuleList(
            Branch(width, max(128, 2 * width), count * CLASSES) for width, count in zip(widths, anchors, strict=True)
        )
        self.boxes = nn.ModuleList(
            Branch(width, max(96, width), count * 4) for width, count in zip(widths, anchors, strict=True)
        )
        for branch in self.classes:
            # Begin at a score of 0.02: the focal loss is then not swamped by background.
            nn.init.constant_(branch.predict.bias, -3.9)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Join the branches' predictions in the order of `anchor_boxes`."""
        logits = [_anchor_rows(branch(features), CLASSES) for branch, features in zip(self.classes, maps, strict=True)]
        offsets = [_anchor_rows(branch(features), 4) for branch, features in zip(self.boxes, maps, strict=True)]
        return torch.cat(logits, dim=1), torch.cat(offsets, dim=1)


class Detector(nn.Module):
    """Canvas -> decoded boxes in pixels and one score per digit."""

    anchors: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.head = Head()
        self.register_buffer("anchors", anchor_boxes(), persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Give decoded boxes (N, A, 4) in pixels and scores (N, A, 10)."""
        logits, offsets = self.predict(image)
        return self.decode(offsets), logits.sigmoid()

    def predict(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Give class logits and box offsets as the losses want them."""
        logits, offsets = self.head(self.backbone(image))
        return logits, offsets

    def decode(self, offsets: Tensor) -> Tensor:
        """Turn offsets (N, A, 4) to the anchors into boxes x0 y0 x1 y1 in pixels."""
        size = self.anchors[:, 2:]
        centre = self.anchors[:, :2] + offsets[..., :2] * (CENTRE_VARIANCE * size)
        half = torch.exp(offsets[..., 2:] * SIZE_VARIANCE) * (size / 2)
        return torch.cat((centre - half, centre + half), dim=-1)


def anchor_boxes() -> Tensor:
    """Give (A, 4): centre x, centre y, width, height in pixels, in the order of the head's rows."""
    rows = []
    for stride, sizes in ANCHORS.items():
        cells = IMAGE_SIZE // stride
        centres = (torch.arange(cells, dtype=torch.float32) + 0.5) * stride
        for y in centres.tolist():
            for x in centres.tolist():
                rows.extend((x, y, width, height) for width, height in sizes)
    return torch.tensor(rows, dtype=torch.float32)


def channel_groups(model: Detector) -> list[ChannelGroup]:
    """Name the channels that live or die together, for group-sparse training.

    The hidden channels of a block pass expansion and depthwise convolution; the channels of a stage
    pass the projections of all its blocks, because residual additions join them.
    """
    groups = [_group("backbone.stem", model.backbone.stem)]
    for number, stage in enumerate(model.backbone.stages):
        blocks = [block for block in stage if isinstance(block, InvertedResidual)]
        for index, block in enumerate(blocks):
            name = f"backbone.stages.{number}.{index}.hidden"
            groups.append(_group(name, block.expand, block.depthwise))
        projections = [block.project for block in blocks]
        groups.append(_group(f"backbone.stages.{number}.stream", *projections))
    for kind, branches in (("classes", model.head.classes), ("boxes", model.head.boxes)):
        for index, branch in enumerate(branches):
            if isinstance(branch, Branch):
                groups.append(_group(f"head.{kind}.{index}", branch.widen, branch.depthwise))
    return groups


def build() -> Detector:
    """Give the network with fresh weights, in evaluation mode."""
    return Detector().eval()


def _anchor_rows(prediction: Tensor, values: int) -> Tensor:
    """(N, anchors * values, H, W) -> (N, H * W * anchors, values)."""
    return prediction.permute(0, 2, 3, 1).reshape(prediction.shape[0], -1, values)


def _group(name: str, *parts: nn.Sequential) -> ChannelGroup:
    convs, norms = [], []
    for part in parts:
        conv, norm = part[0], part[1]
        if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
            raise TypeError(f"'{name}' does not begin with a convolution and a BatchNorm")
        convs.append(conv)
        norms.append(norm)
    return ChannelGroup(name=name, norms=tuple(norms), producers=tuple(convs))
