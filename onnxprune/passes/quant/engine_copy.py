"""What a foreign quantization engine is given: a copy of the float model that it can read, and the samples, in files.

Names are replaced by plain ones (nodes n0, n1 ... in the order of the graph, values v0, v1 ...): engines build names by
appending to old ones ("x_scale", "conv_quant") and look things up by pattern, so a model that has such names already
would come out wrong. Opset and IR version are lowered where the engine's ONNX Runtime reads no newer ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from onnxprune.contracts import Batch, CalibrationSource, Progress
from onnxprune.errors import BadDataError, ModelError, PassError, PreconditionError, disk_errors
from onnxprune.evaluate.fidelity import compare_outputs
from onnxprune.graph.io import save_model
from onnxprune.passes.calibration import batch_size, first_batches, num_batches
from onnxprune.runtime.feeds import random_feeds
from onnxprune.runtime.sessions import ort_runner_from_model, ort_runner_from_path

__all__ = ["EngineCopy", "WrittenSamples", "node_alias", "write_copy", "write_samples"]

MIN_LOWERED_SNR_DB = 80.0
"""A copy in a lower opset may differ by the rounding of other kernels, and by no more."""

GROUP_NORMALIZATION_CHANGED_AT = 21
"""Its scale has one number for each group before this opset, and one for each channel since."""

NEWER_VERSIONS_HINT = "Install newer versions of onnx and onnxruntime beside the engine."


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCopy:
    """A written copy. `inputs` are plain names by the model's own, `originals` the reverse for everything."""

    path: Path
    inputs: Mapping[str, str]
    originals: Mapping[str, str]

    def translated(self, text: str) -> str:
        """`text` of the engine with the names that the user knows."""
        return re.sub(r"\b[nv]\d+(?=\b|_)", lambda found: self.originals.get(found[0], found[0]), text)


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenSamples:
    """How much was written: files are 0.npz, 1.npz ... with one batch each."""

    num_batches: int
    num_samples: int


def node_alias(position: int) -> str:
    """The plain name of the main graph's node at `position`."""
    return f"n{position}"


def write_copy(model: ir.Model, path: Path, *, max_opset: int, max_ir_version: int) -> EngineCopy:
    """Write `model` under plain names to `path`, in an opset and IR version that an engine reads.

    Raises:
        PreconditionError: A node is not what it was in the lower opset.
        OutputError: The file can't be written.
    """
    save_model(model, path)
    # External data, where there are any, stay beside it as they are.
    proto = onnx.load(path, load_external_data=False)
    originals = _rename(proto)
    aliases = {original: alias for alias, original in originals.items()}
    opset = model.opset_imports[""]
    is_lowered = opset > max_opset
    if is_lowered:
        _lower(proto, max_opset, originals)
    proto.ir_version = min(proto.ir_version, max_ir_version)
    with disk_errors(f"Writing '{path}'"):
        path.write_bytes(proto.SerializeToString())
    inputs = {value.name or "": aliases[value.name or ""] for value in model.graph.inputs}
    copy = EngineCopy(path=path, inputs=inputs, originals=originals)
    if is_lowered:
        _require_same_outputs(model, copy, max_opset)
    return copy


def write_samples(
    source: CalibrationSource,
    folder: Path,
    *,
    model: ir.Model,
    inputs: Mapping[str, str],
    max_samples: int | None,
    progress: Progress,
) -> WrittenSamples:
    """Write each batch of `source` to a file of `folder`, one in memory at a time.

    Raises:
        BadDataError: There is no sample, or one holds a number that is not finite (engines skip or spread those).
        PassError: An input has a type that .npz files don't know.
        OutputError: The disk is full.
    """
    folder.mkdir()
    seen = number = 0
    total = num_batches(model, source, max_samples)
    for batch in progress.track(first_batches(source, max_samples), "Writing samples", total):
        arrays = {inputs[name]: np.ascontiguousarray(batch[name]) for name in inputs if name in batch}
        _require_plain_and_finite(batch, seen)
        with disk_errors("Writing calibration samples for the engine"):
            np.savez(folder / f"{number}.npz", **arrays)  # type: ignore[arg-type] # keywords are names of arrays
        seen += batch_size(batch)
        number += 1
    if number == 0:
        raise BadDataError("The calibration data hold no sample.", "Give at least one; 32 to 512 are usual.")
    return WrittenSamples(num_batches=number, num_samples=min(seen, source.num_samples))


