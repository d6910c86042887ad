"""Does the network that will be built run every matrix product in the type that the plan says? Read from the definition.

For each MatrixMultiply both operands are followed back through layers that only reshape. A product is E4M3 (INT8) when
both come out of a DequantizeLinear with a float32 scale whose own input is E4M3 (INT8): one side quantised on the way in
under one scale, the other a stored weight with a scale per output channel, neither with a zero point. Anything else runs in
the type of its operands. Types are binding in a strongly typed network, so what is written here is what is built.

A product says in its name which linear it is. That label is not believed: the inputs and constants that its weight and
scales come from are, by their names, under which their numbers are given. They must be this linear's own.

Every mismatch is an error: a layer in another type than the plan or the checkpoint's flavour says, operands that differ, a
weight or scale of another layer, a product that is missing, one that nobody asked for. `record` fills the table that the
Triton engine reports in too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from ...errors import NumericsError
from ...model.pi import Pi
from ...ops.layers import Linear, QuantisedLinear
from ...precision.coverage import Coverage, Seen
from ...precision.plan import Format
from ...precision.quantize import HOLDERS
from .evaluate import torch_dtype, walk
from .module import Definition
from .networks import Network, Part

Makers: TypeAlias = Mapping[str, tuple[str, Any]]
"""{tensor: (kind of the layer that makes it, the layer)}."""

FormatOf: TypeAlias = Callable[[str], Format]
"""Name of a linear -> the format in which it shall run."""

EIGHT_BITS: dict[torch.dtype, Format] = {holder.stored: name for name, holder in HOLDERS.items()}
MOVES = ("SHUFFLE", "IDENTITY", "SLICE")
ATTENTION = ("attention_scores", "attention_mix", "attention")


@dataclass(frozen=True)
class Product:
    """One matrix product of a network.

    layer      the linear, or for the two products of attention the linear that reads their result
    precision  "e4m3", "int8", "float16", ... or what is wrong with its operands
    reads      inputs and constants that its weight, its weight's scale and its input's scale come from, in this order
    """

    layer: str
    operation: str
    precision: str
    flops: float
    moved_bytes: float
    reads: tuple[str, ...] = ()

    @property
    def is_attention(self) -> bool:
        """Whether it has no weights."""
        return self.operation in ATTENTION


def products(network: Network) -> tuple[Product, ...]:
    """Every matrix product, in the order of the definition."""
    api = network.module.api
    layers = list(walk(network.definition, api))
    makers = {layer.get_output(0).name: (kind, layer) for kind, layer in layers}
    found = []
    for kind, layer in layers:
        if kind not in ("MATRIX_MULTIPLY", "ATTENTION_INPUT"):
            continue
        operation, _, rest = layer.name.rpartition(" #")[0].partition("|")
        operands = [layer.get_input(index) for index in range(2)]
        precision = _precision([_source(tensor, makers) for tensor in operands], makers)
        moved = _bytes([*operands, layer.get_output(0)], precision)
        reads = () if operation in ATTENTION else _reads(operands, makers)
        found.append(Product(rest, operation, precision, _flops(kind, operands), moved, reads))
    return tuple(found)


def check(network: Network, format_of: FormatOf) -> tuple[Product, ...]:
    """The products, if each is what the plan says. Raises NumericsError naming every one that is not.

    format_of  the plan's: `PrecisionPlan.format_of`
    """
    found = products(network)
    if problems := mismatches(network, found, format_of):
        raise NumericsError(
            f"{network.label} would not run as planned", got="; ".join(problems[:6]),
            wanted="every matrix product as the plan says",
            do="give the plan that the model was quantised by; if that was done, report this: it is a fault of vivace",
        )  # fmt: skip
    return found


def mismatches(network: Network, found: Sequence[Product], format_of: FormatOf) -> list[str]:
    """One line per product that differs from the plan, reads another layer's numbers, is missing, or is one too many."""
    problems = []
    paths = {
        layer.name: path
        for path, layer in network.outlined.named_modules()
        if isinstance(layer, Linear | QuantisedLinear)
    }
    wanted = {layer.name: layer for layer in network.outlined.modules() if isinstance(layer, Linear | QuantisedLinear)}
    for product in found:
        layer = wanted.get(product.layer)
        planned: str = "no product"
        if layer is not None:
            planned = format_of(product.layer)
            if product.is_attention:
                planned = _name(_compute(network, product.layer))
            elif planned == "keep":
                planned = _name(layer.dtype)
        if product.precision != planned:
            problems.append(f"{product.layer} {product.operation} in {product.precision}, planned {planned}")
        own = () if layer is None or product.is_attention else _parameters(paths[product.layer], planned)
        if layer is not None and product.reads != own:
            problems.append(
                f"{product.layer} {product.operation} reads {_list(product.reads)}, its own are {_list(own)}"
            )
    counts = Counter(product.layer for product in found if not product.is_attention)
    times = network.shapes.steps if network.part == "loop" else 1
    expected = dict.fromkeys(linears(network.part, network.outlined), times)
    for name in sorted(expected.keys() | counts.keys()):
        if counts[name] != expected.get(name, 0):
            problems.append(f"{name}: {counts[name]} products, wanted {expected.get(name, 0)}")
    return problems


def _parameters(path: str, precision: str) -> tuple[str, ...]:
    """What a product of the linear at `path` must read, as in `Product.reads`."""
    names = ("weight", "weight_scale", "input_scale") if precision in EIGHT_BITS.values() else ("weight",)
    return tuple(f"{path}.{name}" for name in names)


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) or "nothing"


