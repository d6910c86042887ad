"""The timer under a fake clock: every number is known in advance."""

import gc
import math
import random

import pytest

from vivace.check import bench
from vivace.errors import ConfigError, NumericsError

NO_WARMUP = bench.WarmUp(max_calls=0)


class FakeClock:
    """Seconds that pass only when an engine says so."""

    def __init__(self):
        self.now = 100.0
        self.log = []

    def __call__(self):
        return self.now

    def engine(self, name, milliseconds):
        """A call that takes the next of `milliseconds`, then the last one for ever."""
        times = list(milliseconds)

        def call():
            self.log.append(name)
            ms = times.pop(0) if len(times) > 1 else times[0]
            self.now += ms * 1e-3
            return {"name": name, "ms": ms}

        return call


def test_times_percentiles_and_first_call():
    clock = FakeClock()
    fns = {"a": clock.engine("a", [500.0, *range(1, 101)])}
    times = bench.measure(fns, samples=100, warmup=NO_WARMUP, clock=clock)["a"]
    assert times.cold_ms == pytest.approx(500)
    assert times.total_ms == pytest.approx(list(range(1, 101)))
    found = bench.summary(times.total_ms)
    assert (found.p50_ms, found.max_ms, found.min_ms, found.samples) == pytest.approx((50.5, 100, 1, 100))
    assert (found.p95_ms, found.p99_ms, found.mean_ms) == pytest.approx((95.05, 99.01, 50.5))