def _require_plain_and_finite(batch: Batch, first_sample: int) -> None:
    for name, array in batch.items():
        if array.dtype.kind not in "biuf":
            raise PassError(
                f"Input '{name}' has the type {array.dtype}, which can't be handed to a foreign engine.",
                "Use `quant.engine = 'onnxprune'`.",
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = ~np.isfinite(array)
            inside = np.flatnonzero(bad.reshape(len(array), -1).any(axis=1))[0] if array.ndim > 0 else 0
            sample = first_sample + int(inside)
            raise BadDataError(
                f"Calibration sample {sample} holds {int(bad.sum())} numbers in input '{name}' that are not finite.",
                "Remove the sample, or repair the preprocessing.",
            )


# --- names ----------------------------------------------------------------------------------------------------


def _rename(proto: onnx.ModelProto) -> dict[str, str]:
    """Give everything a plain name; the old names by the new ones. Names are unique in the whole model."""
    values: dict[str, str] = {"": ""}
    originals: dict[str, str] = {}

    def renamed(name: str) -> str:
        if name not in values:
            values[name] = f"v{len(values) - 1}"
            originals[values[name]] = name
        return values[name]

    nodes = 0
    for graph in _graphs(proto.graph):
        for named in (*graph.input, *graph.initializer, *graph.output, *graph.value_info):
            named.name = renamed(named.name)
        for sparse in graph.sparse_initializer:
            sparse.values.name = renamed(sparse.values.name)
        for node in graph.node:
            originals[node_alias(nodes)] = node.name
            node.name = node_alias(nodes)
            nodes += 1
            for names in (node.input, node.output):
                names[:] = [renamed(name) for name in names]
            del node.metadata_props[:]
            node.doc_string = ""
        del graph.quantization_annotation[:]
    return originals


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The main graph first, so that its nodes are numbered as they stand."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node or inner.output:
                    yield from _graphs(inner)


# --- opsets ---------------------------------------------------------------------------------------------------


def _lower(proto: onnx.ModelProto, opset: int, originals: Mapping[str, str]) -> None:
    """Stamp a lower opset on a model whose nodes are all the same in it."""
    (own,) = [entry for entry in proto.opset_import if entry.domain == ""]
    for graph in _graphs(proto.graph):
        for node in graph.node:
            reason = _changed_since(node, opset, own.version)
            if reason:
                raise PreconditionError(
                    f"'{originals[node.name]}' ({node.op_type}) {reason}, and the engine's onnxruntime reads no opset "
                    f"above {opset}.",
                    NEWER_VERSIONS_HINT,
                )
    own.version = opset


def _changed_since(node: onnx.NodeProto, lower: int, upper: int) -> str:
    """Why `node` of opset `upper` can't stand in a model of opset `lower`; "" if it can."""
    if node.domain not in ("", "ai.onnx") or not onnx.defs.has(node.op_type):
        return ""
    if node.op_type == "GroupNormalization" and lower < GROUP_NORMALIZATION_CHANGED_AT <= upper:
        return f"is one of opset {GROUP_NORMALIZATION_CHANGED_AT}"
    try:
        schema = onnx.defs.get_schema(node.op_type, max_inclusive_version=lower)
    except onnx.defs.SchemaError:
        return f"is newer than opset {lower}"
    unknown = [attribute.name for attribute in node.attribute if attribute.name not in schema.attributes]
    if unknown or not schema.min_input <= len(node.input) <= schema.max_input:
        return f"has what opset {lower} does not know" + (f" ('{unknown[0]}')" if unknown else "")
    return ""


def _require_same_outputs(model: ir.Model, copy: EngineCopy, opset: int) -> None:
    problem = _difference(model, copy)
    if problem:
        raise PreconditionError(
            f"The engine's onnxruntime reads no opset above {opset}, and in that opset the model {problem}.",
            NEWER_VERSIONS_HINT,
        )


def _difference(model: ir.Model, copy: EngineCopy) -> str:
    runner = ort_runner_from_model(model)
    feeds = random_feeds(runner.inputs, seed=0)
    reference = runner.run(feeds)
    try:
        lowered = ort_runner_from_path(copy.path).run({copy.inputs[name]: array for name, array in feeds.items()})
    except ModelError as error:
        return f"can't be run: {error.message.rstrip('.')}"
    snr_db = compare_outputs(reference, {copy.originals[name]: array for name, array in lowered.items()}).snr_db
    return "" if snr_db >= MIN_LOWERED_SNR_DB else f"gives other outputs ({snr_db:.0f} dB)"
