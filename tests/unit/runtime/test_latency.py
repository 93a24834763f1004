from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest

from onnxprune.contracts import Batch
from onnxprune.errors import BadDataError, UsageError
from onnxprune.runtime import latency
from onnxprune.runtime.latency import (
    PairTiming,
    block_bootstrap_ratio,
    interleaved_ratio,
    measure_latency,
    timed_pair,
    undisturbed_ms,
    undisturbed_ratio,
)
from onnxprune.runtime.sessions import ort_runner_from_model
from tests.builders import conv_net


class FakeClock:
    """A clock that only the runners under test move on."""

    def __init__(self) -> None:
        self.now_ns = 1

    def perf_counter_ns(self) -> int:
        return self.now_ns

    def perf_counter(self) -> float:
        return self.now_ns / 1e9


class FakeRunner:
    """Takes the milliseconds that `durations` gives, and logs its name."""

    inputs = ()
    outputs = ()

    def __init__(self, clock: FakeClock, name: str, durations: Iterator[float], log: list[str]) -> None:
        self.clock, self.name, self.durations, self.log = clock, name, durations, log

    def run(self, feeds: Batch) -> dict[str, npt.NDArray[np.float32]]:
        self.log.append(self.name)
        self.clock.now_ns += round(next(self.durations) * 1e6)
        return {}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    monkeypatch.setattr(latency, "time", fake)
    return fake


def always(milliseconds: float) -> Iterator[float]:
    while True:
        yield milliseconds


def drifting(start: float, step: float) -> Iterator[float]:
    current = start
    while True:
        yield current
        current += step


def test_quantiles_are_those_of_the_timed_runs_without_warm_up(clock: FakeClock) -> None:
    durations = iter([1000.0, 1000.0, *range(1, 102)])
    summary = measure_latency(FakeRunner(clock, "a", durations, []), {}, min_runs=101, min_seconds=0, warmup=2)
    assert (summary.p50_ms, summary.p90_ms, summary.p99_ms) == (51.0, 91.0, 100.0)
    assert (summary.num_runs, summary.num_warmup, summary.threads) == (101, 2, 1)


def test_timing_goes_on_until_both_runs_and_seconds_are_reached(clock: FakeClock) -> None:
    runner = FakeRunner(clock, "a", always(10.0), [])
    assert measure_latency(runner, {}, min_runs=3, min_seconds=0.1, warmup=0).num_runs == 10
    assert measure_latency(runner, {}, min_runs=20, min_seconds=0.1, warmup=0).num_runs == 20


def test_very_fast_model_does_not_fill_memory_with_timings(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "MAX_RUNS", 50)
    summary = measure_latency(FakeRunner(clock, "a", always(0.001), []), {}, min_runs=1, min_seconds=9, warmup=0)
    assert summary.num_runs == 50


def test_runners_take_turns_and_swap_who_is_first(clock: FakeClock) -> None:
    log: list[str] = []
    before, after = (FakeRunner(clock, name, always(1.0), log) for name in "AB")
    interleaved_ratio(before, after, {}, min_runs=4, min_seconds=0, warmup=1)
    assert "".join(log) == "AB" + "AB" + "BA" + "AB" + "BA"


def test_ratio_is_that_of_the_medians_and_lies_in_its_interval(clock: FakeClock) -> None:
    log: list[str] = []
    before = FakeRunner(clock, "A", drifting(20.0, 0.1), log)
    after = FakeRunner(clock, "B", drifting(10.0, 0.05), log)
    found = interleaved_ratio(before, after, {}, min_runs=101, min_seconds=0, warmup=0)
    assert found.ratio == pytest.approx(2.0)
    assert (found.low, found.high) == (pytest.approx(2.0), pytest.approx(2.0))
    assert (found.before.p50_ms, found.after.p50_ms) == (pytest.approx(25.0), pytest.approx(12.5))


