"""`vivace budget`: table, JSON, exit codes."""

import json

import pytest

FOUNDING = {
    "kind": "stages",
    "gpu": "thor",
    "precision": "bfloat16",
    "total_ms": 83.5,
    "stages_ms": {"vision": 17.2, "prefix": 47.4, "denoise": 10.1, "other": 8.8},
    "setting": {"kind": "pi05", "views": 3, "prompt_tokens": 200, "horizon": 50, "steps": 1},
}


@pytest.fixture
def founding(tmp_path):
    path = tmp_path / "founding.json"
    path.write_text(json.dumps(FOUNDING))
    return path


def test_founding_report(vivace, founding, tmp_path):
    code, document, text = vivace("budget", founding, "--target-hz", "20", "-o", tmp_path / "out.json")
    assert code == 0
    assert document == json.loads((tmp_path / "out.json").read_text())
    assert document["kind"] == "budget"
    assert document["budget"]["must_shrink_ms"] == pytest.approx(33.5)
    assert document["budget"]["verdict"] == "reachable by roofline"
    assert "impossible" in text
    assert "below floor" in text  # the prefix alone would have to go below its roofline


def test_another_gpu_is_called_a_model(vivace, founding):
    code, document, text = vivace("budget", founding, "--control-hz", "50", "--execution-horizon", "2", "--gpu", "h100")
    assert code == 0
    assert document["budget"]["target_hz"] == 25
    assert "a model, not a measurement" in " ".join(text.split())


@pytest.mark.parametrize("bad", [(), ("--target-hz", "-3"), ("--target-hz", "20", "--gpu", "abacus")])
def test_bad_use_exits_2(vivace, founding, bad):
    assert vivace("budget", founding, *bad)[0] == 2


def test_a_missing_or_foreign_file_exits_2(vivace, tmp_path):
    assert vivace("budget", tmp_path / "none.json", "--target-hz", "20")[0] == 2
    (tmp_path / "x.json").write_text('{"kind": "check"}')
    assert vivace("budget", tmp_path / "x.json", "--target-hz", "20")[0] == 2
