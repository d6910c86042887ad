"""realtime-vla, a public pi0.5 engine in bfloat16 (github.com/Dexmal/realtime-vla), as one of the full-size benchmark's.

Nothing of it is part of vivace: the caller names a folder with its `pi05_infer.py` and `pi0_infer.py`, whose code is then
imported and run. It gets our weights in its own layout, so that its actions can be held against the same float32 actions as
ours: an engine that computes something else is not timed.

Its layout, read from `pi05_infer.py` and `convert_from_jax_pi05.py` of that project: matrices are [in, out]; gains of the
prefix's norms are folded into the rows of the matrix behind them; queries and keys of both stacks have each head's two
halves interleaved, which is how it rotates them; the last prefix layer's queries and everything after them are never read.
It has 10 steps, SigLIP's norms at 1e-5 where openpi has 1e-6, and keeps noisy actions in bfloat16 between steps.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..backends.spans import Spans
from ..errors import ConfigError, Unsupported
from ..model import flow
from ..model.pi import Pi
from ..ops.layers import Linear
from ..ops.reference import to_unit_range
from ..types import ModelInputs, PrefixCache, PreviousChunk, Trace
from .hopper_engines import CONFIG, Engine
from .hopper_weights import weight_bytes
from .targets import Size

NAME = "realtime-vla"
FILES = ("pi05_infer", "pi0_infer")
STEPS = 10
MOST_POSITIONS = 1024
"""Its softmax reads one block of keys; more would be left out without a word."""


class RealtimeVla:
    """The engine for one setting. `infer` takes prompts of the setting's length alone.

    graph_of is its `forward` on device tensors: five small copies into its buffers and the replay of its one graph. A
    replay alone would begin with what the last one left.
    """

    name = NAME

    def __init__(self, module: ModuleType, model: Pi, size: Size) -> None:
        positions = model.config.vision.tokens * size.views + size.prompt_tokens + size.horizon
        if positions > MOST_POSITIONS:
            raise Unsupported(f"{NAME} attends to {MOST_POSITIONS} positions", got=f"{positions} in {size.name}")
        self._model, self._size = model, size
        torch._dynamo.reset()  # its attention is compiled; a second number of views would be compiled for any number
        gc.collect()
        if model.device.type == "cuda":
            torch.cuda.synchronize()  # it captures without asking
        weights = checkpoint_of(model, prompt_tokens=size.prompt_tokens)
        with torch.no_grad():
            self._engine = module.Pi05Inference(
                weights, num_views=size.views, chunk_size=size.horizon, discrete_state_input=False
            )
        self._engine.checkpoint = None  # it keeps ours beside its own copy

    @torch.no_grad()
    def infer(
        self, inputs: ModelInputs, noise: Tensor, *, previous: PreviousChunk | None = None, spans: Spans | None = None
    ) -> Tensor:
        """See Backend.infer; no real-time chunking."""
        actions: Tensor = self._filled(inputs, noise)()
        return actions[None].float().clone()

    def graph_of(self, inputs: ModelInputs, noise: Tensor) -> Callable[[], Any]:
        """See `Whole.graph_of`."""
        return self._filled(inputs, noise)

    def _filled(self, inputs: ModelInputs, noise: Tensor) -> Callable[[], Tensor]:
        """`forward` on these inputs, which its buffers hold in its own format."""
        device, prompt = self._model.device, inputs.tokens.to(self._model.device)
        if tuple(prompt.shape) != (1, self._size.prompt_tokens):
            raise ConfigError(
                f"{NAME} was made for one prompt length", got=tuple(prompt.shape), wanted=(1, self._size.prompt_tokens)
            )
        kept: Tensor = self._engine.weights["language_embeds"]
        with torch.no_grad():
            kept.copy_(self._model.embed_prompt(prompt)[0])
        images = to_unit_range(inputs.images.to(device)[0]).permute(0, 2, 3, 1).to(kept.dtype).contiguous()
        drawn = noise.to(device)[0].to(kept.dtype)

        def forward() -> Tensor:
            with torch.no_grad():
                result: Tensor = self._engine.forward(images, drawn)
            return result

        return forward

    def prefill(self, inputs: ModelInputs, *, trace: Trace | None = None, spans: Spans | None = None) -> PrefixCache:
        """Refused: it has one graph."""
        raise Unsupported(f"{NAME} has no stage of its own for this")

    def denoise(
        self, cache: PrefixCache, noise: Tensor, *, previous: PreviousChunk | None = None, trace: Trace | None = None,
        spans: Spans | None = None,
    ) -> Tensor:  # fmt: skip
        """Refused: it has one graph."""
        raise Unsupported(f"{NAME} has no stage of its own for this")

    def look(self, images: Tensor) -> None:
        """See Backend.look: does nothing."""

    def warm_shapes(self, longest: int, *, views: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """See Backend.warm_shapes."""
        return ((self._size.views, self._size.prompt_tokens),)

    def graph_results(self) -> list[Tensor]:
        """See `Whole.graph_results`."""
        return []

    def describe(self) -> dict[str, Any]:
        """See Backend.describe."""
        return {"engine": NAME}


def make(folder: Path, model: Pi, size: Size) -> Engine:
    """The engine of this setting over our weights.

    Raises ConfigError where the folder lacks its files, Unsupported for a setting or a network that it cannot run.
    """
    if CONFIG.steps != STEPS:
        raise Unsupported(f"{NAME} has {STEPS} steps", got=CONFIG.steps)
    return Engine(NAME, None, model, RealtimeVla(load(folder), model, size), weight_bytes(model))


def load(folder: Path) -> ModuleType:
    """Its module, imported from `folder`. Raises as `require`."""
    require(folder)
    with _importing_from(folder):
        return importlib.import_module(FILES[0])


def require(folder: Path) -> None:
    """Raise ConfigError if a file of it is not in `folder`."""
    if absent := [f"{name}.py" for name in FILES if not (folder / f"{name}.py").is_file()]:
        raise ConfigError(
            f"no {NAME} there", got=f"{folder} without {', '.join(absent)}", wanted="a clone of that project",
            do="--realtime-vla FOLDER",
        )  # fmt: skip


def version(folder: Path | None) -> dict[str, dict[str, str]]:
    """{"realtime-vla": {file: its sha256}}: a clone has no version but what is in it. {} without a folder."""
    if folder is None:
        return {}
    paths = [folder / f"{name}.py" for name in FILES]
    return {NAME: {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}}


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Its modules import each other by bare names; its tokenizer's library is not needed for prompts in embeddings."""
    stub = ModuleType("transformers")
    stub.AutoTokenizer = type("AutoTokenizer", (), {})  # type: ignore[attr-defined]
    lacking = importlib.util.find_spec("transformers") is None
    if lacking:
        sys.modules["transformers"] = stub
    for name in FILES:
        sys.modules.pop(name, None)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        if lacking:
            del sys.modules["transformers"]


