"""Trainable tokens: a few rows of an embedding train, as a method of its own and beside LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlite.checks import check_bool, show
from peftlite.config import PeftConfig, PeftType, register_config
from peftlite.core.hosts import ALL_ROWS, Dense, EmbeddingHost, Host, LinearHost, widened
from peftlite.core.slots import BufferSlot, Slot, View
from peftlite.core.variant import (
    INPUTS,
    Companion,
    Placement,
    Program,
    TunerSpec,
    Variant,
    register,
    register_companion,
)
from peftlite.errors import ConfigError
from peftlite.tuners.fields import TOKENS_FIELD, Tokens, check_targets, check_tokens


@dataclass
class TrainableTokensConfig(PeftConfig):
    """Rows `token_indices` of embeddings train, and nothing else: the tokens' vectors after training replace them.

    `target_modules` are the embeddings; None is the model's table of inputs. With `init_weights=False` the rows begin
    at random.

    Raises: ConfigError.

    Example:
        >>> TrainableTokensConfig(token_indices=[7, 3], target_modules=["wte"]).token_indices
        [7, 3]
    """

    token_indices: Tokens = field(default_factory=list)
    target_modules: list[str] | str | None = None
    init_weights: bool = True

    kind: ClassVar[PeftType | None] = PeftType.TRAINABLE_TOKENS

    def __post_init__(self) -> None:
        super().__post_init__()
        check_targets(self)
        self.token_indices = check_tokens("token_indices", self.token_indices)
        check_bool("init_weights", self.init_weights)


def named_by(config: Any) -> Sequence[str]:
    """The embeddings that a config of another method names."""
    value = getattr(config, TOKENS_FIELD, None)
    if value is None:
        return ()
    return tuple(value) if isinstance(value, dict) else (INPUTS,)


def tokens_at(config: Any, path: str) -> Tokens | None:
    """The tokens that train at this path; None where the config says nothing of it."""
    value = config.token_indices if isinstance(config, TrainableTokensConfig) else getattr(config, TOKENS_FIELD)
    if not isinstance(value, dict):
        return list(value)
    return next((list(tokens) for name, tokens in value.items() if f".{path}".endswith(f".{name}")), None)


class TrainableTokens(Variant):
    """Rows t of the table are replaced: W'[t_i] = delta[i]. The fresh adapter has the table's own rows.

    Slots: trainable_tokens_delta (n, dim); index (2, n), the tokens in ascending order and the row of each in delta.
    On an output head that shares the table, the same rows replace the tokens' scores: y'[t_i] = delta[i] x + b[t_i].
    """

    by_rows = True
    exclusive = True

    def check(self, host: Host, config: Any, path: str) -> str | None:
        if host.packed or not isinstance(host, EmbeddingHost | LinearHost):
            return f"trainable tokens have no form for {host.name}"
        if getattr(host.layer, "max_norm", None) is not None:
            return "its `max_norm` rewrites rows in every call"
        outside = [token for token in tokens_at(config, path) or () if token >= vocabulary(host)]
        if outside:
            raise ConfigError(
                f"`{path}` has {vocabulary(host)} rows, and none for the token `{outside[0]}`; the last one is "
                f"`{vocabulary(host) - 1}`. For new tokens, call `resize_token_embeddings` first. Nothing was changed."
            )
        return None

    def init(self, host: Host, at: Placement) -> dict[str, Any]:
        tokens = tokens_at(at.config, at.path) or []
        order = sorted(range(len(tokens)), key=tokens.__getitem__)
        index = torch.tensor([[tokens[row] for row in order], order], device=at.device)
        like: dict[str, Any] = {"dtype": at.dtype, "device": at.device}
        if at.own is None or at.device.type == "meta":
            rows = torch.empty((len(tokens), width(host)), **like)
        elif not getattr(at.config, "init_weights", True):
            rows = torch.randn((len(tokens), width(host)), **like)
        else:
            rows = by_token(host, at.own().weight)[tokens].to(**like, copy=True)
        return {**parts(nn.Parameter(rows, requires_grad=False), index), "token_indices": tokens}

    def size(self, host: Host, config: Any, path: str) -> tuple[int | None, int]:
        return None, len(tokens_at(config, path) or ()) * width(host)

    def clash(self, a: View, b: View) -> str | None:
        both = sorted({*a.token_indices} & {*b.token_indices})
        return f"both have a row of their own for the token `{both[0]}`" if both else None

    def forward(self, a: View, call: Program, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        host: Host = a.layer.host
        y: Tensor = call(x, *args, **kwargs)
        tokens, order = a.trainable_tokens_index
        if isinstance(host, EmbeddingHost):
            place = torch.searchsorted(tokens, x).clamp(max=len(tokens) - 1)  # of each input among the tokens
            rows = host.scaled(F.embedding(order[place], self.trained(a, host)))
            return torch.where((tokens[place] == x).unsqueeze(-1), rows.to(y.dtype), y)
        weight = a.trainable_tokens_delta[order].to(x.dtype)
        bias = None if host.bias is None else host.bias[tokens]
        return y.index_copy(-1, tokens, F.linear(x, weight, bias).to(y.dtype))

    def trained(self, a: View, host: Host) -> Tensor:
        """The rows; that of the padding token gets no gradient, as in its table."""
        delta: Tensor = a.trainable_tokens_delta
        padding: Any = getattr(host.layer, "padding_idx", None)
        if padding is None or padding not in a.token_indices:
            return delta
        frozen = torch.arange(len(delta), device=delta.device) == a.token_indices.index(padding)
        return torch.where(frozen.unsqueeze(-1), delta.detach(), delta)

    def merge(self, a: View, dense: Dense, rows: slice = ALL_ROWS) -> Dense:
        host: Host = a.layer.host
        tokens, order = a.trainable_tokens_index
        delta = widened(a.trainable_tokens_delta[order])  # (n, dim)
        if isinstance(host, EmbeddingHost):
            return Dense(
                dense.weight.index_copy(1, tokens, host.take(delta.T, rows).to(dense.weight.dtype)), dense.bias
            )
        start, stop, _ = rows.indices(vocabulary(host))
        here = (tokens >= start) & (tokens < stop)
        return Dense(dense.weight.index_copy(0, tokens[here] - start, delta[here].to(dense.weight.dtype)), dense.bias)

    # ---- other layers on the same table
    def why_not_follow(self, host: Host, leader: Host, config: Any, paths: tuple[str, str]) -> str | None:
        if host.packed or not isinstance(host, EmbeddingHost | LinearHost):
            return f"trainable tokens have no form for {host.name}"
        mine, theirs = (tokens_at(config, path) for path in paths)
        return None if mine in (None, theirs) else f"they are given the tokens {show(mine)} and {show(theirs)}"

    def follow(self, host: Host, leader: View) -> dict[str, Any]:
        own = parts(leader.trainable_tokens_delta, leader.trainable_tokens_index)
        return {**own, "token_indices": leader.token_indices}

    def led(self, host: Host, leader: Host, suffix: str) -> tuple[str, bool] | None:
        return suffix, False


def parts(delta: Tensor, index: Tensor) -> dict[str, Any]:
    """The slots' values."""
    return {"trainable_tokens_delta": delta, "trainable_tokens_index": index}


