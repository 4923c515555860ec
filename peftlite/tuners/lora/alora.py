"""Activated LoRA: the adapter acts from its invocation tokens on, so that what came before is the base model's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from peftlite.core.hosts import Host, LinearHost
from peftlite.core.inputs import Observed, observed
from peftlite.core.slots import View
from peftlite.core.variant import Program
from peftlite.errors import StateError, warn
from peftlite.tuners.lora.start import Shifted

OFFSETS = "alora_offsets"
_SEEN: WeakKeyDictionary[Any, dict[tuple[int, ...], Tensor]] = WeakKeyDictionary()
"""Key-value cache -> invocation tokens -> which rows had been invoked when it was last written (rows,)."""


class Invoked(Shifted):
    """aLoRA (https://arxiv.org/abs/2504.12397): LoRA on the tokens from the last `alora_invocation_tokens` of a row on.

    Rows without them run on the base model. A call that continues a cache continues what was invoked in it. Which
    tokens these are is known from the call of the whole model: its `input_ids`, or its `alora_offsets`, for each row
    how many tokens from the end on (None: none).
    """

    observes = frozenset({OFFSETS})

    def check(self, host: Host, config: Any, path: str) -> str | None:
        if not isinstance(host, LinearHost):
            return f"`alora_invocation_tokens` has no form for {host.label}"
        return super().check(host, config, path)

    def forward(self, a: View, call: Program, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = call(x, *args, **kwargs)
        return (y + self.delta_forward(a, x).where(invoked(a, x), 0.0)).to(y.dtype)

    def why_not_merge(self, a: View) -> str | None:
        return "it acts from its `alora_invocation_tokens` on only, which no weight can"

    def bind(self, a: View, slow: Program) -> Program | None:
        return None


def invoked(a: View, x: Tensor) -> Tensor:
    """Which entries of a layer's input x (rows, tokens, in) or (rows * tokens, in) the adapter acts on: (..., 1).

    Raises: StateError if the layer was called on its own, or its input cannot be told apart by token.
    """
    state = a.layer.state
    call = observed(state)
    if call is None:
        raise StateError(
            f"Adapter `{a.name}` acts from its `alora_invocation_tokens` on, so it must see `input_ids`: call the "
            "whole model that it was added to, not a part of it."
        )
    tokens = tuple(state.configs[a.name].alora_invocation_tokens)
    found: Any = call.known.get(tokens)
    if found is None:
        found = call.known[tokens] = Invocation.of(call, tokens)
    if found.tails is None:
        return x.new_zeros((), dtype=torch.bool)
    rows = call.rows_of(a.name)
    tails = found.tails if rows is None else found.tails[rows.to(found.tails.device)]
    mask: Tensor = found.mask(tails.to(x.device), x)
    return mask


class Invocation:
    """How many tokens from the end on each row of a call has been invoked (rows,); None where nothing is known."""

    def __init__(self, tokens: tuple[int, ...], tails: Tensor | None, length: int) -> None:
        self.tokens = tokens
        self.tails = tails
        self.length = length

    @classmethod
    def of(cls, call: Observed, tokens: tuple[int, ...]) -> Invocation:
        """From the call's offsets, or else its ids.

        Raises: StateError if there is not one offset for each row.
        """
        ids, offsets = call.inputs.get("input_ids"), call.inputs.get(OFFSETS)
        given = ids if isinstance(ids, Tensor) else call.inputs.get("inputs_embeds")
        if not isinstance(given, Tensor):
            return cls(tokens, None, 0)
        rows, length = given.shape[:2]
        if offsets is not None:
            if len(offsets) != rows:
                raise StateError(f"`{OFFSETS}` has {len(offsets)} entries for {rows} rows. Nothing was changed.")
            tails = torch.tensor([offset or 0 for offset in offsets], device=given.device)
        elif isinstance(ids, Tensor):
            tails = last_tails(ids, tokens)
        else:
            warn(
                "`inputs_embeds` without `input_ids` or `alora_offsets`: nobody can see the invocation tokens, so that "
                "the adapter has no effect."
            )
            return cls(tokens, None, 0)
        before = seen(call.inputs.get("past_key_values")).get(tokens)
        if before is not None and offsets is None:
            tails = torch.where(before.to(tails.device) & (tails == 0), length, tails)
        return cls(tokens, tails, length)

    def mask(self, tails: Tensor, x: Tensor) -> Tensor:
        """Which entries of x are invoked; where there are fewer entries than tokens, they are the last of each row.

        Raises: StateError if x does not have one entry per token.
        """
        rows = tails.shape[0]
        length = x.shape[1] if x.dim() == 3 else x.shape[0] // max(1, rows)
        fits = x.shape[0] == rows if x.dim() == 3 else x.dim() == 2 and x.shape[0] == rows * length
        if not fits or length > self.length:
            raise StateError(
                f"A layer with `alora_invocation_tokens` was called with `{tuple(x.shape)}`, for {rows} rows of "
                f"{self.length} tokens: it cannot tell which entry is which token's."
            )
        active = torch.arange(length, device=x.device) >= length - tails[:, None]  # (rows, tokens)
        return active[..., None] if x.dim() == 3 else active.reshape(-1, 1)

    def after(self, inputs: dict[str, Any], output: Any) -> None:
        """Note with the cache which rows have been invoked, for the calls that continue it."""
        cache = inputs.get("past_key_values")
        if self.tails is not None:
            seen(getattr(output, "past_key_values", None) if cache is None else cache)[self.tokens] = self.tails > 0


def seen(cache: Any) -> dict[tuple[int, ...], Tensor]:
    """What is noted with a cache; nothing with what is none."""
    return {} if cache is None or isinstance(cache, tuple) else _SEEN.setdefault(cache, {})


def last_tails(ids: Tensor, tokens: Sequence[int]) -> Tensor:
    """For each row of ids (rows, length), how many tokens there are from the last `tokens` on; 0 without any."""
    rows, length = ids.shape
    if len(tokens) > length:
        return ids.new_zeros(rows)
    windows = ids.unfold(1, len(tokens), 1)  # (rows, places, tokens)
    matches = (windows == ids.new_tensor(list(tokens))).all(-1)
    places = torch.arange(matches.shape[1], device=ids.device)
    first = torch.where(matches, places, -1).amax(1)  # of the last occurrence
    return torch.where(first < 0, 0, length - first)


INVOKED = Invoked()
