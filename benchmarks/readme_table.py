"""Writes the README's speed table from the committed result, so that the two cannot drift apart.

python benchmarks/readme_table.py            print it
python benchmarks/readme_table.py --write    put it between the markers in README.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "cuda-graph-h100-2026-11-24.json"
BEGIN, END = "<!-- speed: made by benchmarks/readme_table.py -->", "<!-- end of speed -->"
SETTINGS = ("3,200,50", "3,16,50", "2,0,63", "2,48,10", "1,48,50")


def cells(row: dict[str, Any]) -> str:
    """p50 and its split."""
    return f"{row['p50']['p50']:.2f} = {row['vision']:.2f} + {row['prefix']:.2f} + {row['denoise']:.2f}"


def table(result: dict[str, Any]) -> str:
    """One line per setting: bfloat16, its error beside plain PyTorch's, FP8 and its cosine."""
    lines = [
        "| (views, prompt tokens, chunk) | bfloat16, ms = vision + prefix + denoise | error / plain bfloat16's | FP8, ms | FP8 cosine |",
        "|---|---|---|---|---|",
    ]
    for setting in SETTINGS:
        low, eight = result["policy"][f"{setting} bf16"], result["policy"][f"{setting} fp8-all"]
        name = f"({setting.replace(',', ', ')})"
        error = f"{low['error']:.4f} / {low['error_plain_bf16']:.4f}"
        lines.append(f"| {name} | {cells(low)} | {error} | {cells(eight)} | {eight['cosine']:.4f} |")
    return "\n".join(lines)


def with_table(readme: str, text: str) -> str:
    """README with `text` between the markers."""
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    made = table(json.loads(RESULT.read_text()))
    path = ROOT / "README.md"
    if "--write" in sys.argv:
        path.write_text(with_table(path.read_text(), made))
    else:
        print(made)
