"""vivace's own names: every tensor of a pi0 or pi0.5 network with its shape, in one table.

Shapes are written in symbols (`D` prefix width, `E` expert width, ...). Because the table says which axis is which symbol,
the dimensions of an unknown checkpoint follow from a vote of all its axes, and a tensor that disagrees with the rest
(transposed, of another model, of another layer count) is named instead of poisoning the result.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..config import GemmaConfig, ModelConfig, VisionConfig
from ..errors import CheckpointError
from ..types import PolicyKind
from .source import TensorRef, listing

Kinds = Literal["both", "pi0", "pi05"]
Symbol = str | int

MAX_LAYERS = 512
"""Above this a layer number is damage, not a network."""

# Symbols: W vision width, M vision mlp, T tokens per view, P patch, D prefix width, F prefix mlp, E expert width,
# G expert mlp, Q query rows, K key rows, N vocabulary, A padded action width. "2E", "3E": multiples, which do not vote.
TABLE: tuple[tuple[str, tuple[Symbol, ...], Kinds], ...] = (
    ("vision.patch.weight", ("W", 3, "P", "P"), "both"),
    ("vision.patch.bias", ("W",), "both"),
    ("vision.position.weight", ("T", "W"), "both"),
    ("vision.layers.{i}.norm1.weight", ("W",), "both"),
    ("vision.layers.{i}.norm1.bias", ("W",), "both"),
    ("vision.layers.{i}.attn.q.weight", ("W", "W"), "both"),
    ("vision.layers.{i}.attn.q.bias", ("W",), "both"),
    ("vision.layers.{i}.attn.k.weight", ("W", "W"), "both"),
    ("vision.layers.{i}.attn.k.bias", ("W",), "both"),
    ("vision.layers.{i}.attn.v.weight", ("W", "W"), "both"),
    ("vision.layers.{i}.attn.v.bias", ("W",), "both"),
    ("vision.layers.{i}.attn.o.weight", ("W", "W"), "both"),
    ("vision.layers.{i}.attn.o.bias", ("W",), "both"),
    ("vision.layers.{i}.norm2.weight", ("W",), "both"),
    ("vision.layers.{i}.norm2.bias", ("W",), "both"),
    ("vision.layers.{i}.mlp.fc1.weight", ("M", "W"), "both"),
    ("vision.layers.{i}.mlp.fc1.bias", ("M",), "both"),
    ("vision.layers.{i}.mlp.fc2.weight", ("W", "M"), "both"),
    ("vision.layers.{i}.mlp.fc2.bias", ("W",), "both"),
    ("vision.norm.weight", ("W",), "both"),
    ("vision.norm.bias", ("W",), "both"),
    ("projector.weight", ("D", "W"), "both"),
    ("projector.bias", ("D",), "both"),
    ("embedding.weight", ("N", "D"), "both"),
    ("prefix.layers.{i}.norm1.weight", ("D",), "both"),
    ("prefix.layers.{i}.attn.q.weight", ("Q", "D"), "both"),
    ("prefix.layers.{i}.attn.k.weight", ("K", "D"), "both"),
    ("prefix.layers.{i}.attn.v.weight", ("K", "D"), "both"),
    ("prefix.layers.{i}.attn.o.weight", ("D", "Q"), "both"),
    ("prefix.layers.{i}.norm2.weight", ("D",), "both"),
    ("prefix.layers.{i}.mlp.gate.weight", ("F", "D"), "both"),
    ("prefix.layers.{i}.mlp.up.weight", ("F", "D"), "both"),
    ("prefix.layers.{i}.mlp.down.weight", ("D", "F"), "both"),
    ("expert.layers.{i}.norm1.weight", ("E",), "pi0"),
    ("expert.layers.{i}.norm1.modulation.weight", ("3E", "E"), "pi05"),
    ("expert.layers.{i}.norm1.modulation.bias", ("3E",), "pi05"),
    ("expert.layers.{i}.attn.q.weight", ("Q", "E"), "both"),
    ("expert.layers.{i}.attn.k.weight", ("K", "E"), "both"),
    ("expert.layers.{i}.attn.v.weight", ("K", "E"), "both"),
    ("expert.layers.{i}.attn.o.weight", ("E", "Q"), "both"),
    ("expert.layers.{i}.norm2.weight", ("E",), "pi0"),
    ("expert.layers.{i}.norm2.modulation.weight", ("3E", "E"), "pi05"),
    ("expert.layers.{i}.norm2.modulation.bias", ("3E",), "pi05"),
    ("expert.layers.{i}.mlp.gate.weight", ("G", "E"), "both"),
    ("expert.layers.{i}.mlp.up.weight", ("G", "E"), "both"),
    ("expert.layers.{i}.mlp.down.weight", ("E", "G"), "both"),
    ("expert.norm.weight", ("E",), "pi0"),
    ("expert.norm.modulation.weight", ("3E", "E"), "pi05"),
    ("expert.norm.modulation.bias", ("3E",), "pi05"),
    ("action_in.weight", ("E", "A"), "both"),
    ("action_in.bias", ("E",), "both"),
    ("action_out.weight", ("A", "E"), "both"),
    ("action_out.bias", ("A",), "both"),
    ("time_in.weight", ("E", "E"), "pi05"),
    ("time_in.bias", ("E",), "pi05"),
    ("time_out.weight", ("E", "E"), "pi05"),
    ("time_out.bias", ("E",), "pi05"),
    ("state.weight", ("E", "A"), "pi0"),
    ("state.bias", ("E",), "pi0"),
    ("action_time_in.weight", ("E", "2E"), "pi0"),
    ("action_time_in.bias", ("E",), "pi0"),
    ("action_time_out.weight", ("E", "E"), "pi0"),
    ("action_time_out.bias", ("E",), "pi0"),
)
_ROWS = {template: (shape, kinds) for template, shape, kinds in TABLE}
_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Hints:
    """What shapes cannot tell and a file or a person did. None = not said."""

    vision_heads: int | None = None
    num_heads: int | None = None
    head_dim: int | None = None


def expected_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{canonical name: shape} of every tensor that the network needs, in file order."""
    vision, prefix, expert = model.vision, model.prefix, model.expert
    dims = {
        **{"W": vision.width, "M": vision.mlp_width, "T": vision.tokens, "P": vision.patch_size},
        **{"D": prefix.width, "F": prefix.mlp_width, "E": expert.width, "G": expert.mlp_width},
        **{"Q": prefix.num_heads * prefix.head_dim, "K": prefix.num_kv_heads * prefix.head_dim},
        **{"N": model.vocab_size, "A": model.action_width},
        **{"vision": vision.layers, "prefix": prefix.layers, "expert": expert.layers},
    }
    return _shapes(dims, model.kind)


