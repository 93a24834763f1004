"""Pairs of `.tflite` files, each on the same input: how far their outputs are apart, and how long they take.

    python pairs.py ROUNDS BATCH DENSE SPARSE [DENSE SPARSE ...]

Prints one JSON object a pair. Runs under emulation, where starting takes longer than all else, so it takes many pairs
and imports nothing but LiteRT and NumPy. The two files take turns, and time is the processor's, so that a busy machine
does not decide.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter


def main(rounds: int, batch: int, *files: str) -> None:
    for dense, sparse in zip(files[::2], files[1::2], strict=True):
        print(json.dumps(compared([loaded(path, batch) for path in (dense, sparse)], rounds)), flush=True)


def compared(interpreters: list[Any], rounds: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    for details in interpreters[0].get_input_details():
        feed = rng.standard_normal(details["shape"]).astype(np.float32)
        for interpreter in interpreters:
            place = next(one for one in interpreter.get_input_details() if one["name"] == details["name"])
            interpreter.set_tensor(place["index"], feed)
    times: list[list[float]] = [[], []]
    # The first round translates the code.
    for _ in range(rounds + 1):
        for interpreter, taken in zip(interpreters, times, strict=True):
            start = time.process_time()
            interpreter.invoke()
            taken.append(time.process_time() - start)
    wanted, found = (
        [interpreter.get_tensor(details["index"]) for details in interpreter.get_output_details()]
        for interpreter in interpreters
    )
    error = max(difference(*outputs) for outputs in zip(wanted, found, strict=True))
    return {"error": error, "dense_s": min(times[0][1:]), "sparse_s": min(times[1][1:])}


def loaded(path: str, batch: int) -> Any:
    interpreter = Interpreter(path, num_threads=1)
    for details in interpreter.get_input_details():
        if details["shape_signature"][0] == -1:
            interpreter.resize_tensor_input(details["index"], [batch, *details["shape"][1:]])
    interpreter.allocate_tensors()
    return interpreter


def difference(wanted: Any, found: Any) -> float:
    """The largest one, relative to the largest wanted number; infinite where shapes differ."""
    if wanted.shape != found.shape:
        return float("inf")
    return float(np.abs(wanted - found).max() / np.abs(wanted).max())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
