"""Who may see whom, and who stands where.

```
              prefix  state  actions        pi0:   prefix | state | actions
    prefix      x       .       .           pi0.5: prefix | actions   (no state row)
    state       x       x       .
    actions     x       x       x           inside the prefix and inside the actions: everybody sees everybody
```
Invalid tokens (padding, a missing camera) are seen by nobody, and valid tokens are numbered 0..S-1 without holes. So they
can be left out altogether, which is what `robots` does: then the mask is None and no arithmetic is spent on it.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def prefix_mask(
    view_mask: Bool[Tensor, "B V"] | None,
    token_mask: Bool[Tensor, "B L"] | None,
    *,
    shape: tuple[int, int, int, int],
) -> Bool[Tensor, "B S"] | None:
    """Validity of every prefix token.  shape (B, V, tokens per view, L) -> bool [B, V*tokens + L], or None = all valid."""
    B, V, per_view, L = shape
    if view_mask is None and token_mask is None:
        return None
    device = view_mask.device if view_mask is not None else token_mask.device  # type: ignore[union-attr]
    views = torch.ones(B, V, dtype=torch.bool, device=device) if view_mask is None else view_mask
    tokens = torch.ones(B, L, dtype=torch.bool, device=device) if token_mask is None else token_mask
    return torch.cat([views.repeat_interleave(per_view, dim=1), tokens], dim=1)


def positions(mask: Bool[Tensor, "B S"] | None, *, shape: tuple[int, int], device: torch.device) -> Int[Tensor, "B S"]:
    """Position of every prefix token, int64 [B, S]: valid tokens 0, 1, 2, ...; invalid ones repeat the number before."""
    B, S = shape
    if mask is None:
        return torch.arange(S, device=device).expand(B, S)
    return (torch.cumsum(mask.long(), dim=1) - 1).clamp_min(0)


def lengths(mask: Bool[Tensor, "B S"] | None, *, shape: tuple[int, int], device: torch.device) -> Int[Tensor, " B"]:
    """Number of valid prefix tokens, int64 [B]: where the suffix begins."""
    B, S = shape
    return torch.full((B,), S, device=device) if mask is None else mask.long().sum(dim=1)


def with_suffix(mask: Bool[Tensor, "B S"] | None, suffix: int) -> Bool[Tensor, "B T"] | None:
    """Keys that suffix queries may see.  bool [B, S] -> [B, S + suffix]; the suffix sees itself."""
    if mask is None:
        return None
    return torch.cat([mask, torch.ones(mask.shape[0], suffix, dtype=torch.bool, device=mask.device)], dim=1)