def test_noise_widens_the_interval_and_the_same_seed_repeats_it(clock: FakeClock) -> None:
    def noisy(seed: int) -> Iterator[float]:
        rng = np.random.default_rng(seed)
        while True:
            yield float(10 + rng.exponential(3))

    def measure(seed: int) -> tuple[float, float, float]:
        before, after = FakeRunner(clock, "A", noisy(1), []), FakeRunner(clock, "B", noisy(2), [])
        found = interleaved_ratio(before, after, {}, min_runs=100, min_seconds=0, warmup=0, seed=seed)
        return found.low, found.ratio, found.high

    low, ratio, high = measure(0)
    assert low < ratio < high
    assert low < 1.0 < high  # both are equally fast
    assert high - low < 0.3
    assert measure(0) == (low, ratio, high)


def test_bursts_widen_the_interval_more_than_single_outliers_do() -> None:
    rng = np.random.default_rng(0)
    base = 1000 + rng.integers(0, 10, 300)
    slow = np.zeros(300, dtype=np.int64)
    slow[:150] = 500
    bursts, scattered = base + slow, base + rng.permutation(slow)
    steady = [1000] * 300

    def width(before: npt.NDArray[np.int64]) -> float:
        low, high = block_bootstrap_ratio(before.tolist(), steady, rng=np.random.default_rng(0))
        return high - low

    narrow = block_bootstrap_ratio(base.tolist(), steady, rng=np.random.default_rng(0))
    assert width(bursts) >= width(scattered) > narrow[1] - narrow[0]


def test_single_pair_gives_an_interval_of_no_width() -> None:
    assert block_bootstrap_ratio([20], [10], rng=np.random.default_rng(0)) == (2.0, 2.0)


@pytest.mark.parametrize(("min_runs", "warmup"), [(0, 1), (1, -1)])
def test_nonsense_counts_are_refused(min_runs: int, warmup: int, clock: FakeClock) -> None:
    runner = FakeRunner(clock, "a", always(1.0), [])
    with pytest.raises(UsageError, match="at least 1 run"):
        measure_latency(runner, {}, min_runs=min_runs, warmup=warmup)
    with pytest.raises(UsageError, match="at least 1 run"):
        interleaved_ratio(runner, runner, {}, min_runs=min_runs, warmup=warmup)


def test_checking_of_feeds_is_not_timed_but_done_once() -> None:
    class Preparing:
        inputs = ()
        outputs = ()
        threads = 3
        checked = 0
        ran = 0

        def run(self, feeds: Batch) -> dict[str, npt.NDArray[np.float32]]:
            self.checked += 1
            return {}

        def prepare(self, feeds: Batch) -> Callable[[], object]:
            def call() -> None:
                self.ran += 1

            return call

    runner = Preparing()
    summary = measure_latency(runner, {}, min_runs=5, min_seconds=0, warmup=2)
    assert (runner.checked, runner.ran, summary.threads) == (1, 7, 3)
    assert measure_latency(runner, {}, min_runs=1, min_seconds=0, warmup=0, threads=2).threads == 2


def test_bad_feeds_are_refused_before_anything_is_timed() -> None:
    with pytest.raises(BadDataError, match="The data lack 'x'"):
        measure_latency(ort_runner_from_model(conv_net()), {})


def test_garbage_collection_is_off_while_timing_and_on_again_after_an_error() -> None:
    class Failing:
        inputs = ()
        outputs = ()
        was_enabled = True

        def run(self, feeds: Batch) -> dict[str, npt.NDArray[np.float32]]:
            self.was_enabled = gc.isenabled()
            raise BadDataError("stop")

    runner = Failing()
    with pytest.raises(BadDataError):
        measure_latency(runner, {}, warmup=0)
    assert not runner.was_enabled
    assert gc.isenabled()


def test_real_runner_that_sleeps_is_timed_in_milliseconds() -> None:
    class Sleeper:
        inputs = ()
        outputs = ()

        def run(self, feeds: Batch) -> dict[str, npt.NDArray[np.float32]]:
            time.sleep(0.005)
            return {}

    summary = measure_latency(Sleeper(), {}, min_runs=5, min_seconds=0, warmup=0)
    # Sleeping never ends early; how late it ends is up to the machine.
    assert summary.p50_ms >= 5.0


