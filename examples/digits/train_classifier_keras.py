"""Train a small MobileNetV2-like classifier in Keras 3 and save it to `models/classifier.keras`.

    python examples/digits/train_classifier_keras.py

Input `image` (N, 32, 32, 1), grey from 0 to 1, ink bright; output `probabilities` (N, 10).
Every BatchNorm scale has an L1 penalty (network slimming, Liu et al., ICCV 2017). The test digits are
looked at once, after the last epoch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import data
import keras
import numpy as np
from keras import layers
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
PIXEL_SCALE = np.float32(1.0 / 255.0)
# Output channels, expansion, stride of each inverted residual block.
BLOCKS = ((16, 3, 2), (16, 3, 1), (32, 4, 2), (32, 4, 1), (32, 4, 1), (48, 4, 2), (48, 4, 1))


def build(slimming: float) -> keras.Model:
    """Give the network with fresh weights; `slimming` is the L1 penalty on BatchNorm scales."""

    def norm(name: str) -> layers.Layer:
        return layers.BatchNormalization(gamma_regularizer=keras.regularizers.L1(slimming), momentum=0.95, name=name)

    image = keras.Input((data.CLASSIFIER_SIZE, data.CLASSIFIER_SIZE, 1), name="image")
    features = layers.Conv2D(16, 3, padding="same", use_bias=False, name="stem_conv")(image)
    features = layers.ReLU(6.0, name="stem_relu6")(norm("stem_norm")(features))
    inputs = 16
    for number, (channels, expansion, stride) in enumerate(BLOCKS):
        name = f"block{number}"
        hidden = layers.Conv2D(inputs * expansion, 1, use_bias=False, name=f"{name}_expand")(features)
        hidden = layers.ReLU(6.0, name=f"{name}_expand_relu6")(norm(f"{name}_expand_norm")(hidden))
        hidden = layers.DepthwiseConv2D(3, stride, padding="same", use_bias=False, name=f"{name}_depthwise")(hidden)
        hidden = layers.ReLU(6.0, name=f"{name}_depthwise_relu6")(norm(f"{name}_depthwise_norm")(hidden))
        projected = layers.Conv2D(channels, 1, use_bias=False, name=f"{name}_project")(hidden)
        projected = norm(f"{name}_project_norm")(projected)
        if stride == 1 and channels == inputs:
            features = layers.Add(name=f"{name}_add")([features, projected])
        else:
            features = projected
        inputs = channels
    features = layers.Conv2D(128, 1, use_bias=False, name="top_conv")(features)
    features = layers.ReLU(6.0, name="top_relu6")(norm("top_norm")(features))
    features = layers.GlobalAveragePooling2D(name="pool")(features)
    output = layers.Dense(10, activation="softmax", name="probabilities")(features)
    return keras.Model(image, output, name="digits_mobilenet")


class AugmentedDigits(keras.utils.PyDataset):
    """Training digits, shifted, turned, scaled and slanted anew each epoch."""

    def __init__(self, split: data.DigitSplit, *, batch: int, seed: int) -> None:
        super().__init__()
        self.split = split
        self.batch = batch
        self.generator = np.random.default_rng(seed)
        self.order = self.generator.permutation(len(split.labels))

    def __len__(self) -> int:
        return len(self.split.labels) // self.batch

    def __getitem__(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        chosen = self.order[index * self.batch : (index + 1) * self.batch]
        pictures = [data.classifier_image(self.split.images[which], self.generator) for which in chosen]
        return np.stack(pictures)[..., np.newaxis] * PIXEL_SCALE, self.split.labels[chosen]

    def on_epoch_end(self) -> None:
        """Shuffle."""
        self.order = self.generator.permutation(len(self.split.labels))


def evaluation_pair(split: data.DigitSplit) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Give upright, unchanged digits and their labels."""
    pictures = np.stack([data.classifier_image(image) for image in split.images])
    return pictures[..., np.newaxis] * PIXEL_SCALE, split.labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--slimming", type=float, default=2e-3, help="L1 on BatchNorm scales")
    parser.add_argument("--out", type=Path, default=HERE / "models" / "classifier.keras")
    given = parser.parse_args()
    keras.utils.set_random_seed(given.seed)
    splits = data.load_splits()
    digits = AugmentedDigits(splits["train"], batch=given.batch, seed=given.seed)
    model = build(given.slimming)
    steps = given.epochs * len(digits)
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, steps, warmup_target=given.learning_rate, warmup_steps=steps // 20
    )
    model.compile(
        optimizer=keras.optimizers.AdamW(rate, weight_decay=0.02),
        loss=keras.losses.SparseCategoricalCrossentropy(),
        metrics=["accuracy"],
        jit_compile=False,
    )
    model.fit(
        digits,
        epochs=given.epochs,
        validation_data=evaluation_pair(splits["validation"]),
        verbose=2,
        shuffle=False,
    )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    # Without the optimizer's moments the file is a third of the size.
    keras.Model(model.inputs, model.outputs, name=model.name).save(given.out)
    _, accuracy = model.evaluate(*evaluation_pair(splits["test"]), verbose=0)
    print(f"test accuracy {accuracy:.4f}, {model.count_params()} parameters")


if __name__ == "__main__":
    main()