def linears(part: Part, outlined: Pi) -> Iterator[str]:
    """Names of the linears that a network of this part must contain."""
    for layer in outlined.modules():
        if isinstance(layer, Linear | QuantisedLinear) and _belongs(layer.name, part, outlined):
            yield layer.name


def _belongs(name: str, part: Part, outlined: Pi) -> bool:
    config = outlined.config
    if part == "vision":
        return name.startswith(("vision.", "projector"))
    if part != "prefix":
        return _block(name) or name.startswith("action_")
    if config.kind == "pi0" and _block(name):  # the state token: of the last layer only keys and values
        last = f"expert.layers.{config.expert.layers - 1}."
        return not name.startswith(last) or name == f"{last}attn.qkv"
    return name.startswith("prefix.") or (config.kind == "pi0" and name == "state")


def record(seen: Coverage, found: Sequence[Product], *, part: Part, kernel: str) -> None:
    """Add the products of one network to a coverage table; attention's two products are one operation there."""
    fresh: dict[tuple[str, str], Seen] = {}
    for product in found:
        if part == "prefix" and not product.layer.startswith("prefix."):
            continue  # pi0's single state token
        operation = "attention" if product.is_attention else product.operation
        entry = fresh.setdefault((product.layer, operation), Seen())
        first = product.operation != "attention_mix"
        entry.calls += first
        entry.kernels.add(kernel)
        entry.precisions.add(product.precision)
        if entry.calls <= 1:  # a loop repeats its step; the table counts steps itself
            entry.flops += product.flops
            entry.moved_bytes += product.moved_bytes
    seen.seen.update(fresh)


# --- how an operand came about --------------------------------------------------------------------------------------


def _source(tensor: Definition, makers: Makers, *, through: Sequence[str] = MOVES) -> Definition:
    """The tensor before layers that only move values."""
    while tensor.name in makers and makers[tensor.name][0] in through:
        tensor = makers[tensor.name][1].get_input(0)
    return tensor


def _reads(operands: Sequence[Definition], makers: Makers) -> tuple[str, ...]:
    """See `Product.reads`."""
    found: list[str] = []
    for operand in (operands[1], operands[0]):
        source = _source(operand, makers)
        kind, layer = makers.get(source.name, ("INPUT", None))
        if kind == "DEQUANTIZE" and operand is operands[1]:
            found += [_origin(layer.get_input(0), makers), _origin(layer.get_input(1), makers)]
        elif kind == "DEQUANTIZE":
            found += [_origin(layer.get_input(1), makers)]
        elif operand is operands[1]:
            found += [_origin(source, makers)]
    return tuple(found)


def _origin(tensor: Definition, makers: Makers) -> str:
    """Name of the input or constant that holds a tensor's numbers; of what computed it, if it is neither."""
    source = _source(tensor, makers, through=(*MOVES, "CAST"))
    kind, layer = makers.get(source.name, ("INPUT", None))
    if kind == "INPUT":
        return str(source.name)
    name = str(layer.name).rpartition(" #")[0]
    return name if kind == "CONSTANT" else f"the result of {name}"


def _precision(sources: Sequence[Definition], makers: Makers) -> str:
    sides = [_side(source, makers) for source in sources]
    for name in EIGHT_BITS.values():
        if sides == [f"{name} value", f"{name} weight"]:
            return name
    return sides[0] if sides[0] == sides[1] else " x ".join(sides)


def _side(tensor: Definition, makers: Makers) -> str:
    kind, layer = makers.get(tensor.name, ("INPUT", None))
    if kind != "DEQUANTIZE" or layer is None:
        return _name(torch_dtype(tensor))
    stored, scale = _source(layer.get_input(0), makers), layer.get_input(1)
    name = EIGHT_BITS.get(torch_dtype(stored))
    if name is None or torch_dtype(scale) != torch.float32 or layer.num_inputs != 2:
        return f"{stored.dtype.name} under a {scale.dtype.name} scale"
    maker = makers.get(stored.name, ("INPUT", None))
    if maker[0] == "QUANTIZE":
        used = maker[1].get_input(1)
        same = used.name == scale.name and not tuple(scale.shape) and maker[1].num_inputs == 2
        return f"{name} value" if same else f"{name} value under two scales"
    per_channel = tuple(scale.shape) == (stored.shape[0],) and layer.axis == 0
    return f"{name} weight" if maker[0] in ("INPUT", "CONSTANT") and per_channel else f"{name} weight, scale misplaced"


def _flops(kind: str, operands: Sequence[Definition]) -> float:
    first, second = (tuple(int(size) for size in tensor.shape) for tensor in operands)
    if kind == "ATTENTION_INPUT":  # scores and mix: [B, N, T, d] with [B, K, keys, d]
        return 4.0 * math.prod(first) * second[2]
    columns = math.prod(second) // (math.prod(second[:-2]) * first[-1])
    return 2.0 * math.prod(first) * columns


def _bytes(tensors: Sequence[Definition], precision: str) -> float:
    sizes = [torch_dtype(tensor).itemsize for tensor in tensors]
    if precision in EIGHT_BITS.values():
        sizes[:2] = [1, 1]
    return float(sum(math.prod(tuple(t.shape)) * size for t, size in zip(tensors, sizes, strict=True)))


def _compute(network: Network, reader: str) -> torch.dtype:
    """Type of attention in the stack that `reader` belongs to."""
    outlined = network.outlined
    if reader.startswith("vision."):
        return outlined.vision.norm.weight.dtype
    return outlined.prefix_dtype if reader.startswith("prefix.") else outlined.suffix_dtype


def _block(name: str) -> bool:
    return name.startswith("expert.layers.")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