def vocabulary(host: Host) -> int:
    """How many tokens a layer knows."""
    return host.shape[1] if isinstance(host, EmbeddingHost) else host.shape[0]


def width(host: Host) -> int:
    """How many numbers stand for a token."""
    return host.shape[0] if isinstance(host, EmbeddingHost) else host.shape[1]


def by_token(host: Host, weight: Tensor) -> Tensor:
    """A canonical weight as (vocabulary, dim)."""
    return weight.T if isinstance(host, EmbeddingHost) else weight


_VARIANT = TrainableTokens()
_INDEX = Slot("trainable_tokens_index", BufferSlot, trainable=False, derived=True)

register_config(PeftType.TRAINABLE_TOKENS, TrainableTokensConfig)

TRAINABLE_TOKENS = register(
    TunerSpec(
        peft_type=PeftType.TRAINABLE_TOKENS.value,
        slots=(Slot("trainable_tokens_delta"), _INDEX),
        numbers=("token_indices",),
        variant_for=lambda config: _VARIANT,
        label=lambda host: "TrainableTokensLayer",
        few_rows=True,
    )
)

TOKEN_ADAPTER = register_companion(
    Companion(
        tuner=TunerSpec(
            peft_type="TOKEN_ADAPTER",
            slots=(Slot("trainable_tokens_delta", file_name="token_adapter.trainable_tokens_delta"), _INDEX),
            numbers=("token_indices",),
            variant_for=lambda config: _VARIANT,
            label=lambda host: "TrainableTokensWrapper",
            base_file="token_adapter.base_layer",
            few_rows=True,
            followers_in_files=False,
        ),
        field=TOKENS_FIELD,
        targets=named_by,
        whole=False,
    )
)
