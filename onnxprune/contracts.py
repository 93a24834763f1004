"""What the parts of onnxprune hand to each other: protocols and frozen hand-overs, no behaviour.

Everything that is written to disk (plans, reports, artifacts' provenance) is a frozen dataclass of plain values, so
that pydantic's `TypeAdapter` turns it into JSON and back without code of its own.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeAlias, TypeVar, runtime_checkable

import ml_dtypes
import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from onnxprune.graph.canonical import CanonicalModel

__all__ = [
    "CHECK_MARK",
    "EXACT_DB",
    "PATH_MARK",
    "ActivationQuantization",
    "Artifact",
    "ArtifactFile",
    "Batch",
    "BudgetOutcome",
    "CalibrationSource",
    "CanonicalModel",
    "Change",
    "Evaluator",
    "FallbackCost",
    "FallbackRecord",
    "Fidelity",
    "Finding",
    "Iteration",
    "JsonObject",
    "JsonValue",
    "LatencyRatio",
    "LatencySummary",
    "LayerError",
    "LoadFigures",
    "Measurements",
    "ModelFigures",
    "ModelState",
    "NullProgress",
    "OutputDifference",
    "Pass",
    "PassConfig",
    "PassContext",
    "PassOutcome",
    "PassReport",
    "Placement",
    "Progress",
    "QuantizationMode",
    "QuantizationPlan",
    "RegionTiming",
    "Requirement",
    "RunReport",
    "Runner",
    "Score",
    "Skip",
    "Target",
    "TargetContext",
    "TensorSpec",
    "WeightQuantization",
    "numpy_dtype",
]

JsonValue: TypeAlias = Any
"""A string, number, boolean, None, or a list or object of them."""
JsonObject: TypeAlias = dict[str, JsonValue]

Batch: TypeAlias = Mapping[str, npt.NDArray[Any]]
"""One array for each model input; axis 0 is the batch where the input has a batch axis."""


# --- running models -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Name, element type (NumPy's name, "bfloat16" for that type) and shape of an input or output.

    A dimension is a number, the name of a symbolic dimension, or None where nothing is known.
    `shape` is None where the rank is unknown.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy type of a `TensorSpec.dtype`, those of `ml_dtypes` ("bfloat16", "float8_e4m3fn") included."""
    return np.dtype(getattr(ml_dtypes, name, name))


@runtime_checkable
class Runner(Protocol):
    """Inputs to outputs, whatever the runtime."""

    @property
    def inputs(self) -> Sequence[TensorSpec]:
        """What `run` takes."""
        ...

    @property
    def outputs(self) -> Sequence[TensorSpec]:
        """What `run` gives."""
        ...

    def run(self, feeds: Batch) -> dict[str, npt.NDArray[Any]]:
        """All outputs by name for one batch."""
        ...


class CalibrationSource(Protocol):
    """Batches that can be iterated any number of times, always the same in the same order, one in memory at a time."""

    @property
    def num_samples(self) -> int:
        """Samples in all batches together."""
        ...

    @property
    def content_hash(self) -> str:
        """sha256 (hex) over the samples as they are fed to the model."""
        ...

    def __iter__(self) -> Iterator[Batch]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One evaluation's result; `details` holds further figures (top-5, per-class values, sample counts)."""

    metric: str
    value: float
    higher_is_better: bool = True
    details: Mapping[str, float] = field(default_factory=dict)


class Evaluator(Protocol):
    """Scores a runner and never knows which runtime it scores."""

    @property
    def name(self) -> str:
        """What the score is called in reports."""
        ...

    def evaluate(self, runner: Runner) -> Score:
        """The score of `runner` on all samples."""
        ...


# --- progress -------------------------------------------------------------------------------------------------

ItemT = TypeVar("ItemT")


class Progress(Protocol):
    """Shows that long work goes on; never writes to stdout."""

    def track(self, items: Iterable[ItemT], description: str, total: int | None = None) -> Iterable[ItemT]:
        """The items, while a bar named `description` follows them."""
        ...

    def note(self, message: str) -> None:
        """Say one line to the person who waits."""
        ...


class NullProgress:
    """Shows nothing."""

    def track(self, items: Iterable[ItemT], description: str, total: int | None = None) -> Iterable[ItemT]:
        """The items, and nothing else."""
        return items

    def note(self, message: str) -> None:
        """Say nothing."""


