"""Worker processes: they end when the program that started them does, however that was killed, and draw with one thread."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.connection import wait

from ..config import draw_with_one_thread


def begin_worker() -> None:
    """For a pool's initializer: what every simulator of a pool needs."""
    draw_with_one_thread()
    end_with_parent()


def end_with_parent() -> None:
    """End this process at once when its parent is gone, from here on.

    A pool tells its workers to end, but a killed program tells nobody anything: they would finish the block in hand,
    minutes of a core, and nobody would read it.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "only in a process that multiprocessing started"

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
