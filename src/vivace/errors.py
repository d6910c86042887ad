"""Every error that vivace raises on purpose, as one tree.

A message says four things in this order: what is wrong, what was got, what was wanted, and what to do about it.
Catch `VivaceError` to catch them all; errors of the libraries below are mapped into this tree at the edge.
"""

from __future__ import annotations


class VivaceError(Exception):
    """Base of the tree; composes the four parts of a message.

    Args:
        what: what is wrong, naming the file, key or tensor.
        got: what was found there.
        wanted: what would have been right.
        do: the next step for the person who reads this.
    """

    def __init__(self, what: str, *, got: object = None, wanted: object = None, do: str | None = None) -> None:
        self.what, self.got, self.wanted, self.do = what, got, wanted, do
        parts = [what]
        if got is not None:
            parts.append(f"got {got}")
        if wanted is not None:
            parts.append(f"wanted {wanted}")
        if do is not None:
            parts.append(do)
        super().__init__("; ".join(parts))


class ConfigError(VivaceError):
    """A setting, file or command-line value cannot be used as given."""


class CheckpointError(VivaceError):
    """A checkpoint is damaged, incomplete, of another architecture, or needs a step that was not done."""


class ObservationError(VivaceError):
    """A request does not fit the robot: a camera, state or prompt is missing, mis-sized or not finite."""


class ShapeError(VivaceError):
    """A tensor inside the engine has another shape or dtype than its contract says."""


class Unsupported(VivaceError):
    """A backend, kernel or option cannot run here; never replaced silently by a slower path."""


class NumericsError(VivaceError):
    """A result is not finite, or differs from the reference by more than its bound."""


class WorkerDied(VivaceError):
    """A process that vivace started for part of the work ended without its answer."""


class ProtocolError(VivaceError):
    """A peer sent bytes that the wire protocol does not allow."""


class ServerError(VivaceError, RuntimeError):
    """A policy server could not be reached, refused a request, or did not answer in time.

    Also a RuntimeError, which is what openpi's client raises for a refused request.
    """


class DeadlineMissed(VivaceError):
    """An action was not ready when its control tick came."""


class Overloaded(VivaceError):
    """The server already holds as many requests or connections as it may."""