class Clock:
    """A clock that runners move: `perf_counter_ns` in milliseconds of work."""

    def __init__(self) -> None:
        self.now_ns = 0

    def perf_counter_ns(self) -> int:
        return self.now_ns

    def perf_counter(self) -> float:
        return self.now_ns / 1e9


class ClockRunner:
    """Takes `work_ms`, and every other call as long again as something else runs meanwhile."""

    inputs = outputs = ()

    def __init__(self, clock: Clock, work_ms: float, *, disturbed_ms: float) -> None:
        self._clock, self._work_ms, self._disturbed_ms = clock, work_ms, disturbed_ms
        self._calls = 0

    def run(self, feeds: object) -> dict[str, object]:
        self._calls += 1
        # Three of four calls are interrupted: the median is wrong, the lower quintile is not.
        extra = self._disturbed_ms if self._calls % 4 else 0.0
        self._clock.now_ns += round((self._work_ms + extra) * 1e6)
        return {}


def test_interruptions_do_not_change_the_undisturbed_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(latency, "time", clock)
    before, after = ClockRunner(clock, 4.0, disturbed_ms=12.0), ClockRunner(clock, 2.0, disturbed_ms=1.0)
    assert undisturbed_ratio(before, after, {}, tolerance=0.01) == 0.5
    assert undisturbed_ms(before, {}) == 4.0


class ThreadClock(Clock):
    """Also counts the processor time of the thread: work alone, no interruptions."""

    work_ns = 0

    def thread_time_ns(self) -> int:
        return self.work_ns


class OneThreadRunner(ClockRunner):
    threads = 1

    def run(self, feeds: object) -> dict[str, object]:
        self._clock.work_ns += round(self._work_ms * 1e6)  # type: ignore[attr-defined]
        return super().run(feeds)


def test_of_runners_with_one_thread_the_processor_time_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ThreadClock()
    monkeypatch.setattr(latency, "time", clock)
    before, after = (OneThreadRunner(clock, work_ms, disturbed_ms=50.0) for work_ms in (4.0, 3.0))
    before._calls = after._calls = 1  # no call of the first rounds is free of interruptions alone
    assert undisturbed_ratio(before, after, {}, tolerance=0.01) == 0.75


def test_a_pair_is_timed_as_if_nothing_else_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(latency, "time", clock)
    before, after = ClockRunner(clock, 4.0, disturbed_ms=12.0), ClockRunner(clock, 2.0, disturbed_ms=1.0)
    timing = timed_pair(before, after, {}, round_seconds=0.5)
    assert (timing.before_ms, timing.after_ms, timing.ratio, timing.error) == (4.0, 2.0, 2.0, 0.004)


def time_rounds(monkeypatch: pytest.MonkeyPatch, rounds: Iterator[tuple[int, int]], *, max_rounds: int) -> PairTiming:
    monkeypatch.setattr(latency, "_time_in_turn", lambda *_args, **_options: tuple([t] for t in next(rounds)))
    runner = ClockRunner(Clock(), 1.0, disturbed_ms=0.0)
    return timed_pair(runner, runner, {}, max_rounds=max_rounds)


def test_rounds_go_on_while_they_leave_doubt_which_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = iter([(100, 90), (100, 112), (100, 95), (100, 108), (100, 99), (100, 101)])
    timing = time_rounds(monkeypatch, rounds, max_rounds=6)
    assert next(rounds, None) is None
    assert abs(timing.ratio - 1) < 2 * timing.error


def test_rounds_end_where_the_slower_one_is_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = iter([(100, 150), (100, 152), (100, 149), (100, 151), (100, 150), (100, 100)])
    timing = time_rounds(monkeypatch, rounds, max_rounds=8)
    assert next(rounds) == (100, 100)
    assert timing.ratio + 2 * timing.error < 1


def test_three_rounds_that_agree_by_chance_settle_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = iter([(100, 104), (100, 104), (100, 104), (100, 96), (100, 97), (100, 101)])
    timing = time_rounds(monkeypatch, rounds, max_rounds=6)
    assert next(rounds, None) is None
    assert timing.ratio + 2 * timing.error > 1
