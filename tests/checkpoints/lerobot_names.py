"""LeRobot's own tensors at full size, name by name, in a small file beside this one; and how such a file is made.

    python tests/checkpoints/lerobot_names.py        writes it anew; needs lerobot with its extra pi

Names and shapes are those of `PI05Pytorch` and `PI0Pytorch` built unmodified on torch's meta device, as `PI05Policy` and
`PI0Policy` hold them (a leading `model.`). A row whose name has `{i}` stands for that many layers, 0, 1, ...
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "lerobot_names.json"
Shapes = dict[str, tuple[int, ...]]


def stored(kind: str) -> Shapes:
    """{name: shape} as the file tells them; kind is pi0 or pi05."""
    out: Shapes = {}
    for name, (layers, *shape) in json.loads(FILE.read_text())[kind].items():
        for i in range(layers or 1):
            out[name.replace("{i}", str(i))] = tuple(shape)
    return out


def compressed(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[int]]:
    """{name or pattern: [layers (0 = no pattern), *shape]}. Layers must be numbered without gaps and alike."""
    seen: dict[str, dict[int, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        match = re.search(r"\.layers\.(\d+)\.", name)
        pattern = name.replace(match[0], ".layers.{i}.", 1) if match else name
        seen.setdefault(pattern, {})[int(match[1]) if match else 0] = shape
    table = {}
    for pattern, rows in sorted(seen.items()):
        (shape,) = set(rows.values())
        assert sorted(rows) == list(range(len(rows))), pattern
        table[pattern] = [len(rows) if "{i}" in pattern else 0, *shape]
    return table


def built(kind: str) -> Shapes:
    """{name: shape} of the installed LeRobot's unmodified network, which is never given memory."""
    import torch
    from lerobot.policies.pi0.configuration_pi0 import PI0Config
    from lerobot.policies.pi0.modeling_pi0 import PI0Pytorch
    from lerobot.policies.pi05.configuration_pi05 import PI05Config
    from lerobot.policies.pi05.modeling_pi05 import PI05Pytorch

    network, config = {"pi0": (PI0Pytorch, PI0Config), "pi05": (PI05Pytorch, PI05Config)}[kind]
    with torch.device("meta"):
        tensors = network(config(device="cpu")).state_dict()
    return {f"model.{name}": tuple(tensor.shape) for name, tensor in tensors.items()}


def main() -> None:
    """Write the file, one row a line."""
    import lerobot
    import transformers

    facts: dict[str, Any] = {"lerobot": lerobot.__version__, "transformers": transformers.__version__}
    rows = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in facts.items()]
    for kind in ("pi0", "pi05"):
        lines = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in compressed(built(kind)).items()]
        rows.append(f' "{kind}": {{\n' + ",\n".join(lines) + "\n }")
    FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main()
