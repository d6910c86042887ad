"""openpi's `--default_prompt`: an instruction for clients that send none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import ResolvedEngine
from ..types import ActionChunk
from .server import ServedPolicy


class WithDefaultPrompt:
    """A policy that adds `prompt` under `key` to requests that lack the key; everything else passes through."""

    def __init__(self, policy: ServedPolicy, *, prompt: str, key: str = "prompt") -> None:
        self._policy, self._prompt, self._key = policy, prompt, key

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The policy's own."""
        return self._policy.metadata

    @property
    def engine(self) -> ResolvedEngine:
        """The policy's own."""
        return self._policy.engine

    def infer(self, request: Mapping[str, Any], /) -> ActionChunk:
        """Answer one observation."""
        return self._policy.infer(request if self._key in request else {**request, self._key: self._prompt})

    def warmup(self) -> None:
        """Warm the policy up."""
        self._policy.warmup()
