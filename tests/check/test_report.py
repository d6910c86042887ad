"""The page: self-contained, escaped, complete for every kind of result, and honest about what it does not know."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from vivace.check import bench, parity, report_simulation, results
from vivace.check.budget import budget, read_run
from vivace.check.metrics import errors
from vivace.check.report import TITLES, build
from vivace.check.report_html import num
from vivace.check.report_sections import render
from vivace.errors import ConfigError

ENVIRONMENT = {
    "cpu": {"model": "Some CPU", "cores_usable": 2},
    "packages": {"torch": "2.13"},
    "python": "3.11.7",
    "gpus": [],
}
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
EVIL = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"


def bench_document(name="eager"):
    times = bench.EngineTimes(
        name, 50.0, 10, False, total_ms=[10.0, 11, 12, 13],
        stages_ms={"vision": [2.0] * 4, "prefix": [4.0] * 4, "denoise": [3.0] * 4},
    )  # fmt: skip
    row = {
        "precision": "float32", "engine": {}, "output": {"cosine": 1.0}, "cold_ms": 50.0, "warmup_calls": 10,
        "stable": False, "total": bench.summary(times.total_ms), "rate_hz": 87.0, "split": bench.split(times),
        "stages": {k: bench.summary(v) for k, v in times.stages_ms.items()}, "samples": {"total_ms": times.total_ms},
    }  # fmt: skip
    setting = {"kind": "pi05", "views": 2, "prompt_tokens": 20, "horizon": 10, "steps": 10, "batch": 1, "device": "cpu"}
    body = {
        "boundary": {"name": "B2", "what": "host to host"},
        "setting": setting,
        "engines": {name: row},
        "speedups": [],
    }
    return results.result("bench", body, environment=ENVIRONMENT)


def check_document(*, bad=False):
    one = errors([1.0, -2.0 if bad else 2.0001], [1.0, 2.0])
    robot = parity.RobotErrors((0.1, 0.0), (0.05, 0.0), (2.0, 0.0), ("rad", "m"))
    row = parity.Parity(one, one, (one, one), (one, one), (one,) * 3, (one,) * 4, one, robot)
    summary = parity.summarise([row])
    marks = parity.judge(summary, parity.BFLOAT16_MARKS, vision_layers=2, layers=2)
    body = {
        "engine": {"backend": "eager", "precision": "bfloat16"},
        "observations": {"source": "synthetic", "count": 1},
        "summary": summary,
        "marks": marks,
        "passed": all(mark.passed for mark in marks),
        "coverage": [{"layer": 0, "op": "mlp", "kernel": "reference"}],
    }
    return results.result("check", body, environment=ENVIRONMENT)


def budget_document():
    stages = {"vision": 17.2, "prefix": 47.4, "denoise": 10.1, "other": 8.8}
    return results.result("budget", {"budget": budget(read_run({"stages_ms": stages}), target_hz=20)})


def golden_document():
    rows = [
        {"case": "one", "stage": "tokens", "error": 0, "tolerance": 0, "passed": True, "note": ""},
        {"case": "one", "stage": "actions", "error": 2e-5, "tolerance": 1e-5, "passed": False, "note": EVIL},
    ]
    return results.result("golden", {"rows": rows, "passed": False})


def doctor_document():
    checks = [{"name": "torch", "state": "problem", "found": EVIL, "do": "reinstall"}]
    return results.result("doctor", {"healthy": False, "checks": checks})


def hopper_document():
    latency = {key: 10.0 for key in ("p50_ms", "p95_ms", "p99_ms", "max_ms")}
    rows = [{"setting": EVIL, "engine": EVIL, "boundary": "B0", "calls": 3, "latency": latency}]
    body = {"setup": {"weights": EVIL}, "rows": rows, "accuracy": [], "missed": [EVIL], "not_run": [], "passed": False}
    return results.result("hopper", body)


def start_document():
    mark = {"what": EVIL, "got": 15.4, "rule": "at most", "must": 30.0, "must_met": True, "stretch_met": None}
    row = {"caches": EVIL, "listening_s": 15.3, "first_action_s": 15.4, "same_bits": True, "targets": [mark]}
    body = {
        "options": [EVIL],
        "weights_bytes_in_files": 8.3e9,
        "rows": [row],
        "passed": True,
        "engine": {"backend": EVIL},
    }
    return results.result("start", body)


def calibrate_document():
    plan = {"name": EVIL, "hash": "47f6", "method": "amax", "data": "recorded: x", "checkpoint_hash": "c5ae"}
    row = {"layer": EVIL, "amax": 6.0, "chosen": 6.0, "saturated": 0, "flushed": 3, "step_spread": 1.0}
    return results.result("calibrate", {"passed": True, "plan": plan, "layers": [row], "remarks": [EVIL]})


def drive_document(differing=0):
    body = {
        "frames": 50, "answers_that_differ_from_the_policy_alone": differing, "action_chunk": EVIL, "boundary": EVIL,
        "round_trip_p50_ms": 4.2, "round_trip_p95_ms": 5.3, "model_p50_ms": 3.9, "engine": {"backend": EVIL},
    }  # fmt: skip
    return results.result("serve-drive", body)


def closed_loop_document(differing=0):
    campaign = json.loads((RESULTS / "conveyor-expert-2026-11-25.json").read_text())
    aligned = [arm for arm in campaign["arms"] if arm["arm"]["belt"] == "middle" and arm["arm"]["mode"] == "aligned"]
    times = {"p50": 81.6, "p95": 135.4, "max": 152.1}
    body = {
        "passed": differing == 0, "arms": [arm for arm in aligned if not arm["arm"]["committed"]][:4],
        "answers": {"received": 95, "compared": 19, "differing": differing}, "round_trip_ms": times, "model_ms": times,
        "seeds": {"first": 0, "n": 4}, "simulator": campaign["simulator"], "boundary": EVIL, "remarks": [EVIL],
        "engine": {"backend": EVIL},
    }  # fmt: skip
    return results.result("serve-closed-loop", body)


ALL = {
    "bench": bench_document(),
    "check": check_document(),
    "budget": budget_document(),
    "golden": golden_document(),
    "calibrate": calibrate_document(),
    "doctor": doctor_document(),
    "inspect": {"schema": 1, "kind": "inspect", "sizes": {"layers": 3}, "name": EVIL},
    "serve-drive": drive_document(),
    "serve-closed-loop": closed_loop_document(),
    "hopper": hopper_document(),
    "start": start_document(),
    "simulate": json.loads((RESULTS / "conveyor-tasks-expert-2026-11-25.json").read_text()),
    "train": json.loads((RESULTS / "conveyor-small-training-h200-2026-11-30.json").read_text()),
    "strange": {"kind": EVIL, "x": EVIL},
}


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.ids, self.open = [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"


def parse(page):
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    return tags


@pytest.fixture(scope="module")
def page():
    return build([(f"{name}.json", document) for name, document in ALL.items()], title=f"title {EVIL}")


def test_nothing_is_fetched(page):
    names = {tag for tag, _ in parse(page).seen}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "audio", "video", "base"}
    for tag, attributes in parse(page).seen:
        for name in ("src", "href", "srcset", "action", "data"):
            assert attributes.get(name, "#").startswith("#"), f"<{tag} {name}={attributes[name]}>"
    assert "http" not in page.replace("healthy", "")
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_everything_is_escaped(page):
    assert "<script" not in page
    assert "onerror=alert(1)&gt;" in page, "the text is shown"
    assert not [a for _, a in parse(page).seen if "onerror" in a]


def test_ids_are_unique_and_references_resolve(page):
    ids = parse(page).ids
    assert len(ids) == len(set(ids))
    targets = set(re.findall(r'(?:href="#|url\(#)([^")]+)', page))
    assert targets <= set(ids)


def test_every_kind_has_its_section(page):
    for text in TITLES.values():
        assert f"<h2>{text}</h2>" in page
    of_simulation = report_simulation.section(ALL["simulate"]).count("<svg")
    assert of_simulation >= 1
    assert page.count("<svg") == 3 + 3 + 1 + 1 + of_simulation + 2
    assert page.count("<title>") == 1 + page.count("<svg"), "every figure says what it is"
    assert "Coverage: what ran where" in page
    assert "not warm" in page
    assert "no layout for kind" in page


def test_bare_facts_of_inspect_are_recognised():
    page = build([("i.json", {"kind": "pi05", "stored_dtypes": {"float32": 3}, "origin": "lerobot"})])
    assert "<h2>Checkpoint</h2>" in page
    assert "lerobot" in page


def test_figures_follow_the_theme(page):
    assert "prefers-color-scheme: dark" in page
    assert "var(--s0)" in page
    assert "#0a0000" not in page
    assert "#010101" not in page
    assert "<text" in page, "text stays text"


def test_no_text_of_a_figure_is_black_in_the_dark():
    names = ("steps-bimodal-24", "plans-h200", "training-h200", "delay", "events")
    paths = [RESULTS / f"conveyor-small-{name}-2026-11-30.json" for name in names]
    documents = [(path.name, json.loads(path.read_text())) for path in paths]
    found = build([*documents, ("bench", ALL["bench"]), ("check", ALL["check"]), ("budget", ALL["budget"])])
    # powers of ten are pieces of text in a group that has the colour
    texts = re.findall(r"((?:<g [^>]*>\s*)?<text[^>]*>)\s*([^<]*)", found)
    assert len(texts) > 200
    assert [words for tags, words in texts if "fill: var(--" not in tags] == []


def test_phones_are_served():
    page = build([("b", ALL["bench"])])
    assert 'name="viewport"' in page
    assert not re.search(r'<svg[^>]* width="', page)


def test_a_failed_check_says_which_mark_failed():
    page = build([("check.json", check_document(bad=True))])
    assert "Marks that failed" in page
    assert 'pill bad">fail' in page
    assert "Marks that failed" not in build([("check.json", check_document())])


def test_numbers_that_json_cannot_hold_are_shown():
    document = check_document()
    document["summary"]["worst"]["actions"]["sqnr_db"] = "inf"
    document["summary"]["worst"]["k"][0]["sqnr_db"] = "inf"
    document["summary"]["worst"]["k"][1]["rel_l2"] = "nan"
    page = build([("check.json", document)])
    assert "∞" in page
    assert "NaN" in page
    assert "1 layers identical" in page


def test_the_page_is_the_same_every_time():
    assert build([("b", ALL["bench"])]) == build([("b", ALL["bench"])])


def test_the_sections_of_the_server_say_how_many_answers_differ():
    page = build([("d.json", drive_document(differing=7)), ("c.json", closed_loop_document(differing=3))])
    assert "<b>7</b><span>answers that differ from the policy alone</span>" in page
    assert "<b>3 of 19</b><span>answers that differ from the policy alone</span>" in page
    assert 'pill bad">fail' in page
    assert "<b>100 / 100</b><span>success at 0 ms</span>" in page
    assert 'pill bad">fail' not in build([("c.json", closed_loop_document())])


@pytest.mark.parametrize("kind", ["bench", "check", "budget", "doctor", "serve-drive", "serve-closed-loop"])
def test_a_result_without_its_content_is_an_error_that_names_the_file(kind):
    with pytest.raises(ConfigError, match=f"x.json says it is a '{kind}' result"):
        build([("x.json", {"schema": 1, "kind": kind})])


def test_an_engine_that_was_refused_is_shown():
    document = results.result("bench", {"passed": False, "error": "cosine 0.2"})
    page = build([("b.json", document)])
    assert "cosine 0.2" in page
    assert 'pill bad">fail' in page


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1234.5, "1234"), (0.01234, "0.0123"), (1e-9, "1.00e-09"), (None, "-"), ("inf", "∞"), ("nan", "NaN")],
)
def test_numbers_for_people(value, text):
    assert num(value) == text


def beside(page):
    """Cells of the lines below "Beside engines of others"."""
    body = page.split("<h3>Beside engines of others</h3>")[1].split("</table>")[0].split("<tbody>")[1]
    return [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in body.split("</tr>")[:-1]]


def test_full_size_rivals_are_shown_beside_ours_of_the_same_rounds():
    """Their stages have times and no rates; nothing of them is judged. Older results have them at B0 alone."""
    document = json.loads((RESULTS / "hopper-rivals-five-h200-2026-11-30.json").read_text())
    page, lines = render(document), []
    for row in document["rows"]:
        assert f"<td>{num(row['stages_ms']['denoise'])}</td><td>-</td>" in page
        times = [num(row["latency"][key], 4) for key in ("p50_ms", "p95_ms", "p99_ms")]
        first = [f"({row['setting']}) {row['engine']}", "B0", *times, str(row["calls"])]
        for name, one in row["ours_in_the_same_rounds"].items():
            lines.append([*first, name, num(one["p50_ms"], 4), f"{num(one['ratio'])}x"])
    assert len(lines) == 20
    assert beside(page) == lines
    assert "nothing here is judged" in page


def test_full_size_rivals_are_shown_boundary_by_boundary_and_setting_by_setting():
    """As a result has them: B0 of every setting first. One whose B0 failed is shown too."""
    document = json.loads((RESULTS / "hopper-rivals-five-h200-2026-11-30.json").read_text())
    first, second = (
        next(row for row in document["rows"] if (row["setting"], row["engine"]) == (setting, "compiled graph"))
        for setting in ("3,200,50", "2,0,63")
    )
    host = [{key: value for key, value in first.items() if key != "stages_ms"} | {"boundary": b} for b in ("B1", "B2")]
    alone = host[0] | {"setting": "9,9,9"}
    page = render(document | {"rows": [first, second, *host, alone]})
    assert [line[:2] for line in beside(page)][::2] == [
        *(["(3,200,50) compiled graph", boundary] for boundary in ("B0", "B1", "B2")),
        ["(2,0,63) compiled graph", "B0"], ["(9,9,9) compiled graph", "B1"],
    ]  # fmt: skip


def test_a_full_size_result_without_rivals_says_nothing_of_them():
    document = json.loads((RESULTS / "hopper-client-h200-2026-11-30.json").read_text())
    assert "Beside engines of others" not in render(document)


def test_the_boundaries_of_a_full_size_result_are_explained():
    document = json.loads((RESULTS / "hopper-client-h200-2026-11-30.json").read_text())
    page = render(document)
    assert "B3 openpi: the same through openpi&#x27;s client, not judged" in page
    assert "B3 - B2, ms 1.521, at most 1.5" in page
    assert "1.5207655" not in page.split("<h3>Latency")[0]


def test_starts_from_files_are_a_table():
    document = json.loads((RESULTS / "start-from-files-h200-2026-11-30.json").read_text())
    page = render(document)
    for row in document["rows"]:
        assert f"<td>{num(row['first_action_s'])}</td>" in page
    assert "8.29 GB of weights" in page
