"""What an engine is an engine of: everything that decides whether a file on disk may run here in place of a new build."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor

from .evaluate import fused_facts, inputs_of, walk
from .networks import Network
from .skeleton import digest
from .targets import Target

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "ELEMENTWISE": ("op",), "UNARY": ("op",), "ACTIVATION": ("type",), "REDUCE": ("op", "axes", "keep_dims"),
    "SOFTMAX": ("axes",), "SLICE": ("start", "shape", "stride"), "CONCATENATION": ("axis",),
    "SHUFFLE": ("first_transpose", "reshape_dims", "second_transpose"), "MATRIX_MULTIPLY": ("op0", "op1"),
    "QUANTIZE": ("axis",), "DEQUANTIZE": ("axis",), "GATHER": ("axis",),
}  # fmt: skip
NO_WEIGHTS = "inputs"


@dataclass(frozen=True)
class Identity:
    """Equal identities, interchangeable engines.

    module, version  which TensorRT built it: plans of one version are not for another
    targets          compute capabilities that it is for, "sm89"
    network          hash of the definition: layers, attributes, types, shapes, small constants
    weights          hash of the stored weights and scales, or "inputs" where they come at run time
    """

    module: str
    version: str
    targets: tuple[str, ...]
    network: str
    weights: str

    @property
    def key(self) -> str:
        """24 hex digits, for file names."""
        return hashlib.sha256(repr(asdict(self)).encode()).hexdigest()[:24]

    def refusal(self, other: Identity) -> str | None:
        """Why an engine with identity `other` may not stand in for this one; None if it may."""
        for name in ("module", "version", "network", "weights"):
            if getattr(self, name) != getattr(other, name):
                return f"it has {name} {getattr(other, name)}, wanted {getattr(self, name)}"
        missing = sorted(set(self.targets) - set(other.targets))
        return f"it is for {', '.join(other.targets)}, wanted {', '.join(missing)}" if missing else None


def identify(network: Network, numbers: Mapping[str, Tensor], targets: Sequence[Target]) -> Identity:
    """The identity of the engine that a build of `network` for `targets` gives."""
    stored = [name for name in network.parameters if any(key.startswith(f"{name} #") for key in network.constants)]
    return Identity(
        module=network.module.name, version=network.module.version,
        targets=tuple(str(target) for target in sorted(targets)), network=network_hash(network),
        weights=digest(dict(numbers), stored) if stored else NO_WEIGHTS,
    )  # fmt: skip


def network_hash(network: Network) -> str:
    """16 hex digits of a definition; numbers of weights are left to `weights`, small constants are in."""
    api, whole = network.module.api, hashlib.sha256()
    definition = network.definition
    for index in range(definition.num_inputs):
        whole.update(_tensor(definition.get_input(index)).encode())
    for kind, layer in walk(definition, api):
        values = [str(getattr(layer, name)) for name in ATTRIBUTES.get(kind, ())]
        values += [f"{name}={value}" for name, value in fused_facts(kind, layer).items()]
        outputs = [_tensor(layer.get_output(index)) for index in range(layer.num_outputs)]
        whole.update(f"{kind} {layer.name} {inputs_of(layer)} {values} {outputs}\n".encode())
        if kind == "CONSTANT" and layer.name.rpartition(" #")[0] not in network.parameters:
            whole.update(network.constants[layer.name].float().numpy().tobytes())
    return whole.hexdigest()[:16]


def read(document: Mapping[str, Any]) -> Identity:
    """An identity from JSON. Raises KeyError or TypeError if it is none."""
    found = {field.name: document[field.name] for field in fields(Identity)}
    return Identity(**{**found, "targets": tuple(found["targets"])})


def _tensor(tensor: Any) -> str:
    return f"{tensor.name} {tensor.dtype} {tuple(tensor.shape)}\n"
