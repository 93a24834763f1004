"""Real PyTorch checkpoints with their traps: prefixes, nested dicts, Lambda shortcuts, ceil-mode pooling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from onnxprune.convert.source import SourceRequest, open_source
from onnxprune.errors import ModelError
from onnxprune.runtime.sessions import ort_runner_from_model

pytestmark = pytest.mark.usefixtures("torch", "convert_here")

# Option A of the ResNet paper: the shortcut takes every second pixel and pads the channels with zeros.
RESNET20 = """
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Lambda(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function

        def forward(self, x):
            return self.function(x)

    class Block(nn.Module):
        def __init__(self, planes_in, planes, stride):
            super().__init__()
            self.conv1 = nn.Conv2d(planes_in, planes, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(planes)
            self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(planes)
            self.shortcut = nn.Sequential()
            if stride != 1 or planes_in != planes:
                pad = planes // 4
                self.shortcut = Lambda(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, pad, pad)))

        def forward(self, x):
            out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            return F.relu(out + self.shortcut(x))

    class ResNet(nn.Module):
        def __init__(self, widths=(16, 32, 64)):
            super().__init__()
            self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(16)
            planes = 16
            for number, width in enumerate(widths, 1):
                blocks = []
                for index in range(3):
                    blocks.append(Block(planes, width, 2 if number > 1 and index == 0 else 1))
                    planes = width
                setattr(self, f"layer{number}", nn.Sequential(*blocks))
            self.linear = nn.Linear(planes, 10)

        def forward(self, image):
            out = F.relu(self.bn1(self.conv1(image)))
            out = self.layer3(self.layer2(self.layer1(out)))
            return self.linear(out.mean((2, 3)))

    def make():
        return {"module": ResNet(), "example_inputs": torch.zeros(2, 3, 32, 32), "output_names": ["logits"],
                "dynamic_shapes": {"image": {0: torch.export.Dim("batch")}}}

    def narrow():
        return ResNet((16, 32, 48)), torch.zeros(1, 3, 32, 32)
