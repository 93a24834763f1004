"""How far the spellings of one quantization plan are apart, end to end, over seeded random inputs.

For each pair of spellings: the share of integers that differ at all and by more than one step, over all tensors and at
the outputs. Operators that get the same integers differ by one step at most (`tests/unit/targets/qdq/
test_same_integers.py`); what is seen here is how that spreads. "x86" has wider weight scales where products would not
fit into 16 bits, and that counts as well.

    python same_integers.py [network or file.onnx ...]     light networks of the onnx wheel, or models of your own
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from networks import write_light_network

from onnxprune.contracts import Batch, CanonicalModel, ModelState, PassContext
from onnxprune.convert.onnx_file import load_onnx
from onnxprune.passes.harness import run_pass
from onnxprune.passes.quant import QuantConfig, QuantPass
from onnxprune.passes.simplify import SimplifyConfig, SimplifyPass
from onnxprune.targets import qdq
from onnxprune.targets.qdq.agreement import TensorAgreement, agreement_of

PAIRS: tuple[tuple[qdq.SpellingName, qdq.SpellingName], ...] = (
    ("x86-vnni", "arm64"),
    ("x86-vnni", "tflite"),
    ("x86-vnni", "x86"),
)
NUM_CALIBRATION = 4
NUM_COMPARED = 2


class Batches:
    """A `CalibrationSource` of seeded normal numbers."""

    content_hash = "seeded"
    num_samples = NUM_CALIBRATION

    def __init__(self, model: CanonicalModel) -> None:
        rng = np.random.default_rng(0)
        shapes = {
            value.name or "": [dim if isinstance(dim, int) else 1 for dim in value.shape or ()]
            for value in model.graph.inputs
        }
        self.batches: list[Batch] = [
            {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
            for _ in range(NUM_CALIBRATION)
        ]

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def shares(tensors: Sequence[TensorAgreement]) -> str:
    total = sum(tensor.num_elements for tensor in tensors)
    differing = sum(tensor.differing_ratio * tensor.num_elements for tensor in tensors) / total
    beyond = sum(tensor.beyond_one_step_ratio * tensor.num_elements for tensor in tensors) / total
    return f"{differing:8.3%} {beyond:8.3%} {max(tensor.largest_steps for tensor in tensors):5d}"


def compare(name: str, path: Path) -> None:
    state = run_pass(SimplifyPass(SimplifyConfig()), ModelState(model=load_onnx(path)), PassContext()).state
    batches = Batches(state.model)
    plan = QuantPass(QuantConfig()).plan(state, PassContext(calibration=batches))
    placement = qdq.place(state.model, plan, "x86-vnni")
    spelled = {
        spelling: qdq.spell(state.model, plan, placement, spelling)
        for spelling in dict.fromkeys(spelling for pair in PAIRS for spelling in pair)
    }
    for one, other in PAIRS:
        found = agreement_of(spelled[one], spelled[other], batches.batches[:NUM_COMPARED])
        last = [tensor for tensor in found if tensor.is_at_output]
        print(f"{name:24s} {one:>8s} {other:>8s} {len(found):4d}  {shares(found)}  {shares(last)}", flush=True)


def main() -> None:
    print(f"{'':47s}{'all tensors':>29s}{'at the outputs':>24s}")
    print(
        f"{'network':24s} {'one':>8s} {'other':>8s} {'num':>4s}  {'differ':>8s} {'> 1 step':>8s} {'most':>5s}", end=""
    )
    print(f"  {'differ':>8s} {'> 1 step':>8s} {'most':>5s}")
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:] or ["squeezenet", "resnet50", "shufflenet"]:
            path = Path(name)
            if path.suffix != ".onnx":
                path = Path(folder) / f"{name}.onnx"
                write_light_network(name, path)
            compare(path.stem, path)


if __name__ == "__main__":
    main()