@torch.no_grad()
def checkpoint_of(model: Pi, *, prompt_tokens: int) -> dict[str, Tensor]:
    """Our weights as its checkpoint, on the model's device, in the prefix' dtype; see the module for its layout."""
    dtype, E = model.prefix_dtype, model.config.expert.width
    made = {**_vision(model), **_prefix(model), **_expert(model)}
    times = torch.tensor(flow.time_grid(STEPS, model.config.time_grid), device=model.device)
    made["decoder_time_embeds"] = flow.time_embedding(
        times, E, min_period=model.config.min_period, max_period=model.config.max_period, dtype=torch.float64
    )
    made["language_embeds"] = torch.zeros(prompt_tokens, model.config.prefix.width, device=model.device)
    return {name: value.to(dtype) for name, value in made.items()}


def _vision(model: Pi) -> dict[str, Tensor]:
    vision, side = model.vision, model.config.vision.patch_size
    blocks = [vision.block(index) for index in range(vision.config.layers)]
    found = {
        "vision_patch_embedding_w": vision.patch.weight.view(-1, 3, side, side).permute(2, 3, 1, 0),
        "vision_patch_embedding_b": _bias(vision.patch), "vision_position_embedding": vision.position,
        "vision_final_norm_w": vision.norm.weight, "vision_final_norm_b": vision.norm.bias,
        "encoder_multi_modal_projector_w": model.projector.weight.T,
        "encoder_multi_modal_projector_b": _bias(model.projector),
    }  # fmt: skip
    for theirs, ours in (("attn_qkv", "qkv"), ("attn_o", "o"), ("ffn_up", "fc1"), ("ffn_down", "fc2")):
        layers = [getattr(block, ours) for block in blocks]
        found[f"vision_{theirs}_w"] = torch.stack([layer.weight.T for layer in layers])
        found[f"vision_{theirs}_b"] = torch.stack([_bias(layer) for layer in layers])
    for theirs, ours in (("pre_attn_norm", "norm1"), ("pre_ffn_norm", "norm2")):
        norms = [getattr(block, ours) for block in blocks]
        found[f"vision_{theirs}_w"] = torch.stack([norm.weight for norm in norms])
        found[f"vision_{theirs}_b"] = torch.stack([norm.bias for norm in norms])
    return found


