"""Worker processes that end when the program that started them does, however that was killed."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.connection import wait


def end_with_parent() -> None:
    """End this process at once when its parent is gone, from here on; for a pool's initializer.

    A pool tells its workers to end, but a killed program tells nobody anything: they would finish the block in hand,
    minutes of a core, and nobody would read it.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "only in a process that multiprocessing started"

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
