"""Writes the README's speed table from the committed result, so that the two cannot drift apart.

RESULT is the one thing to change when a newer result shall be shown: either a result of `vivace bench --preset hopper` or
the older form of gpu_probe.py.

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
    """The table of either form."""
    return preset_table(result) if result.get("kind") == "hopper" else probe_table(result)


def preset_table(result: dict[str, Any], *, fp8: str = "fp8-all") -> str:
    """One line per setting: the rival, bfloat16 with its error beside plain PyTorch's, FP8 with its cosines, whole calls."""
    rows = {(r["setting"], r["engine"], r["boundary"]): r["latency"] for r in result["rows"]}
    errors = {(r["setting"], r["engine"]): r for r in result["accuracy"]}

    def ms(setting: str, engine: str, boundary: str = "B0", *, tail: bool = False) -> str:
        found = rows.get((setting, engine, boundary))
        if found is None:
            return "-"
        return f"{found['p50_ms']:.2f}" + (f" / {found['p99_ms']:.2f}" if tail else "")

    def error(setting: str) -> str:
        found = errors.get((setting, "cuda_graph bf16"))
        return "-" if found is None else f"{found['rel_l2']:.4f} / {found['plain_bfloat16']['rel_l2']:.4f}"

    def cosines(setting: str) -> str:
        found = errors.get((setting, f"cuda_graph {fp8}"))
        return "-" if found is None else f"{found['cosine_mean']:.5f} / {found['cosine_worst']:.5f}"

    lines = [
        f"| (views, prompt tokens, chunk) | torch.compile + graph, bfloat16 | bfloat16, p50 / p99 | error / plain bfloat16's | {fp8}, p50 / p99 | cosine, mean / worst | `policy.infer` bfloat16, {fp8} |",
        "|---|---|---|---|---|---|---|",
    ]
    low, eight = "cuda_graph bf16", f"cuda_graph {fp8}"
    for setting in dict.fromkeys(row["setting"] for row in result["rows"]):
        name = f"({setting.replace(',', ', ')})"
        calls = f"{ms(setting, low, 'B2')}, {ms(setting, eight, 'B2')}"
        lines.append(
            f"| {name} | {ms(setting, 'compiled graph')} | {ms(setting, low, tail=True)} | {error(setting)} "
            f"| {ms(setting, eight, tail=True)} | {cosines(setting)} | {calls} |"
        )
    return "\n".join(lines)


def probe_table(result: dict[str, Any]) -> str:
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