def _prefix(model: Pi) -> dict[str, Tensor]:
    stack, dtype = model.prefix, model.prefix_dtype
    heads, kv_heads, head_dim = stack.heads
    rows: dict[str, list[Tensor]] = {name: [] for name in ("attn_qkv", "attn_o", "ffn_gate", "ffn_up", "ffn_down")}
    for index in range(stack.config.layers):
        block = stack.block(index)
        absent = heads * head_dim if block.only_kv else 0
        qkv = torch.cat([block.qkv.weight.new_zeros(absent, block.qkv.weight.shape[1]), block.qkv.weight])
        rows["attn_qkv"].append(_folded(_interleaved(qkv, heads + kv_heads, head_dim), block.norm1.weight, dtype))
        if block.only_kv:
            for name in ("attn_o", "ffn_gate", "ffn_up", "ffn_down"):
                rows[name].append(torch.zeros_like(rows[name][0]))
            continue
        gate, up = block.gate_up.weight.chunk(2)
        rows["attn_o"].append(block.o.weight.T)
        rows["ffn_gate"].append(_folded(gate, block.norm2.weight, dtype))
        rows["ffn_up"].append(_folded(up, block.norm2.weight, dtype))
        rows["ffn_down"].append(block.down.weight.T)
    return {f"encoder_{name}_w": torch.stack(values) for name, values in rows.items()}


def _expert(model: Pi) -> dict[str, Tensor]:
    stack, D = model.expert, model.config.expert.width
    heads, kv_heads, head_dim = stack.heads
    blocks = [stack.block(index) for index in range(stack.config.layers)]
    gates_ups = [block.gate_up.weight.chunk(2) for block in blocks]
    weight, bias = stack.modulation.weight.view(-1, 3 * D, D), _bias(stack.modulation).view(-1, 3 * D)
    matrices = {
        "attn_qkv": [_interleaved(block.qkv.weight, heads + kv_heads, head_dim).T for block in blocks],
        "attn_o": [block.o.weight.T for block in blocks], "ffn_gate": [gate.T for gate, _ in gates_ups],
        "ffn_up": [up.T for _, up in gates_ups], "ffn_down": [block.down.weight.T for block in blocks],
        "pre_attn_norm_mod": list(weight[0:-1:2].mT), "pre_ffn_norm_mod": list(weight[1:-1:2].mT),
    }  # fmt: skip
    found = {f"decoder_{name}_w": torch.stack(values) for name, values in matrices.items()}
    found |= {"decoder_pre_attn_norm_mod_b": bias[0:-1:2], "decoder_pre_ffn_norm_mod_b": bias[1:-1:2]}
    found |= {"decoder_final_norm_mod_w": weight[-1].T, "decoder_final_norm_mod_b": bias[-1]}
    for theirs, layer in (
        ("time_mlp_in", model.time_in), ("time_mlp_out", model.time_out),
        ("action_in_proj", model.action_in), ("action_out_proj", model.action_out),
    ):  # fmt: skip
        found |= {f"decoder_{theirs}_w": layer.weight.T, f"decoder_{theirs}_b": _bias(layer)}
    return found


def _interleaved(weight: Tensor, heads: int, head_dim: int) -> Tensor:
    """Rows of the first `heads` heads from two halves to pairs: 0, d/2, 1, d/2 + 1, ...  [rows, in] -> the same."""
    turned, rest = weight[: heads * head_dim], weight[heads * head_dim :]
    pairs = turned.view(heads, 2, head_dim // 2, -1).transpose(1, 2).reshape(heads * head_dim, -1)
    return torch.cat([pairs, rest])


def _folded(weight: Tensor, gain: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[out, in] -> [in, out] with the norm's gain in front of it."""
    assert gain is not None
    return (weight.float() * (1.0 + gain.float())).T.to(dtype)


def _bias(layer: Linear) -> Tensor:
    assert layer.bias is not None, layer.name
    return layer.bias
