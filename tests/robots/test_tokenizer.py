"""Where the vocabulary is found, and what is said when there is none."""

import importlib.util
import json
import shutil
import sys
import types
from pathlib import Path

import pytest

from vivace.errors import ConfigError
from vivace.robots.tokenizer import HUGGINGFACE_CACHE, OPENPI_CACHE, PALIGEMMA_SHA256, load_tokenizer


@pytest.fixture
def toy(golden_dir: Path) -> Path:
    return golden_dir / "tokenizer_toy"


def place(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def test_search_order(toy: Path, tmp_path: Path) -> None:
    home, checkpoint = tmp_path / "home", tmp_path / "checkpoint"
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(None, checkpoint_dir=checkpoint, home=home)
    message = str(caught.value)
    for part in ("paligemma_tokenizer.model", PALIGEMMA_SHA256, "gs://big_vision", "tokenized_prompt", str(checkpoint)):
        assert part in message
    place(toy / "hf" / "tokenizer.json", home / HUGGINGFACE_CACHE / "0123abcd" / "tokenizer.json")
    assert "huggingface" in load_tokenizer(None, checkpoint_dir=checkpoint, home=home).source
    place(toy / "tokenizer.model", home / OPENPI_CACHE)
    assert "openpi" in load_tokenizer(None, checkpoint_dir=checkpoint, home=home).source
    place(toy / "hf" / "tokenizer.json", checkpoint / "tokenizer" / "tokenizer.json")
    assert str(checkpoint) in load_tokenizer(None, checkpoint_dir=checkpoint, home=home).source
    explicit = load_tokenizer(toy / "tokenizer.model", checkpoint_dir=checkpoint, home=home)
    assert explicit.source == str(toy / "tokenizer.model")


def test_one_bos_whatever_the_file_carries(toy: Path, tmp_path: Path) -> None:
    content = json.loads((toy / "hf" / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    padded, plain = load_tokenizer(tmp_path), load_tokenizer(toy / "hf")
    model = load_tokenizer(toy / "tokenizer.model")
    for text in ("pick up the black bowl", "", "\n", "Task: x, State: 1 2;\nAction: "):
        wanted = model.encode(text, add_bos=True)
        assert padded.encode(text, add_bos=True) == plain.encode(text, add_bos=True) == wanted
        assert plain.encode(text, add_bos=False) == wanted[1:]


def test_control_tokens_in_the_text_differ_by_kind(toy: Path) -> None:
    hub, model = load_tokenizer(toy / "hf" / "tokenizer.json"), load_tokenizer(toy / "tokenizer.model")
    assert hub.encode("<bos>x", add_bos=True)[:2] == [2, 2]
    assert model.encode("<bos>x", add_bos=True).count(2) == 1


@pytest.mark.parametrize(("name", "content"), [("t.model", b"no"), ("tokenizer.json", b"{"), ("tokenizer.json", b"{}")])
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name):
        load_tokenizer(tmp_path / name)


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "nothing.model")


def test_splintr_absent_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "splintr" else real(name))
    with pytest.raises(ConfigError, match="pip install splintr-rs"):
        load_tokenizer("splintr")


def test_splintr_adds_bos_and_refuses_its_own_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gemma:
        def encode_ordinary(self, text: str) -> list[int]:
            return [256001] if text == "agent" else [108] * len(text)

    class Loader:
        @staticmethod
        def from_pretrained(name: str) -> Gemma:
            assert name == "gemma2"
            return Gemma()

    fake = types.ModuleType("splintr")
    fake.Tokenizer = Loader  # type: ignore[attr-defined]
    fake.__spec__ = importlib.util.spec_from_loader("splintr", loader=None)
    monkeypatch.setitem(sys.modules, "splintr", fake)
    tokenizer = load_tokenizer("splintr")
    assert tokenizer.encode("ab", add_bos=True) == [2, 108, 108]
    with pytest.raises(ConfigError, match="256001"):
        tokenizer.encode("agent", add_bos=True)