"""

SQUEEZENET = """
    import torch
    from torch import nn

    class Fire(nn.Module):
        def __init__(self, planes_in, squeezed, expanded):
            super().__init__()
            self.squeeze = nn.Conv2d(planes_in, squeezed, 1)
            self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
            self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

        def forward(self, x):
            x = self.squeeze(x).relu()
            return torch.cat([self.expand1x1(x).relu(), self.expand3x3(x).relu()], 1)

    class SqueezeNet(nn.Module):
        def __init__(self):
            super().__init__()
            pool = lambda: nn.MaxPool2d(3, 2, ceil_mode=True)
            self.features = nn.Sequential(
                nn.Conv2d(3, 64, 3, 2), nn.ReLU(), pool(), Fire(64, 16, 64), Fire(128, 16, 64), pool(),
                Fire(128, 32, 128), Fire(256, 32, 128), pool(), Fire(256, 48, 192), Fire(384, 48, 192),
                Fire(384, 64, 256), Fire(512, 64, 256))
            self.classifier = nn.Sequential(nn.Dropout(), nn.Conv2d(512, 1000, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

        def forward(self, x):
            return torch.flatten(self.classifier(self.features(x)), 1)

    def make():
        return SqueezeNet()
"""

# Channel shuffle by reshape and permute, nearest upsampling, and a head whose three parts are joined.
FASTESTDET = """
    import torch
    import torch.nn.functional as F
    from torch import nn

    def depthwise(planes, size, stride=1):
        return nn.Conv2d(planes, planes, size, stride, size // 2, groups=planes, bias=False), nn.BatchNorm2d(planes)

    def pointwise(planes_in, planes):
        return nn.Conv2d(planes_in, planes, 1, bias=False), nn.BatchNorm2d(planes)

    class Unit(nn.Module):
        def __init__(self, planes_in, planes, stride):
            super().__init__()
            self.stride = stride
            self.branch_main = nn.Sequential(
                *pointwise(planes_in, planes), nn.ReLU(), *depthwise(planes, 3, stride), *pointwise(planes, planes),
                nn.ReLU())
            if stride == 2:
                self.branch_proj = nn.Sequential(
                    *depthwise(planes_in, 3, 2), *pointwise(planes_in, planes_in), nn.ReLU())

        def forward(self, x):
            if self.stride == 2:
                return torch.cat((self.branch_proj(x), self.branch_main(x)), 1)
            b, c, h, w = x.shape
            x = x.reshape(b * c // 2, 2, h * w).permute(1, 0, 2).reshape(2, -1, c // 2, h, w)
            return torch.cat((x[0], self.branch_main(x[1])), 1)

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.first_conv = nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
            for name, planes, count in (("stage2", 24, 4), ("stage3", 48, 8), ("stage4", 96, 4)):
                units = [Unit(planes, planes, 2 if i == 0 else 1) for i in range(count)]
                setattr(self, name, nn.Sequential(*units))

        def forward(self, x):
            x = F.max_pool2d(self.first_conv(x), 3, 2, 1)
            second = self.stage2(x)
            third = self.stage3(second)
            return second, third, self.stage4(third)

    class Conv1x1(nn.Module):
        def __init__(self, planes_in, planes):
            super().__init__()
            self.conv1x1 = nn.Sequential(*pointwise(planes_in, planes), nn.ReLU())

        def forward(self, x):
            return self.conv1x1(x)

    class SPP(nn.Module):
        def __init__(self):
            super().__init__()
            self.Conv1x1 = Conv1x1(336, 96)
            for count in (1, 2, 3):
                layers = [layer for _ in range(count) for layer in (*depthwise(96, 5), nn.ReLU())]
                setattr(self, f"S{count}", nn.Sequential(*layers))
            self.output = nn.Sequential(*pointwise(288, 96))

        def forward(self, x):
            x = self.Conv1x1(x)
            return F.relu(x + self.output(torch.cat((self.S1(x), self.S2(x), self.S3(x)), 1)))

    class Head(nn.Module):
        def __init__(self, planes):
            super().__init__()
            self.conv5x5 = nn.Sequential(*depthwise(96, 5), nn.ReLU(), *pointwise(96, planes))

        def forward(self, x):
            return self.conv5x5(x)

    class DetectHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1x1 = Conv1x1(96, 96)
            self.obj_layers, self.reg_layers, self.cls_layers = Head(1), Head(4), Head(80)

        def forward(self, x):
            x = self.conv1x1(x)
            parts = self.obj_layers(x).sigmoid(), self.reg_layers(x), self.cls_layers(x).softmax(1)
            return torch.cat(parts, 1)

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.SPP, self.detect_head = Backbone(), SPP(), DetectHead()

        def forward(self, image):
            second, third, fourth = self.backbone(image)
            up = F.interpolate(fourth, scale_factor=2)
            down = F.avg_pool2d(second, 3, 2, 1)
            return self.detect_head(self.SPP(torch.cat((down, third, up), 1)))

    def make():
        return Detector()
"""


def test_resnet20_checkpoint_is_converted_and_classifies(shared_data: Path, write_module: Callable[..., Path]) -> None:
    image_module = pytest.importorskip("PIL.Image")
    weights = shared_data / "resnet20_cifar10" / "resnet20-12fca82f.th"

    converted = open_source(SourceRequest(source=f"{write_module(RESNET20)}:make", weights=weights))

    assert converted.report.notes == (
        "The weights are those under 'state_dict' in the checkpoint.",
        "The prefix 'module.' was taken off the names of the weights.",
    )
    assert converted.report.inputs[0].shape == ("batch", 3, 32, 32)
    assert converted.report.difference is not None
    assert converted.report.difference.max_rel < 1e-4
    rows = (shared_data / "cifar10_ic01" / "labels.csv").read_text().split()[1:]
    pairs = [row.split(",") for row in rows]
    folder = shared_data / "cifar10_ic01" / "images"
    images = np.stack([np.asarray(image_module.open(folder / name), np.float32) / 255 for name, _ in pairs])
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    batch = ((images - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
    logits = ort_runner_from_model(converted.model).run({"image": batch})["logits"]
    # The data's description says 91 % of these 100 images.
    assert np.mean(logits.argmax(1) == [int(label) for _, label in pairs]) == pytest.approx(0.91, abs=0.005)


def test_checkpoint_of_another_width_is_refused_with_the_layers(
    shared_data: Path, write_module: Callable[..., Path]
) -> None:
    weights = shared_data / "resnet20_cifar10" / "resnet20-12fca82f.th"

    with pytest.raises(
        ModelError, match=r"of another shape: 'layer3.0.conv1.weight \(64x32x3x3 in the file, 48x32x3x3"
    ):
        open_source(SourceRequest(source=f"{write_module(RESNET20)}:narrow", weights=weights))


def test_squeezenet_is_converted_with_module_paths(shared_data: Path, write_module: Callable[..., Path]) -> None:
    weights = shared_data / "squeezenet1_1" / "squeezenet1_1_torchvision_norm.pth"
    source = f"{write_module(SQUEEZENET)}:make"

    converted = open_source(SourceRequest(source=source, weights=weights, shapes={"x": (1, 3, 96, 96)}))

    assert converted.report.difference is not None
    assert converted.report.difference.max_rel < 1e-4
    paths = {
        node.metadata_props.get("onnxprune.module_path") for node in converted.model.graph if node.op_type == "Conv"
    }
    assert {"features.0", "features.3.squeeze", "features.12.expand3x3", "classifier.1"} <= paths


def test_bare_checkpoint_as_a_source_asks_for_a_factory(shared_data: Path) -> None:
    with pytest.raises(ModelError, match=r"bare state dict.*factory"):
        open_source(SourceRequest(source=shared_data / "resnet20_cifar10" / "resnet20-12fca82f.th"))


def test_fastestdet_weights_give_the_same_detector_as_its_author_s_onnx(
    shared_data: Path, write_module: Callable[..., Path]
) -> None:
    weights = shared_data / "fastestdet" / "fastestdet_coco_ap50_0.253.pth"
    source = f"{write_module(FASTESTDET)}:make"

    ours = open_source(SourceRequest(source=source, weights=weights, shapes={"image": (1, 3, 352, 352)}))
    theirs = open_source(SourceRequest(source=shared_data / "fastestdet" / "FastestDet.onnx"))

    image = np.random.default_rng(0).random((1, 3, 352, 352), dtype=np.float32)
    (expected,) = ort_runner_from_model(theirs.model).run({theirs.report.inputs[0].name: image}).values()
    (actual,) = ort_runner_from_model(ours.model).run({"image": image}).values()
    # Two exporters, one of which folded BatchNorm into the weights: float32 rounding over some 60 layers.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)