def test_engines_are_interleaved_in_seeded_random_order():
    def order(seed):
        clock = FakeClock()
        fns = {name: clock.engine(name, [1.0]) for name in "abc"}
        bench.measure(fns, samples=20, seed=seed, warmup=NO_WARMUP, clock=clock)
        return clock.log[3:]  # after the first call of each

    calls = order(0)
    rounds = [calls[i : i + 3] for i in range(0, 60, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 3, "the order within a round must change"
    assert order(0) == calls
    assert order(1) != calls


def test_drift_costs_all_engines_the_same():
    """A machine that gets slower and slower: block-wise timing would report a difference between equal engines."""
    clock = FakeClock()

    def drifting():
        clock.now += 1e-3 * (1 + 0.01 * (clock.now - 100))

    times = bench.measure({"a": drifting, "b": drifting}, samples=400, warmup=NO_WARMUP, clock=clock)
    ratio = bench.speedup(times["b"], times["a"]).ratio
    assert ratio == pytest.approx(1, abs=1e-3)


def test_warm_up_ends_when_the_times_stop_changing():
    clock = FakeClock()
    fns = {"a": clock.engine("a", [900, 100, 90, 80, 70, 60, 50, 40, 30, 20, 10, *[10] * 50])}
    times = bench.measure(fns, samples=5, warmup=bench.WarmUp(window=3, max_calls=40), clock=clock)["a"]
    assert times.stable
    assert times.total_ms == pytest.approx([10] * 5), "no sample may come from the falling part"
    assert 12 <= times.warmup_calls <= 20


@pytest.mark.parametrize("limit", [{"max_calls": 17}, {"max_seconds": 1.0}])
def test_warm_up_is_bounded_and_says_so(limit):
    clock = FakeClock()
    ever_slower = [100 * 1.2**i for i in range(60)]
    rule = bench.WarmUp(window=3, **limit)
    times = bench.measure({"a": clock.engine("a", ever_slower)}, samples=1, warmup=rule, clock=clock)["a"]
    assert not times.stable
    assert times.warmup_calls <= 17


def test_a_wrong_engine_is_refused_before_anything_is_timed():
    clock = FakeClock()
    fns = {"good": clock.engine("good", [1.0]), "fast but wrong": clock.engine("wrong", [0.1])}

    def refcheck(name, output):
        return "cosine 0.3" if "wrong" in name else None

    with pytest.raises(NumericsError, match=r"fast but wrong.*cosine 0.3"):
        bench.measure(fns, samples=5, warmup=NO_WARMUP, refcheck=refcheck, clock=clock)
    assert clock.log == ["good", "wrong"], "one call each, no samples"


class FakeDevice:
    """Counts calls and reports a device time."""

    def __init__(self, clock):
        self.clock, self.began = clock, []

    def start(self):
        self.began.append(self.clock.now)

    def stop(self):
        self.clock.now += 2e-3  # waiting for the device is part of the host's time
        return 7.0


def test_device_time_stands_beside_host_time():
    clock = FakeClock()
    device = FakeDevice(clock)
    times = bench.measure({"a": clock.engine("a", [5.0])}, samples=3, warmup=NO_WARMUP, device=device, clock=clock)["a"]
    assert times.total_ms == pytest.approx([7.0] * 3)
    assert times.device_ms == [7.0] * 3
    assert len(device.began) == 4


def split_of(spans, total_ms=10.0):
    times = bench.EngineTimes(
        "a", 0.0, 0, True, total_ms=[total_ms] * 4, stages_ms={k: [v] * 4 for k, v in spans.items()}
    )
    return bench.split(times)


def test_stages_add_up_to_the_total():
    found = split_of({"preprocess": 1.0, "vision": 2.0, "prefix": 3.0, "denoise": 3.4, "postprocess": 0.5})
    assert found["mean_ms"] == pytest.approx({"vision": 2.0, "prefix": 3.0, "denoise": 3.4, "other": 1.6})
    assert sum(found["mean_ms"].values()) == pytest.approx(found["total_mean_ms"])
    assert sum(found["share"].values()) == pytest.approx(1)
    assert found["other_ms"] == pytest.approx({"preprocess": 1.0, "postprocess": 0.5, "unexplained": 0.1})
    assert sum(found["other_ms"].values()) == pytest.approx(found["mean_ms"]["other"])
    assert found["adds_up"]


def test_time_that_no_span_covers_is_named_and_still_adds_up():
    found = split_of({"vision": 2.0, "prefix": 3.0, "denoise": 3.4})
    assert found["other_ms"] == pytest.approx({"unexplained": 1.6})
    assert sum(found["mean_ms"].values()) == pytest.approx(10.0)
    assert found["adds_up"]


@pytest.mark.parametrize(("denoise", "adds_up"), [(0.1, True), (0.19, True), (0.21, False), (5.0, False)])
def test_overlapping_spans_do_not_add_up(denoise, adds_up):
    """2 % of 10 ms is 0.2 ms."""
    assert split_of({"vision": 5.0, "prefix": 5.0, "denoise": denoise})["adds_up"] is adds_up


def test_a_remainder_below_zero_is_no_stage_time():
    """Clocks of host and device differ a little; a negative stage would be refused by `vivace budget`."""
    found = split_of({"vision": 5.0, "prefix": 5.0, "denoise": 0.1})
    assert found["mean_ms"]["other"] == 0
    assert found["other_ms"]["unexplained"] == pytest.approx(-0.1)


def test_stages_are_collected_per_sample():
    clock = FakeClock()
    fns = {"a": clock.engine("a", [9, 1, 2, 3])}
    times = bench.measure(fns, samples=3, warmup=NO_WARMUP, stages=lambda out: {"vision": out["ms"] / 2}, clock=clock)[
        "a"
    ]
    assert times.stages_ms == {"vision": [0.5, 1.0, 1.5]}


def test_speedup_and_its_interval():
    draw = random.Random(0)
    slow = [10 + draw.gauss(0, 1) for _ in range(300)]
    fast = [5 + draw.gauss(0, 0.5) for _ in range(300)]
    a = bench.EngineTimes("slow", 0, 0, True, total_ms=slow)
    b = bench.EngineTimes("fast", 0, 0, True, total_ms=fast)
    found = bench.speedup(b, a)
    assert (found.engine, found.baseline) == ("fast", "slow")
    assert found.low < found.ratio < found.high
    assert found.low < 2 < found.high
    assert found.high - found.low < 0.15
    same = bench.speedup(a, a)
    assert (same.low, same.ratio, same.high) == (1, 1, 1), "rounds are paired"
    with pytest.raises(ConfigError, match="same rounds"):
        bench.speedup(bench.EngineTimes("x", 0, 0, True, total_ms=[1.0]), a)


def test_garbage_collection_is_off_during_samples_and_back_afterwards():
    seen = []
    clock = FakeClock()

    def engine():
        seen.append(gc.isenabled())
        clock.now += 1e-3

    bench.measure({"a": engine}, samples=3, warmup=NO_WARMUP, clock=clock)
    assert seen == [True, False, False, False]
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        bench.measure({"a": lambda: seen.append(0) or 1 / (len(seen) < 6)}, samples=9, warmup=NO_WARMUP, clock=clock)
    assert gc.isenabled()


def test_nothing_to_measure_is_an_error():
    with pytest.raises(ConfigError):
        bench.measure({})
    with pytest.raises(ConfigError):
        bench.measure({"a": lambda: None}, samples=0)


def test_progress_hears_every_call():
    heard = []
    clock = FakeClock()
    rule = bench.WarmUp(window=1, max_calls=5)
    bench.measure(
        {"a": clock.engine("a", [1.0])}, samples=4, warmup=rule, clock=clock,
        progress=lambda name, *, sampling: heard.append((name, sampling)),
    )  # fmt: skip
    assert heard == [("a", False)] * 2 + [("a", True)] * 4


def test_default_is_two_hundred_samples_of_the_real_clock():
    times = bench.measure({"a": lambda: sum(range(50))})["a"]
    assert len(times.total_ms) == 200
    assert all(math.isfinite(ms) and ms >= 0 for ms in times.total_ms)


def test_slow_engines_may_be_called_less_often_spread_over_the_rounds():
    calls = []
    fns = {name: (lambda name=name: calls.append(name)) for name in ("fast", "slow")}
    rule = bench.WarmUp(max_calls=0)
    times = bench.measure(fns, samples=20, warmup=rule, fewer={"slow": 4})
    assert len(times["fast"].total_ms) == 20
    assert len(times["slow"].total_ms) == 4
    order = calls[2:]
    at = [sum(one == "fast" for one in order[:i]) for i, name in enumerate(order) if name == "slow"]
    assert all(abs(got - wanted) <= 1 for got, wanted in zip(at, (5, 10, 15, 20), strict=True)), "every fifth round"
    assert len(bench.measure(fns, samples=3, warmup=rule, fewer={"slow": 9})["slow"].total_ms) == 3


class Log:
    """Stands for torch.cuda: writes down what is asked of it."""

    def __init__(self, *, late=False):
        self.seen, self.late = [], late

    def Event(self, *, enable_timing):  # noqa: N802
        log = self

        class Event:
            def record(self):
                log.seen.append("record")

            def synchronize(self):
                log.seen.append("wait")

            def query(self):
                return log.late

            def elapsed_time(self, other):
                return 3.0

        return Event()

    def synchronize(self):
        self.seen.append("drain")

    def _sleep(self, cycles):
        self.seen.append("sleep")


@pytest.mark.parametrize(("spin_ms", "before"), [(0.0, ["drain", "record"]), (0.4, ["drain", "sleep", "record"])])
def test_the_device_spins_before_the_first_event_and_outside_the_time(monkeypatch, spin_ms, before):
    torch = pytest.importorskip("torch")
    log = Log()
    for name in ("Event", "synchronize", "_sleep"):
        monkeypatch.setattr(torch.cuda, name, getattr(log, name))
    timer = bench.CudaTimer(spin_ms=spin_ms)
    timer.start()
    log.seen.append("call")
    assert timer.stop() == 3.0
    assert log.seen == [*before, "call", "record", "wait"]
    assert (timer.exposed, timer.calls) == (0, 1)


def test_a_launch_longer_than_the_spin_is_counted(monkeypatch):
    torch = pytest.importorskip("torch")
    log = Log(late=True)
    for name in ("Event", "synchronize", "_sleep"):
        monkeypatch.setattr(torch.cuda, name, getattr(log, name))
    spinning, idle = bench.CudaTimer(spin_ms=0.4), bench.CudaTimer()
    for timer in (spinning, idle):
        timer.start()
        timer.stop()
    assert (spinning.exposed, spinning.calls) == (1, 1)
    assert idle.exposed == 0, "there is no spin to be late for"


def test_each_engine_may_have_its_own_timer():
    class Fixed:
        def __init__(self, value):
            self.value = value

        def start(self):
            pass

        def stop(self):
            return self.value

    times = bench.measure({"a": lambda: 1, "b": lambda: 2}, samples=3, device={"a": Fixed(1.0), "b": Fixed(2.0)})
    assert (times["a"].device_ms, times["b"].device_ms) == ([1.0] * 3, [2.0] * 3)