# --- quantization ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationQuantization:
    """How one activation tensor becomes integers, whatever the runtime.

    `zero_point` is given for *signed* integers of `num_bits`; an unsigned spelling adds 2**(num_bits - 1).
    real = (integer - zero_point) * scale.  `range_min` and `range_max` are the calibrated real range.
    """

    scale: float
    zero_point: int
    num_bits: int
    range_min: float
    range_max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightQuantization:
    """Symmetric integers for one weight: one scale, or one for each index of `axis`."""

    scales: tuple[float, ...]
    axis: int | None
    num_bits: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerError:
    """What rounding one layer costs, as signal-to-noise ratios in decibels; `EXACT_DB` where nothing differs.

    `own_db` is about the layer's output when this layer alone is rounded and gets exact inputs: the error that arises
    here. `accumulated_db` is about the same tensor when every layer is rounded: what has piled up. `output_db` is what
    the layer's weight and the tensors at it do to the model's outputs, each rounded alone and added up; None: not
    measured.
    """

    node: str
    op_type: str
    own_db: float
    accumulated_db: float
    output_db: float | None = None


EXACT_DB = 300.0
"""Stands for infinitely many decibels where a figure has to survive JSON; -EXACT_DB for no signal at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FallbackRecord:
    """How a plan was made to hold a goal by taking layers out of 8 bits.

    `before` and `reached` are figures of the simulated plan: the drop of the score with "max_drop", the SNR of the
    outputs in decibels with "min_snr_db". `evaluations` counts what was scored or compared, the float model included.
    """

    goal: Literal["max_drop", "min_snr_db"]
    limit: float
    kind: Literal["float", "int16"]
    before: float
    reached: float
    met: bool
    evaluations: int
    num_layers: int
    """How many layers left 8 bits; the nodes between them, which only move numbers, do not count."""
    float_score: Score | None = None
    """With "max_drop": of the float model."""
    nodes: Mapping[str, str] = field(default_factory=dict)
    """All nodes that left 8 bits, with the figures that say why; with "float" they are `returned_nodes`, too."""
    narrow_activations: Mapping[str, ActivationQuantization] = field(default_factory=dict)
    """With "int16": the 8-bit entries that were replaced."""
    is_all_float: bool = False
    """True when no node of the plan is integer any more: what is built from it is the float model."""


QuantizationMode: TypeAlias = Literal["static", "dynamic", "weight-only"]
"""Where the ranges of activations come from: calibration data ("static"), each run ("dynamic"), or nowhere, because
only weights are stored as integers and computed with in float ("weight-only")."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationPlan:
    """Ranges and scales for every quantizable tensor of a canonical model; knows no runtime.

    Keys are value names. `skipped` says for each tensor that was considered and left why it has no entry.
    `method` is the calibration method, `calibration_hash` the content hash of the samples. In the modes "dynamic" and
    "weight-only" there are no activations, no samples, and the hash is empty.
    """

    activations: Mapping[str, ActivationQuantization]
    weights: Mapping[str, WeightQuantization]
    method: str
    calibration_hash: str
    num_samples: int
    mode: QuantizationMode = "static"
    skipped: Mapping[str, str] = field(default_factory=dict)
    excluded_nodes: Mapping[str, str] = field(default_factory=dict)
    """Nodes that the user or an analysis keeps in float, with the reason."""
    adjusted: Mapping[str, str] = field(default_factory=dict)
    """Tensors and weights whose scales a foreign engine gave and that had to be changed to fit, with the reason."""
    returned_nodes: Mapping[str, str] = field(default_factory=dict)
    """Nodes that could be integer and were returned to float because they damage the result, with the figures."""
    fallback: FallbackRecord | None = None
    """How `returned_nodes` was chosen; None: no goal was set."""
    layer_errors: tuple[LayerError, ...] = ()
    """What rounding each layer costs, in graph order, where that was measured."""

    def float_reason(self, node: str) -> str | None:
        """Why the node of that name stays float wherever the plan is placed; None: the plan does not say so."""
        return self.excluded_nodes.get(node) or self.returned_nodes.get(node)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Which nodes compute in integers on one target. `float_nodes` gives the reason for every other node."""

    target: str
    integer_nodes: tuple[str, ...]
    float_nodes: Mapping[str, str]
    decided_by: Literal["table", "measured"] = "table"


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionTiming:
    """A connected group of nodes that was timed in integers against its float twin, both on this machine.

    Milliseconds of one interleaved run as if nothing else ran (lower quintiles), with the conversions at the region's
    border. `nodes` are names in graph order; `is_integer` says what was chosen.
    """

    nodes: tuple[str, ...]
    float_ms: float
    integer_ms: float
    is_integer: bool


# --- the model on its way through the pipeline ----------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelState:
    """What travels along the pipeline: the float model and, after `quant`, the plan to spell for each target."""

    model: CanonicalModel
    quantization: QuantizationPlan | None = None


# --- passes ---------------------------------------------------------------------------------------------------


class Requirement(enum.Enum):
    """What a pass needs from the run; checked for all passes before the first one starts."""

    CALIBRATION = "calibration data"
    EVALUATOR = "an evaluator"
    TIMING = "latencies measured on the target"


PATH_MARK = "path_of"
"""Key of a field's `json_schema_extra` where the field is a path, which counts from the recipe: "file", "program" (its
links are not followed), or "function" where it may be a name and is a path only in the form 'path/file.py:function'."""


CHECK_MARK = "only_checks"
"""Key of a field's `json_schema_extra` where the setting looks at a result and decides nothing: a plan that was made
without it can be repeated with it."""


class PassConfig(BaseModel):
    """Base of all pass and target configurations: frozen, and a misspelt key is an error."""

    # A docstring under a field is its description, in `onnxprune passes NAME` too.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One thing a pass did. `where` names nodes, tensors or channel classes; `figures` are numbers about it."""

    what: str
    where: str
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip:
    """One thing a pass left alone, and why; `figures` are numbers about it, such as `parameters`."""

    where: str
    reason: str
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PassReport:
    """What a pass did and did not do.

    `summary` is one line for the terminal. `figures` are the pass's headline numbers. `notes` are things the user
    should know (a stage rolled back, an approximation).
    """

    pass_id: str
    pass_name: str
    summary: str
    changes: tuple[Change, ...] = ()
    skips: tuple[Skip, ...] = ()
    notes: tuple[str, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)
    config: Mapping[str, JsonValue] = field(default_factory=dict)
    duration_s: float = 0.0
    resumed: bool = False
    """True when the result came from the cache of an earlier run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Iteration:
    """Which time around a pass runs in a block that is repeated, and what its ratios are relative to.

    With `linear`, the part of a ratio r that is reached after k of n iterations is r * k/n, so that each takes an equal
    part of the original; with `geometric` it is 1 - (1 - r)**(k/n), so that each takes an equal part of what is left.
    """

    number: int
    """From 1 to `times`."""
    times: int
    original: ModelState
    """What the block began with: ratios count from it, and rewound weights come from it."""
    schedule: Literal["linear", "geometric"] = "linear"

    def ratio_by_now(self, ratio: float, *, part: float = 1.0) -> float:
        """The part of the original that shall be gone when `part` of this iteration is done, of `ratio` in all."""
        progress = (self.number - 1 + part) / self.times
        if progress >= 1.0:
            return ratio
        return ratio * progress if self.schedule == "linear" else float(1.0 - (1.0 - ratio) ** progress)


@dataclass(frozen=True, slots=True, kw_only=True)
class PassContext:
    """Everything a pass may use besides the model. Randomness comes from `seed` and nowhere else."""

    seed: int = 0
    calibration: CalibrationSource | None = None
    evaluator: Evaluator | None = None
    progress: Progress = field(default_factory=NullProgress)
    custom_op_libraries: tuple[Path, ...] = ()
    iteration: Iteration | None = None
    """Set inside a block that is repeated."""

    def rng(self) -> np.random.Generator:
        """A fresh generator that starts from `seed`."""
        return np.random.default_rng(self.seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class PassOutcome:
    """The state after a pass and the report about it. `plan` is filled in by `run_pass`: what was carried out."""

    state: ModelState
    report: PassReport
    plan: Any = None


ConfigT = TypeVar("ConfigT", bound=PassConfig)
PlanT = TypeVar("PlanT")


class Pass(abc.ABC, Generic[ConfigT, PlanT]):
    """One graph -> graph step: decide (`plan`), then do (`apply`).

    Call it through `onnxprune.passes.harness.run_pass`, which wraps the author's code between what it requires and
    what it ensures: the model is verified before and after, shapes are refreshed, the caller's model stays as it was.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    config_type: ClassVar[type[PassConfig]]
    plan_type: ClassVar[type[Any]]
    """A frozen dataclass of plain values: `plan.lock.json` holds it, `--plan` brings it back."""
    produces_quantization: ClassVar[bool] = False
    keeps_quantization: ClassVar[bool] = False
    """True when a quantization plan made earlier is still right after this pass."""
    needs_quantization: ClassVar[bool] = False
    """True when a pass that plans scales for activations must stand before this one."""

    def __init__(self, config: ConfigT, *, pass_id: str | None = None) -> None:
        self.config = config
        self.pass_id = pass_id or self.name

    @property
    def requirements(self) -> frozenset[Requirement]:
        """What this configuration needs from the run."""
        return frozenset()

    @property
    def without_calibration(self) -> str:
        """What to do so that the pass needs no calibration data, for the hint of an error; "" where nothing helps."""
        return ""

    @property
    def plans_activations(self) -> bool:
        """True when the quantization plan that this configuration makes has scales for activations."""
        return self.produces_quantization

    @property
    def changes_io_types(self) -> bool:
        """True when this configuration gives inputs and outputs other element types (names and shapes stay)."""
        return False

    @property
    def uses_calibration(self) -> bool:
        """True when the result depends on calibration data where the run has some."""
        return Requirement.CALIBRATION in self.requirements

    @property
    def files_read(self) -> tuple[Path, ...]:
        """Files that this configuration names and whose content the plan depends on: the cache hashes them."""
        return ()

    def check(self, state: ModelState) -> None:
        """Refuse early what can be seen from the source model (raises an `OnnxPruneError`). Reads only."""

    def check_files(self, state: ModelState) -> None:
        """Refuse early what is wrong with files that the configuration names. Not called where a plan is given."""

    @abc.abstractmethod
    def plan(self, state: ModelState, context: PassContext) -> PlanT:
        """Decide everything. Reads `state` only."""

    @abc.abstractmethod
    def apply(self, state: ModelState, plan: PlanT, context: PassContext) -> PassOutcome:
        """Do what `plan` says. May change `state.model` in place (it is a copy), or return another model."""


