"""A SentencePiece vocabulary for the conveyor: one piece for each word of the instructions and each value of the state.

With PaliGemma's vocabulary a state of seven numbers takes thirty digits, and where a number stands depends on how many
digits the ones before it have. In a small network that is wasted work: here every bin is one piece, prompts of a task have
one length, and the table has 600 rows instead of 257 152. Other text still encodes, byte by byte.
"""

from __future__ import annotations

from ..checkpoints.toy_tokenizer import train_like_paligemma

SPACE = "\u2581"
WORDS = (
    "Task", ":", ",", ";", "\n", "State", "Action", "pick", "up", "the", "red", "green", "blue", "cube",
    "put", "into", "well",
)  # fmt: skip


def conveyor_tokenizer() -> bytes:
    """The `.model` file, always the same bytes for one version of sentencepiece."""
    words = [word if word in ":,;\n" else SPACE + word for word in WORDS] + ["Task", "Action"]
    numbers = [f"{SPACE}{number}" for number in range(-1, 256)]
    return train_like_paligemma(
        iter(["Task: pick up the red cube, State: 12 240 7;", "Action: "]),
        vocab_size=len(words) + len(numbers) + 4 + 256 + 24,
        symbols=list(dict.fromkeys(words + numbers)),
    )


def pieces(model: bytes) -> int:
    """Number of ids of a `.model` file."""
    import sentencepiece

    return int(sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size())
