"""The sections of results that a client of the server made: frames sent one after the other, and whole episodes.

Both say first whether the answers were those of the policy alone: without that no success and no latency means anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .report_full_size import marks
from .report_html import esc, figures, fold, num, pairs, table, tiles, verdict
from .report_simulation import arm_table, delay_figures
from .results import number

Document = Mapping[str, Any]


def drive(document: Document) -> str:
    """Frames sent one after the other by examples/drive_with_openpi_client.py.

    Raises KeyError for a document that lacks its kind's keys.
    """
    top = [
        (f"{document['frames']:,}", "frames answered"),
        (f"{document['answers_that_differ_from_the_policy_alone']:,}", "answers that differ from the policy alone"),
        (f"{num(document['round_trip_p50_ms'])} ms", "round trip, p50"),
        (f"{num(document['round_trip_p95_ms'])} ms", "round trip, p95"),
        (f"{num(document['model_p50_ms'])} ms", "of it the model, p50"),
    ]
    what = f"Boundary {document['boundary']}. Chunk {document['action_chunk']}."
    return f'<p class="soft">{esc(what)}</p>{_tiles(top)}{_engine(document)}'


def closed_loop(document: Document) -> str:
    """Episodes whose every look went through the server, by examples/closed_loop_with_openpi_client.py.

    Raises KeyError or TypeError for a document that lacks its kind's keys.
    """
    arms, answers, times = document["arms"], document["answers"], document["round_trip_ms"]
    simulator = document["simulator"]
    top = [
        *((f"{arm['successes']} / {arm['finished']}", f"success at {arm['arm']['delay']['name']}") for arm in arms),
        (f"{answers['differing']} of {answers['compared']}", "answers that differ from the policy alone"),
        (f"{num(times['p50'])} ms", "round trip, p50"),
        (f"{num(times['p95'])} ms", "round trip, p95"),
        (f"{num(document['model_ms']['p50'])} ms", "of it the model, p50"),
    ]
    what = (
        f"Boundary {document['boundary']}. {answers['received']:,} requests. MuJoCo {simulator['mujoco']}, scene "
        f"{str(simulator['scene_sha256'])[:12]}, {arms[0]['n']} episodes an arm from seed {document['seeds']['first']}."
    )
    return "".join(
        [
            f'<p class="soft">{esc(what)}</p>',
            _tiles(top),
            "".join(f'<p class="soft">{esc(remark)}</p>' for remark in document["remarks"]),
            figures(delay_figures(document)),
            fold("arms", arm_table(arms), is_open=True),
            _engine(document),
        ]
    )


def start(document: Document) -> str:
    """Starts of `vivace serve` on a folder, by benchmarks/start_probe.py.

    Raises KeyError for a document that lacks its kind's keys.
    """
    cells = [
        [
            esc(row["caches"]), num(row["listening_s"]), num(row["first_action_s"]), verdict(bool(row["same_bits"])),
            marks(row),
        ]
        for row in document["rows"]
    ]  # fmt: skip
    heads = ["compiled kernels", "listens after, s", "first action after, s", "same actions", "marks"]
    size = number(document["weights_bytes_in_files"]) / 1e9
    what = (
        f"vivace serve {' '.join(document['options'])}; {size:.2f} GB of weights in files, which the host had in memory. "
        "Seconds since the process began."
    )
    return f'<p class="soft">{esc(what)}</p>{table(heads, cells, text_columns=(0, 3, 4))}{_engine(document)}'


def _tiles(items: list[tuple[str, str]]) -> str:
    return tiles([(esc(value), name) for value, name in items])


def _engine(document: Document) -> str:
    return fold("the engine, as the server described it to the client", pairs(document["engine"]))