def policy_kind(names: Mapping[str, Any], *, where: str) -> PolicyKind:
    """Tell pi0 and pi0.5 apart by the tensors that only one of them has. Raises CheckpointError on neither or both."""
    by_kind = {kind: [n for n in names if _ROWS[template_of(n)][1] == kind] for kind in ("pi0", "pi05")}
    if by_kind["pi0"] and by_kind["pi05"]:
        raise CheckpointError(
            f"{where} holds tensors of both pi0 and pi0.5",
            got=f"pi0:{listing(by_kind['pi0'][:8])}\npi0.5:{listing(by_kind['pi05'][:8])}",
            wanted="one of the two",
            do="two checkpoints were mixed, or tensors were renamed; vivace does not guess which half is right",
        )
    if not by_kind["pi0"] and not by_kind["pi05"]:
        raise CheckpointError(
            f"{where} is neither pi0 nor pi0.5",
            got="no time_mlp_in (pi0.5) and no state_proj or action_time_mlp_in (pi0)",
            do="other policies, PaliGemma alone among them, cannot be run",
        )
    return "pi05" if by_kind["pi05"] else "pi0"


def infer_model(tensors: Mapping[str, TensorRef], *, hints: Hints, where: str) -> ModelConfig:
    """Find out what the network is from its tensors, and check that it is complete.

    Returns a ModelConfig with `kind` and all dimensions set; horizon and numerics stay at their defaults.
    Raises CheckpointError with every missing, unexpected and mis-shaped tensor.
    """
    kind = policy_kind(tensors, where=where)
    dims = _vote(tensors)
    _audit(tensors, dims, kind, where=where)
    head_dim = hints.head_dim or dims["K"]
    num_heads = hints.num_heads or dims["Q"] // head_dim
    if num_heads * head_dim != dims["Q"] or dims["K"] % head_dim:
        raise CheckpointError(
            f"{where}: attention heads do not fit the projections",
            got=f"{dims['Q']} query rows, {dims['K']} key rows, {num_heads} heads of {head_dim}",
            wanted="query rows = heads x head_dim, key rows a multiple of head_dim",
            do="pass num_heads and head_dim (--num-heads, --head-dim)",
        )
    side = math.isqrt(dims["T"])
    if side * side != dims["T"]:
        raise CheckpointError(f"{where}: the position table is not square", got=f"{dims['T']} tokens per view")
    attention = {"num_heads": num_heads, "num_kv_heads": dims["K"] // head_dim, "head_dim": head_dim}
    return ModelConfig(
        kind=kind,
        vision=VisionConfig(
            width=dims["W"],
            layers=dims["vision"],
            mlp_width=dims["M"],
            num_heads=_vision_heads(dims["W"], hints.vision_heads, where=where),
            patch_size=dims["P"],
            image_size=side * dims["P"],
        ),
        prefix=GemmaConfig(width=dims["D"], layers=dims["prefix"], mlp_width=dims["F"], **attention),
        expert=GemmaConfig(width=dims["E"], layers=dims["expert"], mlp_width=dims["G"], **attention),
        vocab_size=dims["N"],
        action_width=dims["A"],
    )


def template_of(name: str) -> str:
    """`prefix.layers.3.norm1.weight` -> `prefix.layers.{i}.norm1.weight`."""
    return _LAYER.sub(".layers.{i}.", name)


def is_known(template: str) -> bool:
    """Whether a template is a row of the table."""
    return template in _ROWS


def _vision_heads(width: int, told: int | None, *, where: str) -> int:
    heads = told or (width // 72 if width % 72 == 0 else 0)
    if heads and width % heads == 0:
        return heads
    raise CheckpointError(
        f"{where}: the number of vision heads cannot be told from the tensors",
        got=f"vision width {width}" + (f" and {told} heads" if told else ", which is no multiple of SigLIP's 72"),
        wanted="a divisor of the width",
        do="pass vision_heads (--vision-heads), or add vision_num_attention_heads to vivace.json (openpi: config.json)",
    )


def _shapes(dims: Mapping[str, int], kind: PolicyKind) -> dict[str, tuple[int, ...]]:
    """Expand the table: stacks layer by layer, in the table's order."""
    out: dict[str, tuple[int, ...]] = {}
    rows = [(template, shape) for template, shape, kinds in TABLE if kinds in ("both", kind)]
    done: set[str] = set()
    for template, shape in rows:
        stack = template.split(".", 1)[0]
        if "{i}" not in template:
            out[template] = _concrete(shape, dims)
        elif stack not in done:
            done.add(stack)
            layered = [row for row in rows if row[0].startswith(f"{stack}.layers.")]
            for i in range(dims[stack]):
                out.update({name.format(i=i): _concrete(symbols, dims) for name, symbols in layered})
    return out


def _concrete(shape: tuple[Symbol, ...], dims: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(_size(symbol, dims) for symbol in shape)


def _size(symbol: Symbol, dims: Mapping[str, int]) -> int:
    if isinstance(symbol, int):
        return symbol
    return dims[symbol] if symbol in dims else int(symbol[0]) * dims[symbol[1]]


def _vote(tensors: Mapping[str, TensorRef]) -> dict[str, int]:
    """Every axis of every tensor votes for its symbol; layer counts are one more than the highest number seen."""
    votes: dict[str, Counter[int]] = {}
    layers = {"vision": 0, "prefix": 0, "expert": 0}
    for name, ref in tensors.items():
        shape = _ROWS[template_of(name)][0]
        if match := _LAYER.search(name):
            stack = name.split(".", 1)[0]
            layers[stack] = max(layers[stack], int(match[1]) + 1)
        if len(shape) == len(ref.shape):
            for symbol, size in zip(shape, ref.shape, strict=True):
                if isinstance(symbol, str) and len(symbol) == 1:
                    votes.setdefault(symbol, Counter())[size] += 1
    depth = max(layers["prefix"], layers["expert"])  # the experts attend layer by layer: the shorter one misses layers
    dims = {"vision": layers["vision"], "prefix": depth, "expert": depth}
    for symbol, counter in votes.items():
        dims[symbol] = counter.most_common(1)[0][0]
    for symbol in "WMTPDFEGQKNA":
        dims.setdefault(symbol, 0)  # no tensor spoke: the audit names those that are missing
    return dims


def _audit(tensors: Mapping[str, TensorRef], dims: Mapping[str, int], kind: PolicyKind, *, where: str) -> None:
    expected = _shapes({**dims, **{stack: max(dims[stack], 1) for stack in ("vision", "prefix", "expert")}}, kind)
    missing = [name for name in expected if name not in tensors]
    extra = [f"{ref.key} ({name})" for name, ref in tensors.items() if name not in expected]
    wrong = []
    for name, ref in tensors.items():
        want = expected.get(name, ref.shape)
        if ref.shape != want or 0 in want:
            hint = ", transposed?" if ref.shape == want[::-1] and ref.shape != want else ""
            wrong.append(f"{ref.key}: got {list(ref.shape)}, wanted {list(want)}{hint}")
        elif not ref.dtype.is_floating_point:
            wrong.append(f"{ref.key}: got {ref.dtype}, wanted a floating-point dtype")
    if not missing and not extra and not wrong:
        return
    label = {"pi0": "pi0", "pi05": "pi0.5"}[kind]
    parts = [
        f"{len(group)} {title}:{listing(group)}"
        for title, group in (("missing", missing), ("wrong", wrong), ("not part of it", extra))
        if group
    ]
    raise CheckpointError(
        f"{where} is not a complete {label} network",
        got="\n".join(parts) + "\n",
        wanted=f"{len(expected)} tensors of {dims['prefix']} layers, prefix width {dims['D']}, expert width {dims['E']}",
        do="the file is incomplete, renamed or of another architecture; nothing was loaded",
    )


def layer_number(name: str) -> str | None:
    """The digits in `...layers.7...`, None if there are none. Absurd ones count as none: loops over layers stay bounded."""
    match = _LAYER.search(name)
    return match[1] if match and len(match[1]) <= 4 and int(match[1]) < MAX_LAYERS else None


def in_order(tensors: Mapping[str, TensorRef], model: ModelConfig) -> dict[str, TensorRef]:
    """The same tensors in the table's order."""
    return {name: tensors[name] for name in expected_shapes(model)}
