"""The four networks of a policy, written by running the model's own methods on symbols (`symbols`).

    vision   images [V, 3, s, s]                              -> tokens [V, 256, D]
    prefix   embeds [B, S, D], mask, cos, sin (pi0: state)    -> k.i, v.i [B, S, K, d] of every layer
    step     x [B, H, 32], mask, cos, sin, k.i, v.i, modulation [norms, 1 or H, 3E] (pi0: bias [1 or H, E]) -> velocity
    loop     the same for all steps: modulation [steps + 1, norms, 3E] (pi0: bias)                          -> actions

Shapes are static. What depends on the request is an input: `mask` is float32 [B, S], 0 where a key may be seen and the
reference's "minus infinity" elsewhere; cos and sin [B, T, d/2] are rows of the rotary table. The prompt's embedding (a
look-up in a table of a gigabyte) and everything that depends on flow time alone stay outside, in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ...errors import ConfigError
from ...model import flow
from ...model.pi import Pi, RopeTables, StepCondition, SuffixContext, TimeTable
from ...types import PrefixCache
from .module import Definition, Module
from .operations import GivenRows, writing_ops
from .symbols import Sym, Writer

Part = Literal["vision", "prefix", "step", "loop"]
PARTS: tuple[Part, ...] = ("vision", "prefix", "step", "loop")


@dataclass(frozen=True)
class Shapes:
    """The static sizes of one network.

    batch  requests; vision: views of all requests together
    keys   prefix tokens S that `prefix` makes and `step` reads (pi0: `step` reads one more)
    rows   1, or H where committed actions carry a flow time of their own
    steps  of `loop`
    """

    batch: int = 1
    keys: int = 0
    rows: int = 1
    steps: int = 0


@dataclass(frozen=True)
class Network:
    """One network definition and what TensorRT does not tell about it.

    parameters  names of the model's parameters that it uses, as inputs or constants of the same name
    constants   {constant layer: numbers}
    owner       keeps builder and logger alive, whose memory the definition uses
    """

    part: Part
    module: Module
    shapes: Shapes
    definition: Definition
    parameters: list[str]
    constants: dict[str, Tensor]
    outlined: Pi
    baked: bool
    owner: Any

    @property
    def label(self) -> str:
        """For people: "prefix, 968 tokens"."""
        shapes, batch = self.shapes, f", batch {self.shapes.batch}" if self.shapes.batch > 1 else ""
        if self.part == "vision":
            return f"vision, {shapes.batch} views"
        more = {"prefix": "", "step": f", {shapes.rows} times" if shapes.rows > 1 else ""}
        return f"{self.part}, {shapes.keys} tokens{more.get(self.part, f', {shapes.steps} steps')}{batch}"


def write(
    part: Part, outlined: Pi, module: Module, shapes: Shapes, *, numbers: Mapping[str, Tensor] | None = None,
    baked: bool = False, fused: bool = False,
) -> Network:  # fmt: skip
    """Write one network.

    outlined  from `skeleton.outline`: says what the network is, in which types
    numbers   {parameter: numbers}; needed for what is stored in the network
    baked     every parameter is stored; otherwise every one is an input (full TensorRT: but the scales, which it wants
              at build time)
    fused     attention and rotation as TensorRT's own layers. Raises ConfigError where the module has none
    """
    if fused and not (module.offers("attention") and module.offers("rotary_embedding")):
        raise ConfigError("this TensorRT has no fused attention", got=module.label, do="leave fused layers off")
    owner = _Owner(module)
    names = {id(parameter): name for name, parameter in outlined.named_parameters()}
    given = _Given(names, numbers or {}, baked)
    writer = Writer(module, owner.definition, given, said=owner.log.messages)
    with torch.no_grad():
        _WRITERS[part](outlined, writer, shapes, fused)
    return Network(part, module, shapes, owner.definition, given.used, writer.constants, outlined, baked, owner)


class _Owner:
    """Builder, logger and definition: C++ objects that must die together."""

    def __init__(self, module: Module) -> None:
        from .build import Log

        self.log = Log.of(module)
        self.builder = module.api.Builder(self.log)
        self.definition = self.builder.create_network(module.strongly_typed)


class _Given:
    """Parameters of the outline as values of the network; a view of one (pi0's half of a linear) is cut from it."""

    def __init__(self, names: dict[int, str], numbers: Mapping[str, Tensor], baked: bool) -> None:
        self._names, self._numbers, self._baked = names, numbers, baked
        self.used: list[str] = []

    def value(self, writer: Writer, parameter: Tensor) -> Sym:
        """The parameter as a value, the same each time."""
        if id(parameter) not in self._names:
            return writer.slice(self.value(writer, _whole(parameter)), 1, 0, parameter.shape[1])
        name = self._names[id(parameter)]
        if name not in writer.known:
            writer.known[name] = self._new(writer, name, parameter)
            self.used.append(name)
        return writer.known[name]

    def name(self, parameter: Tensor) -> str:
        """Its path in the model; a view has the name of its whole."""
        return self._names[id(parameter if id(parameter) in self._names else _whole(parameter))]

    def _new(self, writer: Writer, name: str, parameter: Tensor) -> Sym:
        early = name.endswith("_scale") and not writer.module.is_rtx  # "must be a build-time constant"
        if not (self._baked or early):
            return writer.input(name, parameter.dtype, parameter.shape)
        if name not in self._numbers:
            raise ConfigError(
                f"{writer.module.label} needs {name} when it builds", do="give the loaded model's numbers"
            )
        return writer.constant(self._numbers[name], name=name)


def _whole(view: Tensor) -> Tensor:
    whole = view._base
    assert whole is not None, "not a parameter of the outline"
    assert view.storage_offset() == 0, "only leading columns are used"
    return whole


def _outlined(outlined: Pi, writer: Writer, shapes: Shapes, mask: Sym | None, fused: bool) -> Pi:
    outlined.ops = writing_ops(writer, batch=shapes.batch, mask=mask, fused=fused)
    return outlined


def _vision(outlined: Pi, writer: Writer, shapes: Shapes, fused: bool) -> None:
    size = outlined.config.vision.image_size
    images = writer.input("images", torch.float32, (shapes.batch, 3, size, size))
    model = _outlined(outlined, writer, shapes, None, fused)
    one = cast(Any, images).unflatten(0, (shapes.batch, 1))
    writer.output("tokens", cast(Any, model.embed_views(one)))


def _prefix(outlined: Pi, writer: Writer, shapes: Shapes, fused: bool) -> None:
    config, B, S = outlined.config, shapes.batch, shapes.keys
    embeds = writer.input("embeds", outlined.prefix_dtype, (B, S, config.prefix.width))
    mask = writer.input("mask", torch.float32, (B, S))
    prefix = _rope(writer, "", outlined.prefix_dtype, (B, S, config.prefix.head_dim // 2))
    state = suffix = None
    if config.kind == "pi0":
        state = writer.input("state", torch.float32, (B, config.action_width))
        suffix = _rope(writer, "state_", outlined.suffix_dtype, (B, 1, config.expert.head_dim // 2))
    model = _outlined(outlined, writer, shapes, mask, fused)
    tables = RopeTables(prefix, suffix if suffix is not None else prefix)
    cache = model.prefill(cast(Any, embeds), None, state=cast(Any, state), tables=tables)
    for index, (k, v) in enumerate(zip(cache.k, cache.v, strict=True)):
        writer.output(f"k.{index}", cast(Any, k))
        writer.output(f"v.{index}", cast(Any, v))


def _step(outlined: Pi, writer: Writer, shapes: Shapes, fused: bool) -> None:
    model, x, cache, context = _suffix(outlined, writer, shapes, fused)
    condition = StepCondition(*cast(Any, _timed(outlined, writer, (shapes.rows,), per_norm=(0,))))
    writer.output("velocity", cast(Any, model.denoise_step(cast(Any, x), condition, cache, context)))


def _loop(outlined: Pi, writer: Writer, shapes: Shapes, fused: bool) -> None:
    model, x, cache, context = _suffix(outlined, writer, shapes, fused)
    times = flow.time_grid(shapes.steps, outlined.config.time_grid)
    table = TimeTable(tuple(times), *cast(Any, _timed(outlined, writer, (shapes.steps + 1,), per_norm=(1,))))
    if outlined.config.kind == "pi05":
        actions = model.denoise_chunk(cast(Any, x), table, cache, context)
    else:
        actions = flow.sample(
            lambda now, step: model.denoise_step(now, table.at(step), cache, context), cast(Any, x), times
        )
    writer.output("actions", cast(Any, actions))


def _suffix(outlined: Pi, writer: Writer, shapes: Shapes, fused: bool) -> tuple[Pi, Sym, PrefixCache, SuffixContext]:
    """What a step and the loop share: noisy actions, keys and values, rotary rows, mask."""
    config, B, H = outlined.config, shapes.batch, outlined.config.horizon
    S = shapes.keys + (config.kind == "pi0")
    heads, dtype = (B, S, config.prefix.num_kv_heads, config.prefix.head_dim), outlined.prefix_dtype
    x = writer.input("x", torch.float32, (B, H, config.action_width))
    mask = writer.input("mask", torch.float32, (B, S))
    rope = _rope(writer, "", outlined.suffix_dtype, (B, H, config.expert.head_dim // 2))
    k, v = (
        tuple(writer.input(f"{letter}.{index}", dtype, heads) for index in range(config.prefix.layers))
        for letter in "kv"
    )
    cache = PrefixCache(k=cast(Any, k), v=cast(Any, v), length=torch.zeros(B, device="meta"))
    rows = tuple(table[None, slice(0, H)] for table in rope)
    return _outlined(outlined, writer, shapes, mask, fused), x, cache, SuffixContext(cast(Any, rows), None)


def _timed(outlined: Pi, writer: Writer, rows: tuple[int], *, per_norm: tuple[int]) -> tuple[Sym | None, Sym | None]:
    """(modulation, bias) as inputs.  per_norm: the axis of the modulation that counts norms."""
    config, E = outlined.config, outlined.config.expert.width
    if config.kind == "pi0":
        return None, writer.input("bias", torch.float32, (*rows, E))
    shape = list(rows)
    shape.insert(per_norm[0], 2 * config.expert.layers + 1)
    return writer.input("modulation", torch.float32, (*shape, 3 * E)), None


def _rope(writer: Writer, prefix: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> GivenRows:
    return GivenRows(writer.input(f"{prefix}cos", dtype, shape), writer.input(f"{prefix}sin", dtype, shape))


_WRITERS: dict[Part, Callable[[Pi, Writer, Shapes, bool], None]] = {
    "vision": _vision, "prefix": _prefix, "step": _step, "loop": _loop,
}  # fmt: skip
