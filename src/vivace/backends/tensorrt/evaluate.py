"""Computes a network definition in torch, layer by layer, without TensorRT's run time and without a GPU.

What is walked is the definition that would be built: its layers, their inputs, attributes and types, as the module hands
them back. Nothing is taken from the code that wrote it, except the numbers of constants, which TensorRT does not give back
in FP8 and BF16. So a wrong axis, a missing mask or a swapped scale in the definition is a wrong number here.

Numerics: every layer computes in float32 and rounds its result once to the type that the definition declares; E4M3
and INT8 saturate. Real kernels fuse layers and so round less often: this is a model of the definition, not of a kernel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import NumericsError, ShapeError
from ...ops.reference import round_to
from .module import Definition
from .networks import Network

Layer: TypeAlias = Any
Declared: TypeAlias = tuple[tuple[int, ...], torch.dtype]
Rule: TypeAlias = Callable[[Layer, Sequence[Tensor]], Tensor]

ATTENTION: dict[str, str] = {
    "norm_op": "SOFTMAX", "causal": "False", "causal_kind": "NONE", "query_form": "PADDED_BHND",
    "key_value_form": "PADDED_BHND", "query_lengths": "None", "key_value_lengths": "None",
    "normalization_quantize_scale": "None",
}  # fmt: skip
"""Attributes of the attention that the rule computes; one without lengths or a scale has no such fact."""


@dataclass(frozen=True)
class Step:
    """One layer, looked at once: what it reads and writes, and what it declares about its result."""

    kind: str
    layer: Layer
    reads: tuple[str, ...]
    writes: str
    declared: Declared


@dataclass(frozen=True)
class Walked:
    """A definition, walked: {input: (shape, dtype)}, its layers in order, names of its outputs."""

    inputs: Mapping[str, Declared]
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]


def run(
    network: Network, feeds: Mapping[str, Tensor], *, numbers: Mapping[str, Tensor] | None = None,
    walked: Walked | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Outputs of `network` for these inputs.

    feeds    {input: tensor} of the request
    numbers  {parameter: tensor} for weights that are inputs
    walked   from `look`, where one network is run often
    Raises   ShapeError if an input is missing or differs from its declaration in shape or type.
    """
    given = {**feeds, **{name: numbers[name] for name in network.parameters if numbers and name in numbers}}
    return evaluate(walked or look(network.definition, network.module.api), given, network.constants)


def look(definition: Definition, api: Any) -> Walked:
    """Walk a definition once."""
    inputs = [definition.get_input(index) for index in range(definition.num_inputs)]
    outputs = tuple(definition.get_output(index).name for index in range(definition.num_outputs))
    steps = []
    for kind, layer in walk(definition, api):
        if kind != "CONSTANT" and kind not in RULES:
            raise ShapeError("a layer that the evaluator has no rule for", got=f"{kind} {layer.name}")
        _refuse(kind, layer)
        out = layer.get_output(0)
        steps.append(Step(kind, layer, tuple(inputs_of(layer)), out.name, declared(out)))
    return Walked({tensor.name: declared(tensor) for tensor in inputs}, tuple(steps), outputs)


