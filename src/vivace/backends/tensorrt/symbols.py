"""What the model's forward is run on to write a network: `Sym`, a value that does not exist yet.

The definition of the policy is `model.Pi`, and there is no second one. Here it runs once on Syms: every operation appends
layers to a TensorRT network definition instead of computing. `Writer` is the vocabulary (cast, matmul, reduce, ...); `Sym`
imitates the few methods of a tensor that the model calls between its operations (to, chunk, unflatten, torch.cat, ...).

A network is strongly typed: a layer takes what it is given and every change of type is a layer of its own. So the types in
the definition are the types that run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import ShapeError
from .module import Definition, Module

Number: TypeAlias = float  # `Sym.float` hides the name inside the class


class Sym:
    """One value of the network being written. Shape and dtype are known, numbers are not."""

    def __init__(self, writer: Writer, tensor: Definition, dtype: torch.dtype) -> None:
        self.writer, self.tensor, self.dtype = writer, tensor, dtype
        self.shape = torch.Size(tuple(tensor.shape))
        self.device = torch.device("meta")

    def to(self, dtype: torch.dtype) -> Sym:
        """Cast."""
        return self.writer.cast(self, dtype)

    def float(self) -> Sym:
        """Cast to float32."""
        return self.to(torch.float32)

    def chunk(self, count: int, dim: int) -> list[Sym]:
        """Equal parts along `dim`."""
        size = self.shape[dim] // count
        return [self.writer.slice(self, dim, index * size, size) for index in range(count)]

    def flatten(self, start: int, end: int) -> Sym:
        """Axes `start`..`end` as one."""
        shape = list(self.shape)
        return self.writer.reshape(self, [*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :]])

    def unflatten(self, dim: int, sizes: Sequence[int]) -> Sym:
        """One axis as several; one size may be -1."""
        shape = list(self.shape)
        dim %= len(shape)
        known = math.prod(size for size in sizes if size != -1)
        parts = [shape[dim] // known if size == -1 else size for size in sizes]
        return self.writer.reshape(self, [*shape[:dim], *parts, *shape[dim + 1 :]])

    def transpose(self, first: int, second: int) -> Sym:
        """Two axes swapped."""
        order = list(range(len(self.shape)))
        order[first], order[second] = order[second], order[first]
        return self.writer.permute(self, order)

    def __getitem__(self, key: Any) -> Sym:
        """An index or slice of the first axis, or [:, None]: all that the model uses."""
        if isinstance(key, int):
            picked = self.writer.slice(self, 0, key, 1)
            return self.writer.reshape(picked, list(self.shape[1:]))
        if isinstance(key, slice) and key.step is None:
            start, stop, _ = key.indices(self.shape[0])
            return self.writer.slice(self, 0, start, stop - start)
        if key == (slice(None), None):
            return self.writer.reshape(self, [self.shape[0], 1, *self.shape[1:]])
        raise ShapeError("an index that no network is written for", got=repr(key))

    def __add__(self, other: Sym | Number) -> Sym:
        return self.writer.binary("SUM", self, other)

    __radd__ = __add__

    def __sub__(self, other: Sym | Number) -> Sym:
        return self.writer.binary("SUB", self, other)

    def __mul__(self, other: Sym | Number) -> Sym:
        return self.writer.binary("PROD", self, other)

    __rmul__ = __mul__

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Sym:
        """torch functions that the model calls on values between its operations."""
        known: dict[Callable[..., Any], Callable[..., Sym]] = {
            torch.cat: _cat, torch.add: _add, functional.linear: _linear, functional.silu: _silu,
        }  # fmt: skip
        if function not in known:
            raise ShapeError("a torch function that no network is written for", got=getattr(function, "__name__", "?"))
        return known[function](*args, **(kwargs or {}))


def _cat(parts: Sequence[Sym], dim: int) -> Sym:
    return parts[0].writer.concat(parts, dim)


def _add(x: Sym, other: Sym, *, alpha: float = 1.0) -> Sym:
    return x + other * alpha


def _linear(x: Sym, weight: Tensor, bias: Tensor | None = None) -> Sym:
    layer = x.writer.layer_of(weight)
    product = x.writer.matmul(x, x.writer.parameter(weight), name=f"linear|{layer}", transpose=True)
    return product if bias is None else product + x.writer.parameter(bias)


def _silu(x: Sym, inplace: bool = False) -> Sym:
    return x * x.writer.activation("SIGMOID", x)


class Given(Protocol):
    """Where parameters come from."""

    def value(self, writer: Writer, parameter: Tensor) -> Sym:
        """The parameter as a value of the network."""
        ...

    def name(self, parameter: Tensor) -> str:
        """Its path in the model."""
        ...


class Writer:
    """Appends layers to one network definition.

    given      turns a parameter of the outline into a value: an input of the network, or a constant
    constants  {layer name: its numbers}: what TensorRT does not hand back of FP8 and BF16 constants
    said       TensorRT's messages so far, for the error of a layer that it refuses
    """

    def __init__(self, module: Module, definition: Definition, given: Given, *, said: Sequence[str] = ()) -> None:
        self.module, self.definition, self.said = module, definition, said
        self.constants: dict[str, Tensor] = {}
        self.known: dict[Any, Sym] = {}
        self._given = given
        self._names: dict[str, int] = {}

    # --- values ---------------------------------------------------------------------------------------------------

    def input(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> Sym:
        """An input of the network."""
        return Sym(self, self.definition.add_input(name, self.module.dtype(dtype), tuple(shape)), dtype)

    def output(self, name: str, value: Sym) -> None:
        """Name a value as an output of the network."""
        copy = self.definition.add_identity(value.tensor)  # an input or another output cannot be renamed
        tensor = copy.get_output(0)
        tensor.name = name
        self.definition.mark_output(tensor)

    def parameter(self, parameter: Tensor) -> Sym:
        """A weight, norm, bias or scale; the same one each time."""
        return self._given.value(self, parameter)

    def layer_of(self, parameter: Tensor) -> str:
        """Name of the layer that a parameter belongs to."""
        return self._given.name(parameter).rpartition(".")[0]

    def constant(self, value: Tensor, *, name: str = "constant") -> Sym:
        """Numbers stored in the network. They are kept alive as long as this writer: TensorRT holds their address."""
        value = value.detach().cpu().contiguous()  # the builder reads host memory
        weights = self.module.api.Weights(self.module.dtype(value.dtype), value.data_ptr(), value.numel())
        layer = self._named(self.definition.add_constant(tuple(value.shape), weights), name)
        self.constants[layer.name] = value
        return Sym(self, layer.get_output(0), value.dtype)

    def number(self, value: float, like: Sym) -> Sym:
        """One number, in the type and rank of `like`; the same layer for the same number."""
        key = ("number", value, like.dtype, len(like.shape))
        if key not in self.known:
            shape = (1,) * len(like.shape)
            self.known[key] = self.constant(torch.full(shape, value, dtype=like.dtype), name=f"number {value:g}")
        return self.known[key]

    # --- layers ---------------------------------------------------------------------------------------------------

    def cast(self, x: Sym, dtype: torch.dtype) -> Sym:
        """x in another type."""
        if x.dtype == dtype:
            return x
        return self._only(self.definition.add_cast(x.tensor, self.module.dtype(dtype)), dtype, "cast")

    def binary(self, operation: str, x: Sym, other: Sym | Number) -> Sym:
        """SUM, PROD, SUB, DIV, GREATER of two values of one type; the shorter shape gets leading ones."""
        y = self.number(other, x) if isinstance(other, int | float) else other
        rank = max(len(x.shape), len(y.shape))
        x, y = (self.reshape(v, [1] * (rank - len(v.shape)) + list(v.shape)) for v in (x, y))
        kind = getattr(self.module.api.ElementWiseOperation, operation)
        dtype = torch.bool if operation == "GREATER" else x.dtype
        return self._only(self.definition.add_elementwise(x.tensor, y.tensor, kind), dtype, operation.lower())

    def unary(self, operation: str, x: Sym) -> Sym:
        """SQRT, RECIP, ..."""
        kind = getattr(self.module.api.UnaryOperation, operation)
        return self._only(self.definition.add_unary(x.tensor, kind), x.dtype, operation.lower())

    def activation(self, operation: str, x: Sym) -> Sym:
        """GELU_TANH, SIGMOID."""
        kind = getattr(self.module.api.ActivationType, operation)
        return self._only(self.definition.add_activation(x.tensor, kind), x.dtype, operation.lower())

    def mean(self, x: Sym) -> Sym:
        """Mean over the last axis, which stays with size 1."""
        kind, axis = self.module.api.ReduceOperation.AVG, 1 << (len(x.shape) - 1)
        return self._only(self.definition.add_reduce(x.tensor, kind, axis, True), x.dtype, "mean")

    def softmax(self, x: Sym) -> Sym:
        """Softmax over the last axis."""
        layer = self.definition.add_softmax(x.tensor)
        layer.axes = 1 << (len(x.shape) - 1)
        return self._only(layer, x.dtype, "softmax")

    def slice(self, x: Sym, dim: int, start: int, size: int) -> Sym:
        """`size` entries of axis `dim` from `start`."""
        dim %= len(x.shape)
        begin, shape = [0] * len(x.shape), list(x.shape)
        begin[dim], shape[dim] = start, size
        steps = (1,) * len(shape)
        return self._only(self.definition.add_slice(x.tensor, tuple(begin), tuple(shape), steps), x.dtype, "slice")

    def reshape(self, x: Sym, shape: Sequence[int]) -> Sym:
        """The same values in another shape."""
        if tuple(shape) == tuple(x.shape):
            return x
        layer = self.definition.add_shuffle(x.tensor)
        layer.reshape_dims = tuple(shape)
        return self._only(layer, x.dtype, "reshape")

    def permute(self, x: Sym, order: Sequence[int]) -> Sym:
        """Axes in another order."""
        layer = self.definition.add_shuffle(x.tensor)
        layer.first_transpose = tuple(order)
        return self._only(layer, x.dtype, "permute")

    def concat(self, parts: Sequence[Sym], dim: int) -> Sym:
        """Joined along `dim`."""
        layer = self.definition.add_concatenation([part.tensor for part in parts])
        layer.axis = dim % len(parts[0].shape)
        return self._only(layer, parts[0].dtype, "concat")

    def matmul(self, x: Sym, y: Sym, *, name: str, transpose: bool = False) -> Sym:
        """x y, or x y^T; y of lower rank is shared by all leading axes of x, which then are rows."""
        kinds, lead = self.module.api.MatrixOperation, list(x.shape[:-1])
        rows = self.reshape(x, [math.prod(lead), x.shape[-1]]) if len(y.shape) == 2 else x
        turned = kinds.TRANSPOSE if transpose else kinds.NONE
        layer = self.definition.add_matrix_multiply(rows.tensor, kinds.NONE, y.tensor, turned)
        out = self._only(layer, x.dtype, name)
        return self.reshape(out, [*lead, out.shape[-1]]) if len(y.shape) == 2 else out

    def quantize(self, x: Sym, scale: Sym, dtype: torch.dtype) -> Sym:
        """E4M3 or INT8 under one scale."""
        layer = self.definition.add_quantize(x.tensor, scale.tensor, self.module.dtype(dtype))
        return self._only(layer, dtype, "quantize")

    def dequantize(self, x: Sym, scale: Sym, dtype: torch.dtype, *, axis: int | None = None) -> Sym:
        """Back from E4M3 or INT8: one scale, or one per index of `axis`."""
        layer = self.definition.add_dequantize(x.tensor, scale.tensor, self.module.dtype(dtype))
        if axis is not None:
            layer.axis = axis
        return self._only(layer, dtype, "dequantize")

    def wrap(self, layer: Definition, dtype: torch.dtype, name: str) -> Sym:
        """The output of a layer that an operation added itself (fused layers)."""
        return self._only(layer, dtype, name)

    def _only(self, layer: Definition, dtype: torch.dtype, name: str) -> Sym:
        if layer is None:
            text = "; ".join(message.strip() for message in self.said[-2:]) or "no reason given"
            raise ShapeError(f"{self.module.label} refused the layer {name}", got=text)
        return Sym(self, self._named(layer, name).get_output(0), dtype)

    def _named(self, layer: Definition, name: str) -> Definition:
        count = self._names[name] = self._names.get(name, -1) + 1
        layer.name = f"{name} #{count}"
        return layer
