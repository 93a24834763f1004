"""Latency: quantiles of one runner, and the ratio of two that were timed in turn.

Two runners timed one after the other differ by whatever the machine did meanwhile (clock, neighbours, temperature).
So they take turns, AB BA AB BA ..., and the ratio is that of the medians. Its interval comes from a moving-block
bootstrap of the pairs (Künsch 1989): noise comes in bursts, so neighbouring runs are not independent, and drawing
single runs would make the interval too narrow.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from onnxprune.contracts import Batch, LatencyRatio, LatencySummary, Runner
from onnxprune.errors import UsageError
from onnxprune.runtime.round_statistics import MIN_ROUNDS, is_settled, mean_and_error

__all__ = [
    "PairTiming",
    "block_bootstrap_ratio",
    "interleaved_ratio",
    "measure_latency",
    "timed_pair",
    "undisturbed_ms",
    "undisturbed_ratio",
]

CONFIDENCE = 0.95
BOOTSTRAP_DRAWS = 1000
# Enough for a stable p99; keeps a model of microseconds from filling memory with timings.
MAX_RUNS = 20_000
MAX_PAIRS = 4_000
_UNDISTURBED_QUANTILE = 0.2

_Call = Callable[[], object]
_Clock = Callable[[], int]


@runtime_checkable
class _PreparesFeeds(Protocol):
    """A runner that can check feeds once and then run them bare, so that checking is not timed."""

    def prepare(self, feeds: Batch) -> _Call: ...


@runtime_checkable
class _KnowsThreads(Protocol):
    @property
    def threads(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTiming:
    """Milliseconds of two calls that were timed in turn, as if nothing else ran (see `undisturbed_ratio`).

    `ratio` is before over after, above 1 where the second is faster. The true one is further than two `error`s below or
    above it with a chance of 1.4 % each, however few the rounds were (`round_statistics.mean_and_error`).
    """

    before_ms: float
    after_ms: float
    ratio: float
    error: float


def measure_latency(
    runner: Runner,
    feeds: Batch,
    *,
    min_runs: int = 50,
    min_seconds: float = 1.0,
    warmup: int = 10,
    threads: int | None = None,
) -> LatencySummary:
    """Time `runner` on `feeds` until both `min_runs` and `min_seconds` are reached, after `warmup` untimed runs.

    Args:
        runner: Checking of feeds is not timed where the runner has a `prepare` method.
        feeds: One batch; the latency is that of the whole batch.
        min_runs: At least 1.
        min_seconds: Time spent in timed runs.
        warmup: Untimed runs before.
        threads: What the summary says; None: what the runner says, and 1 where it does not say.

    Raises:
        UsageError: `min_runs` is below 1 or `warmup` below 0.
    """
    _check_counts(min_runs, warmup)
    call = _prepared(runner, feeds)
    for _ in range(warmup):
        call()
    durations_ns: list[int] = []
    with _no_garbage_collection():
        end = time.perf_counter() + min_seconds
        while len(durations_ns) < min_runs or (time.perf_counter() < end and len(durations_ns) < MAX_RUNS):
            durations_ns.append(_time_ns(call))
    return _summary(durations_ns, warmup=warmup, threads=_threads(runner, threads))


def interleaved_ratio(
    before: Runner,
    after: Runner,
    feeds: Batch,
    *,
    after_feeds: Batch | None = None,
    min_runs: int = 50,
    min_seconds: float = 2.0,
    warmup: int = 10,
    seed: int = 0,
    threads: int | None = None,
) -> LatencyRatio:
    """How many times faster `after` is than `before`, timed in turn in one run.

    Args:
        before: The reference.
        after: What is compared with it.
        feeds: One batch for both.
        after_feeds: The batch for `after` where its interface differs.
        min_runs: Pairs of runs, at least 1.
        min_seconds: Time spent in timed runs of both together.
        warmup: Untimed runs of each before.
        seed: For the bootstrap.
        threads: As in `measure_latency`.

    Raises:
        UsageError: `min_runs` is below 1 or `warmup` below 0.
    """
    _check_counts(min_runs, warmup)
    call_before = _prepared(before, feeds)
    call_after = _prepared(after, feeds if after_feeds is None else after_feeds)
    for _ in range(warmup):
        call_before()
        call_after()
    before_ns, after_ns = _time_in_turn(call_before, call_after, min_runs=min_runs, min_seconds=min_seconds)
    low, high = block_bootstrap_ratio(before_ns, after_ns, rng=np.random.default_rng(seed))
    return LatencyRatio(
        ratio=float(np.median(before_ns) / np.median(after_ns)),
        low=low,
        high=high,
        before=_summary(before_ns, warmup=warmup, threads=_threads(before, threads)),
        after=_summary(after_ns, warmup=warmup, threads=_threads(after, threads)),
    )


def undisturbed_ms(runner: Runner, feeds: Batch, *, min_runs: int = 10, min_seconds: float = 0.5) -> float:
    """Milliseconds of `runner` as if nothing else ran: the lower quintile (see `undisturbed_ratio`)."""
    call = _prepared(runner, feeds)
    call()
    durations_ns: list[int] = []
    with _no_garbage_collection():
        end = time.perf_counter() + min_seconds
        while len(durations_ns) < min_runs or (time.perf_counter() < end and len(durations_ns) < MAX_RUNS):
            durations_ns.append(_time_ns(call, _undisturbed_clock(runner)))
    return float(np.quantile(durations_ns, _UNDISTURBED_QUANTILE)) / 1e6


def undisturbed_ratio(
    before: Runner,
    after: Runner,
    feeds: Batch,
    *,
    tolerance: float,
    round_seconds: float = 0.5,
    max_rounds: int = 10,
    warmup: int = 3,
) -> float:
    """The time of `after` over that of `before` as if nothing else ran, timed in turn; below 1 is faster.

    Other programs only ever add time, and more of it to the longer call, which the scheduler interrupts more often: on
    a busy machine medians tell little. So the lower quintiles count, of processor time where the runners say that they
    use one thread: that is this one. Rounds are timed until the median of their ratios
    is known to `tolerance`: its standard error is 1.25 s / sqrt(n), with s from the rounds' median absolute deviation.

    Args:
        before: The reference.
        after: What is compared with it.
        feeds: One batch for both.
        tolerance: As a part of the ratio.
        round_seconds: Time spent in one round; each times at least 5 pairs.
        max_rounds: At least 3 are timed in any case.
        warmup: Untimed runs of each before.
    """
    call_before, call_after = _prepared(before, feeds), _prepared(after, feeds)
    for _ in range(warmup):
        call_before()
        call_after()
    ratios: list[float] = []
    while len(ratios) < max(3, max_rounds):
        before_ns, after_ns = _time_in_turn(
            call_before,
            call_after,
            min_runs=5,
            min_seconds=round_seconds,
            clock=_undisturbed_clock(before, after),
        )
        ratios.append(
            float(np.quantile(after_ns, _UNDISTURBED_QUANTILE) / np.quantile(before_ns, _UNDISTURBED_QUANTILE))
        )
        middle, error = _middle_and_error(ratios)
        if len(ratios) >= 3 and error <= tolerance * middle:
            break
    return middle


def timed_pair(
    before: Runner,
    after: Runner,
    feeds: Batch,
    *,
    round_seconds: float = 0.25,
    max_rounds: int = 8,
    tolerance: float = 0.005,
    warmup: int = 3,
) -> PairTiming:
    """How long both take, timed in turn until it is clear which is faster.

    Times as `undisturbed_ratio` does. Ends when it is clear (`round_statistics.is_settled`) or after `max_rounds`.

    Args:
        before: The reference.
        after: What is compared with it.
        feeds: One batch for both.
        round_seconds: Time spent in one round; each times at least 3 pairs.
        max_rounds: At least `MIN_ROUNDS` are timed in any case.
        tolerance: As a part of the ratio.
        warmup: Untimed runs of each before.
    """
    call_before, call_after = _prepared(before, feeds), _prepared(after, feeds)
    for _ in range(warmup):
        call_before()
        call_after()
    rounds: list[tuple[float, float]] = []
    while True:
        timed = _time_in_turn(
            call_before,
            call_after,
            min_runs=3,
            min_seconds=round_seconds,
            clock=_undisturbed_clock(before, after),
        )
        first_ns, second_ns = (float(np.quantile(durations, _UNDISTURBED_QUANTILE)) for durations in timed)
        rounds.append((first_ns, second_ns))
        if len(rounds) < MIN_ROUNDS:
            continue
        ratio, error = mean_and_error([first / second for first, second in rounds])
        if len(rounds) >= max_rounds or is_settled(ratio, error, tolerance=tolerance):
            break
    before_ms, after_ms = (float(np.median(column)) / 1e6 for column in zip(*rounds, strict=True))
    return PairTiming(before_ms=before_ms, after_ms=after_ms, ratio=ratio, error=error)


def _middle_and_error(ratios: Sequence[float]) -> tuple[float, float]:
    """The median, and its standard error from the median absolute deviation."""
    middle = float(np.median(ratios))
    deviation = 1.4826 * float(np.median(np.abs(np.array(ratios) - middle)))
    return middle, 1.25 * deviation / len(ratios) ** 0.5


def _time_in_turn(
    call_before: _Call, call_after: _Call, *, min_runs: int, min_seconds: float, clock: _Clock | None = None
) -> tuple[list[int], list[int]]:
    """Nanoseconds of both calls, AB BA AB BA ..."""
    before_ns: list[int] = []
    after_ns: list[int] = []
    with _no_garbage_collection():
        end = time.perf_counter() + min_seconds
        while len(before_ns) < min_runs or (time.perf_counter() < end and len(before_ns) < MAX_PAIRS):
            if len(before_ns) % 2 == 0:
                before_ns.append(_time_ns(call_before, clock))
                after_ns.append(_time_ns(call_after, clock))
            else:
                after_ns.append(_time_ns(call_after, clock))
                before_ns.append(_time_ns(call_before, clock))
    return before_ns, after_ns


def block_bootstrap_ratio(
    before: Sequence[int], after: Sequence[int], *, rng: np.random.Generator
) -> tuple[float, float]:
    """The 95 % interval of median(before) / median(after) for paired timings in the order they were taken."""
    first: npt.NDArray[np.float64] = np.asarray(before, dtype=np.float64)
    second: npt.NDArray[np.float64] = np.asarray(after, dtype=np.float64)
    count = len(first)
    # n^(1/3): the rate that balances bias and variance of the block bootstrap (Hall, Horowitz, Jing 1995).
    block = max(1, round(count ** (1 / 3)))
    blocks = -(-count // block)
    ratios = np.empty(BOOTSTRAP_DRAWS)
    for draw in range(BOOTSTRAP_DRAWS):
        starts = rng.integers(0, count - block + 1, size=blocks)
        chosen = (starts[:, None] + np.arange(block)).reshape(-1)[:count]
        ratios[draw] = np.median(first[chosen]) / np.median(second[chosen])
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return float(low), float(high)


def _prepared(runner: Runner, feeds: Batch) -> _Call:
    if isinstance(runner, _PreparesFeeds):
        runner.run(feeds)  # the checked way once: what is wrong with model or feeds is said in words
        return runner.prepare(feeds)
    return lambda: runner.run(feeds)


def _threads(runner: Runner, given: int | None) -> int:
    if given is not None:
        return given
    return runner.threads if isinstance(runner, _KnowsThreads) else 1


def _check_counts(min_runs: int, warmup: int) -> None:
    if min_runs < 1 or warmup < 0:
        raise UsageError(f"Timing needs at least 1 run and no negative warm-up, not {min_runs} and {warmup}.")


def _time_ns(call: _Call, clock: _Clock | None = None) -> int:
    read_ns = clock or time.perf_counter_ns
    start = read_ns()
    call()
    # A clock tick is the least that can be told apart; 0 would make a ratio infinite.
    return max(1, read_ns() - start)


def _undisturbed_clock(*runners: Runner) -> _Clock:
    """The processor time of this thread, where everything runs in it; else the time that passes."""
    runs_here = all(isinstance(runner, _KnowsThreads) and runner.threads == 1 for runner in runners)
    return time.thread_time_ns if runs_here else time.perf_counter_ns


def _summary(durations_ns: Sequence[int], *, warmup: int, threads: int) -> LatencySummary:
    p50, p90, p99 = (float(value) / 1e6 for value in np.quantile(np.asarray(durations_ns), [0.5, 0.9, 0.99]))
    return LatencySummary(
        p50_ms=p50, p90_ms=p90, p99_ms=p99, num_runs=len(durations_ns), num_warmup=warmup, threads=threads
    )


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