def evaluate(walked: Walked, feeds: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """See `run`.  constants: {constant layer: its numbers}."""
    values = {name: _checked(name, feeds, wanted) for name, wanted in walked.inputs.items()}
    left = Counter(name for step in walked.steps for name in step.reads)
    for step in walked.steps:
        if step.kind == "CONSTANT":
            result = constants[step.layer.name]
        else:
            result = RULES[step.kind](step.layer, [values[name] for name in step.reads])
        shape, dtype = step.declared
        if tuple(result.shape) != shape:
            raise NumericsError(f"{step.writes} has another shape than declared", got=result.shape, wanted=shape)
        values[step.writes] = result.to(dtype)
        left.subtract(step.reads)
        for name in set(step.reads):
            if left[name] == 0 and name not in walked.outputs:
                del values[name]
    return {name: values[name] for name in walked.outputs}


def _checked(name: str, feeds: Mapping[str, Tensor], wanted: Declared) -> Tensor:
    if name not in feeds:
        raise ShapeError("an input of the network was not given", got=sorted(feeds)[:8], wanted=name)
    got = (tuple(feeds[name].shape), feeds[name].dtype)
    if got != wanted:
        raise ShapeError(f"input {name} is not what the network declares", got=got, wanted=wanted)
    return feeds[name]


def walk(definition: Definition, api: Any) -> Iterator[tuple[str, Layer]]:
    """(kind, layer with its own attributes) in the order in which they were added; plain ILayers are what one is given."""
    for index in range(definition.num_layers):
        layer = definition.get_layer(index)
        kind = api.ILayer.type.__get__(layer).name  # an activation hides the kind of layer behind its own `type`
        if kind in CLASSES:
            layer.__class__ = getattr(api, CLASSES[kind])
        yield kind, layer


def inputs_of(layer: Layer) -> list[str]:
    """Names of the tensors that a layer reads."""
    found = (layer.get_input(index) for index in range(layer.num_inputs))
    return [tensor.name for tensor in found if tensor is not None]


def fused_facts(kind: str, layer: Layer) -> dict[str, str]:
    """What a fused layer is told beside its tensors, {attribute: value}; {} for every other kind.

    An attribute that came with a later TensorRT is left out where the module does not know it.
    """
    if kind == "ROTARY_EMBEDDING":
        return {"interleaved": str(layer.interleaved), "rotary_embedding_dim": str(layer.rotary_embedding_dim)}
    if kind != "ATTENTION_INPUT":
        return {}
    attention = layer.attention
    found = {name: getattr(attention, name, None) for name in (*ATTENTION, "decomposable")}
    return {name: str(getattr(value, "name", value)) for name, value in found.items() if value is not None}


def _refuse(kind: str, layer: Layer) -> None:
    """Raises ShapeError for a fused layer that does something else than the rule computes."""
    facts = fused_facts(kind, layer)
    if not facts:
        return
    if kind == "ROTARY_EMBEDDING":
        whole = ("0", str(layer.get_output(0).shape[-1]))
        wrong = facts["interleaved"] != "False" or facts["rotary_embedding_dim"] not in whole or layer.num_inputs != 3
        wanted = f"interleaved False, rotary_embedding_dim {' or '.join(whole)}, no position ids"
    else:
        wrong = any(facts.get(name, value) != value for name, value in ATTENTION.items())
        wrong = wrong or (layer.num_inputs > 3 and torch_dtype(layer.get_input(3)) != torch.bool)
        wanted = ", ".join(f"{name} {value}" for name, value in ATTENTION.items()) + ", a mask of booleans"
    if wrong:
        raise ShapeError(f"{layer.name} does what the evaluator does not compute", got=facts, wanted=wanted)


def torch_dtype(tensor: Definition) -> torch.dtype:
    """The declared type of a tensor."""
    return {
        "FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "FP8": torch.float8_e4m3fn,
        "INT8": torch.int8, "BOOL": torch.bool, "INT32": torch.int32, "INT64": torch.int64,
    }[tensor.dtype.name]  # fmt: skip


def declared(tensor: Definition) -> Declared:
    """Shape and type of a tensor as the definition says."""
    return tuple(tensor.shape), torch_dtype(tensor)


# --- one rule per kind of layer -------------------------------------------------------------------------------------


def _elementwise(layer: Layer, inputs: Sequence[Tensor]) -> Tensor:
    first, second = (value.float() for value in inputs)
    operation = layer.op.name
    if operation == "GREATER":
        return first > second
    known: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "SUM": torch.add, "PROD": torch.mul, "SUB": torch.sub, "DIV": torch.div,
        "MIN": torch.minimum, "MAX": torch.maximum,
    }  # fmt: skip
    return known[operation](first, second)


def _unary(layer: Layer, inputs: Sequence[Tensor]) -> Tensor:
    known: dict[str, Callable[[Tensor], Tensor]] = {
        "SQRT": torch.sqrt, "RECIP": torch.reciprocal, "EXP": torch.exp, "NEG": torch.neg, "ABS": torch.abs,
    }  # fmt: skip
    return known[layer.op.name](inputs[0].float())


def _activation(layer: Layer, inputs: Sequence[Tensor]) -> Tensor:
    x, kind = inputs[0].float(), layer.type.name
    if kind == "GELU_TANH":
        return functional.gelu(x, approximate="tanh")
    known: dict[str, Callable[[Tensor], Tensor]] = {"SIGMOID": torch.sigmoid, "TANH": torch.tanh, "RELU": torch.relu}
    return known[kind](x)


def _reduce(layer: Layer, inputs: Sequence[Tensor]) -> Tensor:
    x = inputs[0].float()
    axes = [axis for axis in range(x.dim()) if layer.axes >> axis & 1]
    known: dict[str, Callable[..., Tensor]] = {
        "AVG": torch.mean,
        "SUM": torch.sum,
        "MAX": torch.amax,
        "MIN": torch.amin,
    }
    return known[layer.op.name](x, dim=axes, keepdim=layer.keep_dims)


def _softmax(layer: Layer, inputs: Sequence[Tensor]) -> Tensor:
    axis = int(layer.axes).bit_length() - 1
    return torch.softmax(inputs[0].float(), dim=axis)


def _slice(layer: Layer, inputs: Sequence[Tensor]) -> Tensor:
    sizes = zip(layer.start, layer.shape, layer.stride, strict=True)
    return inputs[0][tuple(slice(start, start + (count - 1) * step + 1, step) for start, count, step in sizes)]


