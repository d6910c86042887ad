"""Computes a network definition in torch, layer by layer, without TensorRT's run time and without a GPU.

What is walked is the definition that would be built: its layers, their inputs, attributes and types, as the module hands
them back. Nothing is taken from the code that wrote it, except the numbers of constants, which TensorRT does not give back
in FP8 and BF16. So a wrong axis, a missing mask or a swapped scale in the definition is a wrong number here.

Numerics: every layer computes in float32 and rounds its result once to the type that the definition declares; E4M3
saturates. Real kernels fuse layers and so round less often: this is a model of the definition, not of a kernel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import NumericsError, ShapeError
from ...ops.reference import E4M3_MAX
from .module import Definition
from .networks import Network

Layer: TypeAlias = Any
Rule: TypeAlias = Callable[[Layer, Sequence[Tensor]], Tensor]


def run(
    network: Network, feeds: Mapping[str, Tensor], *, numbers: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Outputs of `network` for these inputs.

    feeds    {input: tensor} of the request
    numbers  {parameter: tensor} for weights that are inputs
    Raises   ShapeError if an input is missing or differs from its declaration in shape or type.
    """
    given = {**feeds, **{name: numbers[name] for name in network.parameters if numbers and name in numbers}}
    return evaluate(network.definition, given, network.constants, network.module.api)


def evaluate(
    definition: Definition, feeds: Mapping[str, Tensor], constants: Mapping[str, Tensor], api: Any
) -> dict[str, Tensor]:
    """See `run`.  constants: {constant layer: its numbers}."""
    values: dict[str, Tensor] = {}
    for index in range(definition.num_inputs):
        tensor = definition.get_input(index)
        if tensor.name not in feeds:
            raise ShapeError("an input of the network was not given", got=sorted(feeds)[:8], wanted=tensor.name)
        values[tensor.name] = _declared(tensor, feeds[tensor.name], f"input {tensor.name}")
    outputs = {definition.get_output(index).name for index in range(definition.num_outputs)}
    layers = list(walk(definition, api))
    left = Counter(name for _, layer in layers for name in inputs_of(layer))
    for kind, layer in layers:
        names = inputs_of(layer)
        if kind == "CONSTANT":
            result = constants[layer.name]
        elif kind in RULES:
            result = RULES[kind](layer, [values[name] for name in names])
        else:
            raise ShapeError("a layer that the evaluator has no rule for", got=f"{kind} {layer.name}")
        out = layer.get_output(0)
        values[out.name] = _rounded(out, result, layer.name)
        left.subtract(names)
        for name in set(names):
            if left[name] == 0 and name not in outputs:
                del values[name]
    return {name: values[name] for name in outputs}


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


def torch_dtype(tensor: Definition) -> torch.dtype:
    """The declared type of a tensor."""
    return {
        "FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "FP8": torch.float8_e4m3fn,
        "BOOL": torch.bool, "INT32": torch.int32, "INT64": torch.int64,
    }[tensor.dtype.name]  # fmt: skip


def _declared(tensor: Definition, value: Tensor, what: str) -> Tensor:
    wanted = (tuple(tensor.shape), torch_dtype(tensor))
    if (tuple(value.shape), value.dtype) != wanted:
        raise ShapeError(
            f"{what} is not what the network declares", got=(tuple(value.shape), value.dtype), wanted=wanted
        )
    return value


def _rounded(tensor: Definition, value: Tensor, name: str) -> Tensor:
    if tuple(value.shape) != tuple(tensor.shape):
        raise NumericsError(f"{name} computes another shape than it declares", got=value.shape, wanted=tensor.shape)
    return value.to(torch_dtype(tensor))


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
    return (x / _along(scale, x, layer.axis)).clamp(-E4M3_MAX, E4M3_MAX)


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
    "GATHER": "IGatherLayer", "SELECT": "ISelectLayer",
}  # fmt: skip
