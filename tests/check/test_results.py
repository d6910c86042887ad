"""The envelope of results: round trips, numbers that JSON cannot hold, files that are not results."""

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest

from vivace.check import results
from vivace.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    value: float
    items: tuple[int, ...]


def test_round_trip_through_a_file(tmp_path):
    body = {
        "inner": Inner(math.inf, (1, 2)),
        "array": np.array([1.5, math.nan]),
        "scalar": np.float32(0.5),
        "path": tmp_path,
    }
    document = results.result("bench", body, environment={"cpu": "x"})
    path = tmp_path / "deep" / "r.json"
    results.write_result(path, document)
    back = results.read_result(path)
    assert back == document
    assert back["schema"] == results.SCHEMA
    assert back["kind"] == "bench"
    assert back["environment"] == {"cpu": "x"}
    assert back["inner"] == {"value": "inf", "items": [1, 2]}
    assert back["array"] == [1.5, "nan"]
    assert results.number(back["inner"]["value"]) == math.inf
    assert math.isnan(results.number(back["array"][1]))
    json.dumps(back, allow_nan=False)  # strict JSON
    assert not list(path.parent.glob("*.partial"))


@pytest.mark.parametrize("value", [None, True, [], {}, "fast"])
def test_what_is_no_number_reads_as_nan(value):
    assert math.isnan(results.number(value))


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "as JSON"), ("[1]", "not a result"), ('{"schema": 99}', "newer schema"), ("\xff", "not a result|as JSON")],
)
def test_files_that_are_not_results(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=message):
        results.read_result(path)


def test_a_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match="vivace bench"):
        results.read_result(tmp_path / "none.json")