# --- targets --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something a target has to say about the model: `topic` ("NNAPI", "int8", "sparse storage"), and the text."""

    topic: str
    text: str
    severity: Literal["info", "warning"] = "info"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactFile:
    """One written file; `path` is relative to the output folder. `role` is "model", "weights", "config" ..."""

    path: str
    sha256: str
    size_bytes: int
    role: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """What a target wrote. The first file with role "model" is what a runtime loads."""

    target: str
    folder: Path
    files: tuple[ArtifactFile, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    findings: tuple[Finding, ...] = ()
    provenance: Mapping[str, JsonValue] = field(default_factory=dict)
    placement: Placement | None = None
    regions: tuple[RegionTiming, ...] = ()
    """What was timed to decide the placement; empty where the operator table or an earlier run decided."""

    @property
    def model_path(self) -> Path:
        """The file that a runtime loads."""
        return self.folder / next(f.path for f in self.files if f.role == "model")

    @property
    def size_bytes(self) -> int:
        """Bytes that must be shipped: the model and its weight files."""
        return sum(f.size_bytes for f in self.files if f.role in ("model", "weights"))


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetContext:
    """Everything a target may use besides the model."""

    folder: Path
    """Where to write; exists and is empty. The pipeline moves it into place when everything is done."""
    stem: str
    """File name without ending for what is written."""
    provenance: Mapping[str, JsonValue] = field(default_factory=dict)
    """Free of times, paths and host names; stored with the artifact (preprocessing, versions, hashes)."""
    progress: Progress = field(default_factory=NullProgress)
    custom_op_libraries: tuple[Path, ...] = ()
    seed: int = 0
    placement: Placement | None = None
    """Decided by an earlier run (`--plan`); None: the target decides."""
    timing_threads: int | None = None
    """Threads to time integer regions with, where this machine is the target; None: nothing may be timed."""


class Target(abc.ABC, Generic[ConfigT]):
    """Graph -> artifact."""

    name: ClassVar[str]
    summary: ClassVar[str]
    config_type: ClassVar[type[PassConfig]]

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    @property
    @abc.abstractmethod
    def is_host(self) -> bool:
        """True when this machine's instruction set and runtime are the target's, so that timings here count."""

    def check(self, state: ModelState, *, will_quantize: bool) -> None:
        """Refuse before the first pass what can't be built (raises an `OnnxPruneError` that names everything)."""

    @abc.abstractmethod
    def build(self, state: ModelState, context: TargetContext) -> Artifact:
        """Write the artifact into `context.folder`, load it and run it once."""

    @abc.abstractmethod
    def runner(self, artifact: Artifact, *, threads: int = 1, custom_op_libraries: tuple[Path, ...] = ()) -> Runner:
        """A runner for an artifact of this target on this machine."""


# --- measurements and the report ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencySummary:
    """Milliseconds over `num_runs` timed runs after `num_warmup` warm-up runs with `threads` threads."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    num_runs: int
    num_warmup: int
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyRatio:
    """Median latency before over median latency after, timed interleaved in one run: above 1 is faster.

    `low` and `high` bound the 95 % interval of the ratio.
    """

    ratio: float
    low: float
    high: float
    before: LatencySummary
    after: LatencySummary


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFigures:
    """Loading and running once in a fresh process; `load_time_ms` is the loading alone.

    Peak RSS counts the whole process, `baseline_rss_bytes` the process before: Python, NumPy and the runtime.
    """

    load_time_ms: float
    peak_rss_bytes: int
    baseline_rss_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputDifference:
    """How far one set of outputs is from its reference.

    `max_rel` is the largest absolute difference over the largest absolute value of the reference output.
    `cosine` and `snr_db` take each output as one vector; over several outputs the worst counts.
    `snr_db` is infinite where outputs are equal. `is_compared` is False where an output of both has NaN or infinity
    throughout, on some sample: equal figures say nothing then.
    """

    max_abs: float
    max_rel: float
    cosine: float
    snr_db: float
    is_compared: bool = True
    per_output: Mapping[str, OutputDifference] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """The worst output difference over `num_samples` samples of `data` ("calibration", "eval", "random")."""

    difference: OutputDifference
    num_samples: int
    data: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFigures:
    """Static figures of a graph. `macs` is None where shapes are dynamic and no shape was fixed.

    `sparse_bytes` maps a storage ("coo", "csr", "bitmap") to what the weights would take in it.
    `uncounted_ops` are operators without a row in the MACs table.
    """

    parameters: int
    nonzero_parameters: int
    macs: int | None
    weight_bytes: int
    num_nodes: int
    shape_used: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    sparse_bytes: Mapping[str, int] = field(default_factory=dict)
    uncounted_ops: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetOutcome:
    """One budget of the recipe: what was asked, what came out, and whether it holds. `actual` None: not measured."""

    name: str
    target: str
    limit: float
    actual: float | None
    met: bool
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FallbackCost:
    """What it costs that `num_layers` layers left 8 bits: the artifact without the fallback against the artifact.

    `latency` is None where that was not timed; `not_measured_reason` says why.
    """

    num_layers: int
    latency: LatencyRatio | None
    not_measured_reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """What was measured of one artifact (or of the source, with target "source"). None: not measured."""

    target: str
    size_bytes: int
    zipped_bytes: int | None = None
    score: Score | None = None
    fidelity: Fidelity | None = None
    latency: LatencyRatio | None = None
    """Source against artifact, interleaved."""
    latency_on_target: bool = False
    """False: the host is not the target, so the latency says nothing about it."""
    load: LoadFigures | None = None
    fallback: FallbackCost | None = None
    """None: nothing had to leave 8 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """One run, frozen: what was asked, what was done, what came out."""

    schema: int
    source: Mapping[str, JsonValue]
    recipe: Mapping[str, JsonValue]
    before: ModelFigures
    after: ModelFigures
    source_measurements: Measurements
    passes: tuple[PassReport, ...]
    artifacts: tuple[Artifact, ...]
    measurements: tuple[Measurements, ...]
    budgets: tuple[BudgetOutcome, ...]
    warnings: tuple[str, ...]
    versions: Mapping[str, str]
    host: Mapping[str, str]
    duration_s: float

    @property
    def within_budget(self) -> bool:
        """True when no budget is missed."""
        return all(outcome.met for outcome in self.budgets)
