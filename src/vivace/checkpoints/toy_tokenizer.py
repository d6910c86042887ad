"""A small SentencePiece vocabulary with PaliGemma's options, so that generated checkpoints run with real text.

Byte-pair encoding with byte fallback (any text can be written), identity normaliser, no dummy prefix, digits split one by
one, newline a piece of its own, pad/eos/bos/unk = 0/1/2/3. It is not PaliGemma's vocabulary: ids mean nothing outside.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator

MAX_PIECES = 1024

_VERBS = ("pick up", "put", "push", "open", "close", "stack", "pour", "wipe", "fold", "press", "move", "turn on")
_THINGS = ("the red block", "the black bowl", "the plate", "the middle drawer", "the towel", "the button", "the book")
_PLACES = ("on the plate", "to the left", "into the basket", "of the cabinet", "next to the cup", "on the stove", "")


def train_toy_tokenizer(vocab_size: int) -> bytes:
    """Train a `.model` file with at most `vocab_size` pieces. Deterministic; takes about 0.1 s."""
    return train_like_paligemma(_corpus(), vocab_size=min(vocab_size, MAX_PIECES), symbols=["\n"])


def train_like_paligemma(corpus: Iterator[str], *, vocab_size: int, symbols: list[str]) -> bytes:
    """A `.model` file that splits text and numbers its special pieces as PaliGemma's does; `symbols` become pieces."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=corpus,
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        user_defined_symbols=symbols,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _corpus() -> Iterator[str]:
    for i, (verb, thing, place) in enumerate(itertools.product(_VERBS, _THINGS, _PLACES)):
        task = f"{verb} {thing} {place}".strip()
        state = " ".join(str((37 * i + 61 * k) % 256) for k in range(8))
        yield task
        yield f"Task: {task}, State: {state};"
        yield "Action: "
