"""What graphs are made of is written down while they are captured, and a rehearsal captures them before anybody asks."""

import pytest
import torch

from vivace.check import bench, hopper, hopper_engines, hopper_rows, hopper_run
from vivace.errors import ConfigError
from vivace.precision.coverage import Coverage

ARGUMENTS = ("--network", "tiny", "--device", "cpu", "--observations", "1", "--draws", "1", "--calibration", "1",
             "--calls", "2", "--host-calls", "2", "--few-calls", "2", "--reuse-calls", "2", "--plans", "bf16,fp8-all",
             "--settings", "1,48,50;2,48,10;1,0,6", "--phases", "rows")  # fmt: skip


class CapturesOnce(hopper_engines.Plain):
    """As graphs are: operations are seen when a bucket is run for the first time, and never again."""

    def __init__(self, backend, model):
        super().__init__(backend, torch.device("cpu"))
        self._model, self._plain, self._captured = model, model.ops, set()
        self._watched = model.ops = Coverage(kernel="captured").wrap(model.ops)

    def infer(self, inputs, noise, **named):
        bucket = inputs.images.shape[1], -(-inputs.tokens.shape[1] // 16), noise.shape[1]
        self._watched.coverage.kernel = f"{bucket[0]} views, bucket {bucket[1]}"
        self._model.ops = self._plain if bucket in self._captured else self._watched
        self._captured.add(bucket)
        try:
            return super().infer(inputs, noise, **named)
        finally:
            self._model.ops = self._watched


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    real = hopper_run.make

    def made(name, network, **named):
        engine = real(name, network, **named)
        plain = engine.backend
        engine = hopper_engines.Engine(
            engine.name, engine.plan, engine.model, CapturesOnce(plain._backend, engine.model), engine.weights_bytes
        )
        return engine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hopper_rows, "WARM_UP", bench.WarmUp(max_calls=2))
        patch.setattr(hopper_run, "make", made)
        patch.setattr(hopper_engines.Engine, "graphed", property(lambda self: True))
        given = hopper.parser().parse_args(["--out", str(tmp_path_factory.mktemp("c") / "h.json"), *ARGUMENTS])
        return hopper.run(
            hopper.options_of(given), phases=given.phases.split(","), size="tiny", device="cpu", tell=lambda text: None
        )


def test_coverage_is_that_of_the_rehearsed_graphs(document):
    assert len(document["coverage"]) == 6, "two engines in three settings, the last of which nobody rehearses"
    assert document["finished"]
    for row in document["coverage"]:
        assert row["summary"]["operations"] > 30
        assert not row["summary"]["fallbacks"]
        assert all(mark["must_met"] for mark in row["targets"])
        assert ("e4m3" in row["summary"]["flops_by_precision"]) == (row["precision"] == "fp8-all")


def test_each_settings_coverage_is_its_own(document):
    kernels = {row["setting"]: {part["kernel"] for part in row["parts"]} for row in document["coverage"]}
    assert kernels == {
        "1,48,50": {"1 views, bucket 3"}, "2,48,10": {"2 views, bucket 3"}, "1,0,6": {"1 views, bucket 0"},
    }  # fmt: skip


def test_settings_that_share_graphs_are_refused(tmp_path):
    """The second one's would not be captured again, so nothing would be seen of it."""
    given = hopper.parser().parse_args(["--out", str(tmp_path / "h.json"), "--settings", "1,48,50;2,40,10;1,33,50"])
    with pytest.raises(ConfigError, match="1,48,50 and 1,33,50"):
        hopper.run(hopper.options_of(given), device="cpu")