def _shuffle(layer: Layer, inputs: Sequence[Tensor]) -> Tensor:
    x = inputs[0]
    x = x.permute(tuple(layer.first_transpose)[: x.dim()])
    shape = tuple(layer.get_output(0).shape)
    second = tuple(layer.second_transpose)[: len(shape)]
    before = [0] * len(shape)
    for position, axis in enumerate(second):
        before[axis] = shape[position]
    turned: Tensor = x.reshape(before).permute(second)
    return turned


def _concatenation(layer: Layer, inputs: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(inputs), dim=layer.axis)


def _matmul(layer: Layer, inputs: Sequence[Tensor]) -> Tensor:
    sides = zip(inputs, (layer.op0, layer.op1), strict=True)
    first, second = (x.float().mT if op.name == "TRANSPOSE" else x.float() for x, op in sides)
    return torch.matmul(first, second)


def _along(scale: Tensor, x: Tensor, axis: int) -> Tensor:
    if scale.dim() == 0:
        return scale
    shape = [1] * x.dim()
    shape[axis] = -1
    return scale.reshape(shape)


def _quantize(layer: Layer, inputs: Sequence[Tensor]) -> Tensor:
    x, scale = inputs[0].float(), inputs[1].float()
    rounded: Tensor = round_to(x / _along(scale, x, layer.axis), torch_dtype(layer.get_output(0)))
    return rounded


def _dequantize(layer: Layer, inputs: Sequence[Tensor]) -> Tensor:
    x, scale = inputs[0].float(), inputs[1].float()
    wide: Tensor = x * _along(scale, x, layer.axis)
    return wide


def _gather(layer: Layer, inputs: Sequence[Tensor]) -> Tensor:
    table, rows = inputs
    picked = torch.index_select(table, layer.axis, rows.long().flatten())
    found: Tensor = picked.unflatten(layer.axis, rows.shape)
    return found


def _select(_layer: Layer, inputs: Sequence[Tensor]) -> Tensor:
    condition, first, second = inputs
    return torch.where(condition, first, second)


def _attention(_layer: Layer, inputs: Sequence[Tensor]) -> Tensor:
    """TensorRT's attention: softmax(q k^T) v without any scale of its own; a key/value head serves several query heads."""
    q, k, v = (value.float() for value in inputs[:3])
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, dim=1).mT
    if len(inputs) > 3:
        scores = scores.masked_fill(~inputs[3], float("-inf"))
    mixed: Tensor = torch.softmax(scores, dim=-1) @ v.repeat_interleave(group, dim=1)
    return mixed


def _rotary(_layer: Layer, inputs: Sequence[Tensor]) -> Tensor:
    """TensorRT's rotary embedding, half-split.  x [B, N, T, d]; cos, sin [B, T, d/2]."""
    x, cos, sin = (value.float() for value in inputs)
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _same(_layer: Layer, inputs: Sequence[Tensor]) -> Tensor:
    return inputs[0]


RULES: dict[str, Rule] = {
    "CAST": _same, "IDENTITY": _same, "ELEMENTWISE": _elementwise, "UNARY": _unary, "ACTIVATION": _activation,
    "REDUCE": _reduce, "SOFTMAX": _softmax, "SLICE": _slice, "SHUFFLE": _shuffle, "CONCATENATION": _concatenation,
    "ATTENTION_INPUT": _attention, "ATTENTION_OUTPUT": _same, "ROTARY_EMBEDDING": _rotary,
    "MATRIX_MULTIPLY": _matmul, "QUANTIZE": _quantize, "DEQUANTIZE": _dequantize, "GATHER": _gather, "SELECT": _select,
}  # fmt: skip
CLASSES: dict[str, str] = {
    "CONSTANT": "IConstantLayer", "CAST": "ICastLayer", "IDENTITY": "IIdentityLayer", "ELEMENTWISE": "IElementWiseLayer",
    "UNARY": "IUnaryLayer", "ACTIVATION": "IActivationLayer", "REDUCE": "IReduceLayer", "SOFTMAX": "ISoftMaxLayer",
    "SLICE": "ISliceLayer", "SHUFFLE": "IShuffleLayer", "CONCATENATION": "IConcatenationLayer",
    "MATRIX_MULTIPLY": "IMatrixMultiplyLayer", "QUANTIZE": "IQuantizeLayer", "DEQUANTIZE": "IDequantizeLayer",
    "GATHER": "IGatherLayer", "SELECT": "ISelectLayer", "ATTENTION_INPUT": "IAttentionInputLayer",
    "ROTARY_EMBEDDING": "IRotaryEmbeddingLayer",
}  # fmt: skip
