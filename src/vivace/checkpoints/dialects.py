"""How the tensors of safetensors checkpoints are called, in every dialect met so far, and what vivace calls them.

Two steps, both data. `PREFIXES` strips what differs between writers (a leading `model.`, `vision_model.`, transformers'
`vlm`/`dit`) until one common form is left; `ROWS` maps that form to the canonical name. Anything that neither step knows is
an error: a tensor is used, listed as dead, or refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import CheckpointError
from . import names
from .safetensors_io import Header
from .source import TensorRef, listing

PREFIXES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(^|\.)_orig_mod\.", r"\1"),  # saved from inside torch.compile
        (
            r"^model\.(?=paligemma|gemma_expert|vlm\.|dit\.|action_|state_proj|time_mlp|embed_action_time)",
            "",
        ),  # LeRobot
        (r"^paligemma_with_expert\.", ""),
        (r"^embed_action_time\.", ""),  # transformers' own PI0
        (r"^(paligemma\.model|paligemma|vlm)\.", "vlm."),
        (r"^vlm\.language_model\.lm_head\.", "vlm.lm_head."),  # transformers before 4.52
        (r"^vlm\.language_model\.(model\.)?", "prefix."),
        (r"^vlm\.vision_tower\.(vision_model\.)?", "vision."),  # transformers 5.6 dropped vision_model
        (r"^vlm\.multi_modal_projector\.linear\.", "projector."),
        (r"^(gemma_expert\.model|gemma_expert|dit)\.", "expert."),
    )
)

_MODULES: tuple[tuple[str, str, tuple[str, ...]], ...] = (  # (common form, canonical, what it has)
    ("vision.embeddings.patch_embedding", "vision.patch", ("weight", "bias")),
    ("vision.embeddings.position_embedding", "vision.position", ("weight",)),
    ("vision.encoder.layers.{i}.layer_norm1", "vision.layers.{i}.norm1", ("weight", "bias")),
    ("vision.encoder.layers.{i}.layer_norm2", "vision.layers.{i}.norm2", ("weight", "bias")),
    ("vision.encoder.layers.{i}.self_attn.q_proj", "vision.layers.{i}.attn.q", ("weight", "bias")),
    ("vision.encoder.layers.{i}.self_attn.k_proj", "vision.layers.{i}.attn.k", ("weight", "bias")),
    ("vision.encoder.layers.{i}.self_attn.v_proj", "vision.layers.{i}.attn.v", ("weight", "bias")),
    ("vision.encoder.layers.{i}.self_attn.out_proj", "vision.layers.{i}.attn.o", ("weight", "bias")),
    ("vision.encoder.layers.{i}.mlp.fc1", "vision.layers.{i}.mlp.fc1", ("weight", "bias")),
    ("vision.encoder.layers.{i}.mlp.fc2", "vision.layers.{i}.mlp.fc2", ("weight", "bias")),
    ("vision.post_layernorm", "vision.norm", ("weight", "bias")),
    ("projector", "projector", ("weight", "bias")),
    ("prefix.embed_tokens", "embedding", ("weight",)),
    *(
        (f"{stack}.layers.{{i}}.{module}", f"{stack}.layers.{{i}}.{ours}", ("weight",))
        for stack in ("prefix", "expert")
        for module, ours in (
            ("input_layernorm", "norm1"),
            ("post_attention_layernorm", "norm2"),
            ("self_attn.q_proj", "attn.q"),
            ("self_attn.k_proj", "attn.k"),
            ("self_attn.v_proj", "attn.v"),
            ("self_attn.o_proj", "attn.o"),
            ("mlp.gate_proj", "mlp.gate"),
            ("mlp.up_proj", "mlp.up"),
            ("mlp.down_proj", "mlp.down"),
        )
    ),
    ("expert.layers.{i}.input_layernorm.dense", "expert.layers.{i}.norm1.modulation", ("weight", "bias")),
    ("expert.layers.{i}.post_attention_layernorm.dense", "expert.layers.{i}.norm2.modulation", ("weight", "bias")),
    ("expert.norm", "expert.norm", ("weight",)),
    ("expert.norm.dense", "expert.norm.modulation", ("weight", "bias")),
    ("action_in_proj", "action_in", ("weight", "bias")),
    ("action_out_proj", "action_out", ("weight", "bias")),
    ("time_mlp_in", "time_in", ("weight", "bias")),
    ("time_mlp_out", "time_out", ("weight", "bias")),
    ("state_proj", "state", ("weight", "bias")),
    ("action_time_mlp_in", "action_time_in", ("weight", "bias")),
    ("action_time_mlp_out", "action_time_out", ("weight", "bias")),
)
ROWS: dict[str, str] = {f"{theirs}.{leaf}": f"{ours}.{leaf}" for theirs, ours, leaves in _MODULES for leaf in leaves}

TIED_EMBEDDING = "vlm.lm_head.weight"
"""The same table as `prefix.embed_tokens` in tied files; where both are stored, a dead copy that LeRobot never trains."""

DEAD: dict[str, str] = {
    "expert.lm_head.weight": "the expert predicts velocities, not words",
    "expert.embed_tokens.weight": "the expert is fed actions, not words",
    "prefix.norm.weight": "nothing reads the prefix's final hidden state",
    "vision.embeddings.position_ids": "a constant 0..T-1 of old transformers",
    **{f"{stack}.layers.{{i}}.self_attn.rotary_emb.inv_freq": "computed" for stack in ("prefix", "expert")},
    **{f"{stack}.rotary_emb.inv_freq": "computed" for stack in ("prefix", "expert")},
}

_WRITTEN_PREFIX = {  # how openpi and LeRobot 0.5/0.6 write the common form
    "vision": "paligemma_with_expert.paligemma.model.vision_tower.vision_model",
    "prefix": "paligemma_with_expert.paligemma.model.language_model",
    "projector": "paligemma_with_expert.paligemma.model.multi_modal_projector.linear",
    "expert": "paligemma_with_expert.gemma_expert.model",
    "vlm": "paligemma_with_expert.paligemma",
}
_INVERSE = {ours: theirs for theirs, ours in ROWS.items()}


@dataclass(frozen=True)
class Translated:
    """The tensors of a file under canonical names, its dead ones, and what is worth a note."""

    tensors: dict[str, TensorRef]
    dead: tuple[str, ...]
    notes: tuple[str, ...]
    embedding_untied: bool


def common_form(key: str) -> str:
    """Strip what differs between dialects."""
    for pattern, replacement in PREFIXES:
        key = pattern.sub(replacement, key)
    return key


def written_key(name: str) -> str:
    """The key under which openpi's PyTorch code stores canonical `name` (LeRobot adds a leading `model.`)."""
    template = names.template_of(name)
    theirs = _INVERSE[template].replace("{i}", name.split(".")[2]) if "{i}" in template else _INVERSE[template]
    head, rest = theirs.split(".", 1)
    return f"{_WRITTEN_PREFIX[head]}.{rest}" if head in _WRITTEN_PREFIX else theirs


