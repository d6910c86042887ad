"""`vivace report`: writes one page and says where."""

import json

from PIL import Image


def test_writes_the_page(vivace, tmp_path):
    (tmp_path / "odd.json").write_text(json.dumps({"kind": "odd", "x": 1}))
    out = tmp_path / "deep" / "page.html"
    code, document, text = vivace("report", tmp_path / "odd.json", "-o", out, "--title", "A <b>run</b>")
    assert code == 0
    page = out.read_text(encoding="utf-8")
    assert document["bytes"] == len(page.encode())
    assert document["results"] == 1
    assert "<title>A &lt;b&gt;run&lt;/b&gt;</title>" in page
    assert "page.html" in text


def test_what_is_no_result_exits_2(vivace, tmp_path):
    (tmp_path / "bad.json").write_text("not json")
    assert vivace("report", tmp_path / "bad.json", "-o", tmp_path / "p.html")[0] == 2
    (tmp_path / "empty.json").write_text('{"kind": "check"}')
    assert vivace("report", tmp_path / "empty.json", "-o", tmp_path / "p.html")[0] == 2
    assert vivace("report", tmp_path / "none.json", "-o", tmp_path / "p.html")[0] == 2
    assert not (tmp_path / "p.html").exists()


def test_a_clip_goes_into_the_page(vivace, tmp_path):
    (tmp_path / "odd.json").write_text(json.dumps({"kind": "odd", "x": 1}))
    Image.new("RGB", (4, 4)).save(tmp_path / "clip.webp")
    code, document, _ = vivace("report", tmp_path / "odd.json", tmp_path / "clip.webp", "-o", tmp_path / "p.html")
    assert (code, document["results"]) == (0, 2)
    assert 'src="data:image/webp;base64,' in (tmp_path / "p.html").read_text()


def test_another_kind_of_picture_exits_2_and_says_what_is_taken(vivace, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "still.png")
    code, _, text = vivace("report", tmp_path / "still.png", "-o", tmp_path / "p.html")
    assert code == 2
    assert "neither a result nor a clip" in text
    assert ".webp" in text
    assert not (tmp_path / "p.html").exists()


def test_what_does_not_say_its_kind_exits_2(vivace, tmp_path):
    for text in ("{}", '{"schema": 1}', '{"kind": 3}'):
        (tmp_path / "any.json").write_text(text)
        code, _, said = vivace("report", tmp_path / "any.json", "-o", tmp_path / "p.html")
        assert code == 2
        assert "is no result" in " ".join(said.split())
    assert not (tmp_path / "p.html").exists()


def test_the_log_of_a_training_is_taken(vivace, tmp_path):
    step = {"t_s": 1.0, "event": "step", "step": 50, "loss": 0.5}
    (tmp_path / "log.jsonl").write_text(json.dumps(step) + "\n" + json.dumps(step | {"step": 100}) + "\n")
    code, document, _ = vivace("report", tmp_path / "log.jsonl", "-o", tmp_path / "p.html")
    assert (code, document["results"]) == (0, 1)
    assert "<title>Training loss</title>" in (tmp_path / "p.html").read_text()


def test_what_is_no_log_exits_2_and_says_which_line(vivace, tmp_path):
    for text, said in (
        ('{"event": "start"}\n{"event": "st', "line 2, is no JSON"),
        ('{"step": 3}\n', "line 1, is no report of a training"),
        ("", "is empty"),
    ):
        (tmp_path / "log.jsonl").write_text(text)
        code, _, found = vivace("report", tmp_path / "log.jsonl", "-o", tmp_path / "p.html")
        assert code == 2
        assert said in " ".join(found.split())
    assert vivace("report", tmp_path / "none.jsonl", "-o", tmp_path / "p.html")[0] == 2
    assert not (tmp_path / "p.html").exists()
