"""Writes the README's speed tables from the committed results, so that they cannot drift apart.

SHOWN is the one thing to change when newer results shall be shown: a heading, and results of `vivace bench --preset hopper`
from one machine, whose rows are shown together.

python benchmarks/readme_table.py            print it
python benchmarks/readme_table.py --write    put it between the markers in README.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SHOWN: dict[str, tuple[str, ...]] = {
    "One H100 SXM": ("hopper-h100-2026-11-25.json", "hopper-rivals-h100-2026-11-25.json"),
    "One H200": ("hopper-every-mark-h200-2026-11-30.json", "hopper-rivals-five-h200-2026-11-30.json"),
}  # fmt: skip
BEGIN, END = "<!-- speed: made by benchmarks/readme_table.py -->", "<!-- end of speed -->"


def text() -> str:
    """Every table under its heading."""
    return "\n\n".join(f"{heading}:\n\n{table(merged(files))}" for heading, files in SHOWN.items())


def merged(files: Sequence[str]) -> dict[str, Any]:
    """The rows of several results; where two have the same row, the first one's counts."""
    documents = [json.loads((RESULTS / file).read_text(encoding="utf-8")) for file in reversed(files)]
    return {name: [row for document in documents for row in document[name]] for name in ("rows", "accuracy")}


def table(result: dict[str, Any], *, fp8: str = "fp8-all") -> str:
    """One line per setting: the rival, bfloat16 with its error beside plain PyTorch's, FP8 with its cosines, whole calls.

    Whole calls of a rival stand before ours if the result has any.
    """
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

    low, eight = "cuda_graph bf16", f"cuda_graph {fp8}"
    whole = {"eager": "plain PyTorch", "compiled graph": "torch.compile"}
    whole = {engine: name for engine, name in whole.items() if any(row[1:] == (engine, "B2") for row in rows)}
    whole |= {low: "bfloat16", eight: fp8}
    lines = [
        f"| (views, prompt tokens, chunk) | torch.compile + graph, bfloat16 | bfloat16, p50 / p99 | error / plain bfloat16's | {fp8}, p50 / p99 | cosine, mean / worst | `policy.infer` p50 / p99, {', '.join(whole.values())} |",
        "|---|---|---|---|---|---|---|",
    ]
    for setting in dict.fromkeys(row["setting"] for row in result["rows"]):
        name = f"({setting.replace(',', ', ')})"
        calls = ", ".join(ms(setting, engine, "B2", tail=True) for engine in whole)
        lines.append(
            f"| {name} | {ms(setting, 'compiled graph')} | {ms(setting, low, tail=True)} | {error(setting)} "
            f"| {ms(setting, eight, tail=True)} | {cosines(setting)} | {calls} |"
        )
    return "\n".join(lines)


def with_table(readme: str, text: str) -> str:
    """README with `text` between the markers."""
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    made = text()
    path = ROOT / "README.md"
    if "--write" in sys.argv:
        path.write_text(with_table(path.read_text(), made))
    else:
        print(made)
