"""A SentencePiece vocabulary for the conveyor: one piece for each word of the instructions and each value of the state.

With PaliGemma's vocabulary a state of seven numbers takes thirty digits, and where a number stands depends on how many
digits the ones before it have. In a small network that is wasted work: here every bin is one piece, prompts of a task have
one length, and the table has 600 rows instead of 257 152. Other text still encodes, byte by byte.
"""

from __future__ import annotations

import io

SPACE = "\u2581"
WORDS = (
    "Task", ":", ",", ";", "\n", "State", "Action", "pick", "up", "the", "red", "green", "blue", "cube",
    "put", "into", "well",
)  # fmt: skip


def conveyor_tokenizer() -> bytes:
    """The `.model` file, always the same bytes for one version of sentencepiece."""
    import sentencepiece

    model = io.BytesIO()
    pieces = [word if word in ":,;\n" else SPACE + word for word in WORDS] + ["Task", "Action"]
    numbers = [f"{SPACE}{number}" for number in range(-1, 256)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["Task: pick up the red cube, State: 12 240 7;", "Action: "]),
        model_writer=model,
        model_type="bpe",
        vocab_size=len(pieces) + len(numbers) + 4 + 256 + 24,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        user_defined_symbols=list(dict.fromkeys(pieces + numbers)),
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def pieces(model: bytes) -> int:
    """Number of ids of a `.model` file."""
    import sentencepiece

    return int(sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size())