def translate(header: Header, *, where: str) -> Translated:
    """Give every tensor of a safetensors file its canonical name.

    Raises CheckpointError that lists the tensors: unknown ones, two that claim one name, adapters, and the normalisation
    buffers of LeRobot up to 0.3.
    """
    stored = {key: item.ref() for key, item in header.tensors.items()}
    for alias, kept in header.metadata.items():  # save_model stores tied tensors once and notes the other names here
        if alias not in stored and kept in stored:
            stored[alias] = stored[kept]
    _refuse_adapters(stored, where=where)
    _refuse_buffers(stored, where=where)
    found: dict[str, list[TensorRef]] = {}
    tied: list[TensorRef] = []
    dead, unknown = [], []
    for key, ref in stored.items():
        common = common_form(key)
        template = names.template_of(common)
        number = names.layer_number(common)
        if ("{i}" in template) != (number is not None):
            unknown.append(key)
        elif template in DEAD:
            dead.append(key)
        elif common == TIED_EMBEDDING:
            tied.append(ref)
        elif template in ROWS:
            found.setdefault(ROWS[template].replace("{i}", number or ""), []).append(ref)
        else:
            unknown.append(key)
    untied = (
        bool(tied) and "embedding.weight" in found and all(ref.key != found["embedding.weight"][0].key for ref in tied)
    )
    notes = []
    if "embedding.weight" not in found and tied:
        found["embedding.weight"] = tied
    elif untied:
        dead += [ref.key for ref in tied]
        notes.append("lm_head and embed_tokens are both stored; the embedding is embed_tokens")
    _refuse_unknown(unknown, found, where=where)
    return Translated({name: refs[0] for name, refs in found.items()}, tuple(dead), tuple(notes), untied)


def _refuse_unknown(unknown: list[str], found: Mapping[str, list[TensorRef]], *, where: str) -> None:
    twice = [f"{name}: {', '.join(ref.key for ref in refs)}" for name, refs in found.items() if len(refs) > 1]
    if twice:
        raise CheckpointError(
            f"{where}: several tensors claim one place", got=listing(twice) + "\n", wanted="each exactly once"
        )
    if unknown and not found:
        raise CheckpointError(
            f"{where} is not a pi0 or pi0.5 checkpoint",
            got=f"{len(unknown)} tensors, none of them known:{listing(unknown)}\n",
            wanted="tensors of PaliGemma, an action expert and action projections",
        )
    if unknown:
        raise CheckpointError(
            f"{where} holds tensors that vivace does not know",
            got=f"{len(unknown)}:{listing(unknown)}\n",
            wanted="only tensors of pi0 or pi0.5; each is used, or known to be dead",
            do="if they belong to the network, vivace would compute something else without them",
        )


def _refuse_adapters(stored: Mapping[str, TensorRef], *, where: str) -> None:
    lora = [key for key in stored if ".lora_" in key or ".base_layer." in key or key.startswith("base_model.")]
    if lora:
        raise CheckpointError(
            f"{where} holds unmerged PEFT adapter tensors",
            got=f"{len(lora)}:{listing(lora[:8])}\n",
            wanted="a merged checkpoint",
            do="merge with peft's merge_and_unload() and save the policy again",
        )


def _refuse_buffers(stored: Mapping[str, TensorRef], *, where: str) -> None:
    old = [key for key in stored if re.match(r"(model\.)?(normalize_|unnormalize_)(inputs|targets|outputs)\.", key)]
    if old:
        raise CheckpointError(
            f"{where} was written by LeRobot 0.3 or older: the normalisation is inside model.safetensors",
            got=f"{len(old)} buffers:{listing(old[:8])}\n",
            wanted="policy_preprocessor.json and policy_postprocessor.json beside the weights",
            do="convert it once with LeRobot's lerobot/processor/migrate_policy_normalization.py",
        )
