"""Clips in the page: the very bytes, nothing fetched, and a clear refusal of what is no clip or too large."""

from __future__ import annotations

import base64
import re

import pytest
from PIL import Image

from vivace.check import report_clip
from vivace.check.report import build
from vivace.errors import ConfigError

MP4 = b"\x00\x00\x00\x20ftypisom" + bytes(range(64))  # enough of one: the report reads no further than the first bytes


def animation(path):
    first, second = (Image.new("RGB", (16, 8), (value, 0, 0)) for value in (0, 200))
    first.save(path, save_all=True, append_images=[second], duration=40, loop=0)
    return path


@pytest.mark.parametrize(("ending", "tag"), [("webp", "img"), ("gif", "img"), ("mp4", "video")])
def test_the_page_holds_the_very_bytes_of_a_clip(tmp_path, ending, tag):
    path = tmp_path / f"a <b>clip.{ending.upper()}"
    if ending == "mp4":
        path.write_bytes(MP4)
    else:
        animation(path.with_suffix(f".{ending}")).rename(path)
    page = build([("odd.json", {"kind": "odd"}), (path.name, report_clip.read_clip(path))])
    found = re.search(rf'<{tag} src="data:(?:image|video)/{ending};base64,([^"]+)"', page)
    assert base64.b64decode(found[1]) == path.read_bytes()
    assert f"a &lt;b&gt;clip.{ending.upper()}, " in page
    assert page.index("<h2>odd</h2>") < page.index("<h2>One episode to look at</h2>"), "in the order given"
    assert '<a href="#r1">' in page
    assert '<section id="r1">' in page
    assert "<b>clip" not in page


def test_a_page_may_be_a_clip_alone(tmp_path):
    clip = report_clip.read_clip(animation(tmp_path / "c.webp"))
    assert "data:image/webp" in build([("c.webp", clip)])


def test_a_clip_that_is_too_large_is_refused_with_both_sizes(tmp_path, monkeypatch):
    assert 6e6 < report_clip.MAX_BYTES < 10e6
    path = animation(tmp_path / "c.gif")
    monkeypatch.setattr(report_clip, "MAX_BYTES", path.stat().st_size)
    report_clip.read_clip(path)
    monkeypatch.setattr(report_clip, "MAX_BYTES", path.stat().st_size - 1)
    with pytest.raises(ConfigError, match=r"c\.gif is too large.*MB.*at most"):
        report_clip.read_clip(path)


@pytest.mark.parametrize("ending", ["webp", "gif", "mp4"])
def test_bytes_that_are_something_else_are_refused(tmp_path, ending):
    path = tmp_path / f"c.{ending}"
    Image.new("RGB", (4, 4)).save(tmp_path / "c.png")
    path.write_bytes((tmp_path / "c.png").read_bytes())
    with pytest.raises(ConfigError, match=rf"c\.{ending} is not what its ending says.*PNG"):
        report_clip.read_clip(path)
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match="is not what its ending says"):
        report_clip.read_clip(path)


def test_a_wrong_ending_names_what_it_is(tmp_path):
    animation(tmp_path / "c.gif").rename(tmp_path / "c.webp")
    with pytest.raises(ConfigError, match="got image/gif; wanted image/webp"):
        report_clip.read_clip(tmp_path / "c.webp")


def test_a_missing_clip_is_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the clip"):
        report_clip.read_clip(tmp_path / "none.mp4")
