"""Our .tflite files against those of TensorFlow's own converter, for the same Keras networks.

    python tflite_keras.py [--only PATTERN] [--threads N] [--seconds S] [--precision fp32|int8]

ResNet50, MobileNetV2 and EfficientNetB0 of keras.applications with seeded weights, each in a process of its own. Both
files of a network run in LiteRT on the same input and are timed in turn in the same process. int8 is calibrated on the
same random pictures by both, with float inputs and outputs. Needs TensorFlow.

The columns dB are each file's signal-to-noise ratio against the float network as Keras runs it, over the calibration
pictures: two int8 files of one network have other scales, so they are not compared with each other. Means over the
pictures are taken off first, since random weights answer much the same to every picture.

The operators that compute are the same in both, but for a MUL that stays of the Rescaling layer in our int8
EfficientNetB0; ours has a RESHAPE behind the last MEAN. Intervals are wider than 0.1 where other work shares the
processor.

Goals: our latency within 1.02 of theirs, our file at most 1 % larger, no TRANSPOSE.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

Found = dict[str, Any]

# The range of a picture that each takes: EfficientNet scales bytes itself, the others want them scaled.
NETWORKS = {"ResNet50": (-1, 1), "MobileNetV2": (-1, 1), "EfficientNetB0": (0, 255)}
PRECISIONS = ("fp32", "int8")
_NUM_CALIBRATION = 8
_LIMIT_S = 1800


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--precision", choices=PRECISIONS, default=None)
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measure(options.one, options.precision, options)))
        return
    heads = (
        f"{'theirs ms':>9} {'ours ms':>8} {'ours/theirs':>20} {'bytes':>7} {'theirs dB':>9} {'ours dB':>8}  TRANSPOSE"
    )
    print(f"{'network':16} {'':4} {heads}")
    for name in NETWORKS:
        for precision in PRECISIONS if options.precision is None else (options.precision,):
            if fnmatch.fnmatch(name, options.only):
                print(line(in_a_process(name, precision, options)), flush=True)


def in_a_process(name: str, precision: str, options: argparse.Namespace) -> Found:
    command = [sys.executable, __file__, "--one", name, "--precision", precision]
    command += ["--threads", str(options.threads), "--seconds", str(options.seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_LIMIT_S)
    if done.returncode:
        return {"name": name, "precision": precision, "error": done.stderr.strip().splitlines()[-1][:200]}
    found: Found = json.loads(done.stdout.splitlines()[-1])
    return found


def pictures(name: str) -> list[np.ndarray]:
    """Random pictures for a network, with the long-range structure that real ones have."""
    rng = np.random.default_rng(0)
    low, high = NETWORKS[name]
    coarse = rng.uniform(0, 1, (_NUM_CALIBRATION, 8, 8, 3))
    fine = rng.normal(0, 0.05, (_NUM_CALIBRATION, 224, 224, 3))
    shares = np.clip(np.kron(coarse, np.ones((1, 28, 28, 1))) + fine, 0, 1)
    return list((low + (high - low) * shares).astype(np.float32))


class Calibration:
    """The pictures as a `CalibrationSource`."""

    content_hash = "seeded"
    num_samples = _NUM_CALIBRATION

    def __init__(self, images: list[np.ndarray], input_name: str) -> None:
        self.images = images
        self.input_name = input_name

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return ({self.input_name: image[None]} for image in self.images)


def measure(name: str, precision: str, options: argparse.Namespace) -> Found:
    """Figures of one network, measured in this process."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    from onnxprune.runtime.latency import interleaved_ratio
    from onnxprune.runtime.litert import litert_runner_from_path

    images = pictures(name)
    network = settled_network(name, images)
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = Path(folder) / "theirs.tflite", Path(folder) / "ours.tflite"
        theirs.write_bytes(by_tensorflow(network, precision, images))
        kinds = by_onnxprune(network, precision, images, Path(folder), ours)
        before, after = (litert_runner_from_path(path, threads=options.threads) for path in (theirs, ours))
        wanted = network(np.stack(images)).numpy()
        fed = [{runner.inputs[0].name: images[0][None]} for runner in (before, after)]
        timed = interleaved_ratio(
            before, after, fed[0], after_feeds=fed[1], min_seconds=options.seconds, threads=options.threads
        )
        return {
            "name": name,
            "precision": precision,
            "theirs_ms": timed.before.p50_ms,
            "ours_ms": timed.after.p50_ms,
            # The other way round: above 1 is slower than theirs.
            "ratio": 1 / timed.ratio,
            "low": 1 / timed.high,
            "high": 1 / timed.low,
            "bytes_ratio": ours.stat().st_size / theirs.stat().st_size,
            "theirs_db": signal_to_noise_db(wanted, answers(before, images)),
            "ours_db": signal_to_noise_db(wanted, answers(after, images)),
            "transposes": kinds["TRANSPOSE"],
        }


def settled_network(name: str, images: list[np.ndarray]) -> Any:
    """The network up to its logits, with the statistics of its pictures in every BatchNormalization.

    With fresh statistics numbers grow or vanish from layer to layer. Probabilities of random weights are all about
    1/1000, which is less than the step of TensorFlow's int8 ones.
    """
    import keras

    keras.utils.set_random_seed(0)
    network = getattr(keras.applications, name)(weights=None, classifier_activation=None)
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
    network(np.stack(images), training=True)
    return network


def answers(runner: Any, images: list[np.ndarray]) -> np.ndarray:
    """What a file says to each of the pictures."""
    name = runner.inputs[0].name
    return np.concatenate([next(iter(runner.run({name: image[None]}).values())) for image in images])


def signal_to_noise_db(wanted: np.ndarray, got: np.ndarray) -> float:
    signal, noise = wanted - wanted.mean(axis=0), (wanted - got) - (wanted - got).mean(axis=0)
    return float(10 * np.log10(np.square(signal).sum() / max(np.square(noise).sum(), 1e-30)))


def by_tensorflow(network: Any, precision: str, images: list[np.ndarray]) -> bytes:
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_keras_model(network)
    if precision == "int8":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ([image[None]] for image in images)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    content: bytes = converter.convert()
    return content


def by_onnxprune(network: Any, precision: str, images: list[np.ndarray], folder: Path, path: Path) -> Counter[str]:
    from onnxprune import api
    from onnxprune.contracts import TargetContext
    from onnxprune.runtime.litert import litert_runner_from_path
    from onnxprune.targets.tflite.target import TfliteConfig, TfliteTarget

    source = folder / "network.keras"
    network.save(source)
    state, _ = api.apply(api.load(source), "simplify")
    if precision == "int8":
        state, _ = api.apply(state, "quant", calibration=Calibration(images, state.model.graph.inputs[0].name or ""))
    built = folder / "built"
    built.mkdir()
    artifact = TfliteTarget(TfliteConfig()).build(state, TargetContext(folder=built, stem="network"))
    artifact.model_path.replace(path)
    graph = litert_runner_from_path(path).graph
    return Counter(node.op_type for node in graph.nodes)


def line(found: Found) -> str:
    if "ratio" not in found:
        return f"{found['name']:16} {found['precision']:4} FAILED {found['error']}"
    return (
        f"{found['name']:16} {found['precision']:4} {found['theirs_ms']:>9.2f} {found['ours_ms']:>8.2f} "
        f"{found['ratio']:>6.3f} [{found['low']:.3f}, {found['high']:.3f}] {found['bytes_ratio']:>7.4f} "
        f"{found['theirs_db']:>9.1f} {found['ours_db']:>8.1f}  {found['transposes']}"
    )


if __name__ == "__main__":
    main()
