"""Replays recorded websocket frames: each must decode to what openpi decodes, and be written byte for byte as it was.

A fixture describes Python values as trees of {"t": type, ...}. `build` makes the value to be packed; `difference` compares
a decoded value with its description, type by type, because 1 == 1.0 == True in Python but not on the wire.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, ProtocolError
from ..serving.protocol import pack, unpack
from .rows import Row


def replay_wire(folder: Path) -> list[Row]:
    """Check every frame of a golden folder of kind "websocket": one row for decoding it, one for encoding it.

    error is 0.0 for equal and 1.0 for different, the tolerance is 0. Raises ConfigError for a folder of another kind.
    """
    case = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    if case.get("kind") != "websocket":
        raise ConfigError(f"{folder} holds no websocket frames", got=case.get("kind"), wanted="kind websocket")
    rows = []
    for frame in case["frames"]:
        data = (folder / frame["frame"]).read_bytes()
        for stage, fault in (("decode", _decode_fault(data, frame)), ("encode", _encode_fault(data, frame))):
            name = f"{frame['frame']} {stage}"
            rows.append(Row(case["name"], name, float(bool(fault)), 0.0, not fault, fault or "exact"))
    return rows


def _decode_fault(data: bytes, frame: dict[str, Any]) -> str:
    """What is wrong with the decoded frame, or ""."""
    if hashlib.sha256(data).hexdigest() != frame["sha256"]:
        return "the file is not the one that case.json describes"
    try:
        return difference(unpack(data), frame["unpacked_to"])
    except ProtocolError as error:
        return str(error)


def _encode_fault(data: bytes, frame: dict[str, Any]) -> str:
    """What is wrong with the encoded frame, or ""."""
    try:
        packed = pack(build(frame["packed_from"], arrays_of(unpack(data))))
    except ProtocolError as error:
        return str(error)
    if packed == data:
        return ""
    at = next((i for i, (a, b) in enumerate(zip(packed, data, strict=False)) if a != b), min(len(packed), len(data)))
    return f"{len(packed)} bytes, wanted {len(data)}; first difference at byte {at}"


def arrays_of(value: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays inside a decoded value by the SHA-256 of their bytes: long ones are not written out in case.json."""
    if isinstance(value, np.ndarray):
        return {_sha256(value): value}
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return {key: array for child in children for key, array in arrays_of(child).items()}


def build(node: dict[str, Any], arrays: dict[str, np.ndarray[Any, Any]]) -> Any:
    """Make the Python value that `node` describes. Raises ConfigError for a type that it does not know."""
    match node["t"]:
        case "map":
            return {build(key, arrays): build(value, arrays) for key, value in _pairs(node)}
        case "list":
            return [build(item, arrays) for item in node["items"]]
        case "ndarray":
            return _build_array(node, arrays)
        case "npscalar":
            return np.dtype(node["dtype"]).type(node["value"])
        case "bytes":
            return bytes.fromhex(node["hex"])
        case "nil":
            return None
        case "str" | "int" | "float" | "bool":
            return node["value"]
    raise ConfigError("fixture has an unknown type", got=node["t"])


def _build_array(node: dict[str, Any], arrays: dict[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """The array from its hex digits, else from the decoded bytes of the same hash; two-dimensional ones column by column.

    The wire order is C whatever the order in memory, so a Fortran array is the harder test of `pack`.
    """
    if "hex" in node:
        flat = np.frombuffer(bytes.fromhex(node["hex"]), dtype=node["dtype"])
    elif node["sha256"] in arrays:
        flat = arrays[node["sha256"]].reshape(-1).view(node["dtype"])
    else:
        raise ProtocolError("frame lacks an array of the fixture", wanted=f"sha256 {node['sha256'][:12]}...")
    return np.asfortranarray(flat.reshape(node["shape"])) if node["shape"] else flat.reshape(())


def difference(value: Any, node: dict[str, Any], at: str = "frame") -> str:
    """Where and how `value` differs from what `node` describes; "" when it does not."""
    match node["t"]:
        case "map":
            return _map_difference(value, node, at)
        case "list":
            if type(value) is not list or len(value) != len(node["items"]):
                return f"{at}: not a list of {len(node['items'])}"
            faults = (difference(v, n, f"{at}[{i}]") for i, (v, n) in enumerate(zip(value, node["items"], strict=True)))
            return next((fault for fault in faults if fault), "")
        case "ndarray":
            return _array_difference(value, node, at)
        case "npscalar":
            same = isinstance(value, np.generic) and value.dtype.str == node["dtype"] and value.item() == node["value"]
            return "" if same else f"{at}: got {value!r}, wanted {node['value']!r} as {node['dtype']}"
    wanted = build(node, {})
    same = type(value) is type(wanted) and value == wanted
    return "" if same else f"{at}: got {value!r}, wanted {wanted!r}"


def _map_difference(value: Any, node: dict[str, Any], at: str) -> str:
    if type(value) is not dict:
        return f"{at}: not a dict"
    keys = [build(key, {}) for key, _ in _pairs(node)]
    if list(value) != keys:
        return f"{at}: got keys {list(value)}, wanted {keys} in this order"
    faults = (difference(value[key], child, f"{at}/{key}") for key, (_, child) in zip(keys, _pairs(node), strict=True))
    return next((fault for fault in faults if fault), "")


def _array_difference(value: Any, node: dict[str, Any], at: str) -> str:
    if not isinstance(value, np.ndarray):
        return f"{at}: not an array"
    if (value.dtype.str, list(value.shape)) != (node["dtype"], node["shape"]):
        return f"{at}: got {value.dtype.str} {list(value.shape)}, wanted {node['dtype']} {node['shape']}"
    if _sha256(value) != node["sha256"]:
        return f"{at}: other values"
    return "" if not value.flags.writeable else f"{at}: writable, wanted a read-only view"


def _pairs(node: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [(key, value) for key, value in node["items"]]


def _sha256(array: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()
