"""The config fields that most methods have, checked in one place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peftlite.checks import (
    check_count,
    check_indices,
    check_int,
    check_names,
    check_names_or_regex,
    check_number,
    check_regex,
    show,
    wrong,
)
from peftlite.config import PeftConfig
from peftlite.errors import ConfigError
from peftlite.patterns import single

if TYPE_CHECKING:
    from peftlite.core.hosts import Host

TOKENS_FIELD = "trainable_token_indices"
Tokens = list[int]


def check_targets(config: PeftConfig) -> None:
    """Bring the fields that name modules, as far as `config` has them, into their plain form.

    Raises: ConfigError.
    """
    fields: dict[str, Any] = config.__dict__
    for name in ("target_modules", "exclude_modules"):
        if name in fields:
            fields[name] = check_names_or_regex(name, fields[name])
    if "target_parameters" in fields:
        fields["target_parameters"] = check_names("target_parameters", fields["target_parameters"])
    if "modules_to_save" in fields:
        fields["modules_to_save"] = check_names("modules_to_save", fields["modules_to_save"], sort=False)
    if "layers_to_transform" in fields:
        fields["layers_to_transform"] = check_indices("layers_to_transform", fields["layers_to_transform"])
        fields["layers_pattern"] = _layers_pattern(fields["layers_pattern"])
        _check_layers(fields)


def _layers_pattern(value: Any) -> list[str] | str | None:
    if isinstance(value, str):
        return check_regex("layers_pattern", value, single)
    names = check_names("layers_pattern", value, sort=False)
    check_count("layers_pattern", names or ())
    for name in names or ():
        check_regex("layers_pattern", name, single)
    return names


def _check_layers(fields: dict[str, Any]) -> None:
    for name in ("layers_to_transform", "layers_pattern"):
        if isinstance(fields["target_modules"], str) and fields[name] not in (None, [], ""):
            raise ConfigError(
                f"`{name}` is {show(fields[name])}, but it only works with names in `target_modules`, "
                f"in a list; that is {show(fields['target_modules'])}. Nothing was changed."
            )
    if fields["layers_pattern"] and fields["layers_to_transform"] is None:
        raise ConfigError(
            f"`layers_pattern` is {show(fields['layers_pattern'])}, but `layers_to_transform` does not say "
            "which layers; give it their indices. Nothing was changed."
        )


def check_probability(field: str, value: object) -> float:
    """A probability below 1: of dropping something, which must leave something."""
    number = check_number(field, value)
    if not 0 <= number < 1:
        raise wrong(field, value, "a probability below 1 (and not below 0)")
    return number


def check_tokens(name: str, value: object) -> Tokens:
    """Indices of tokens, at least one, each once, in the order given.

    Raises: ConfigError.
    """
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        raise wrong(name, value, "a list of indices of tokens")
    tokens = [check_int(name, item, 0) for item in value]
    if not tokens or len(set(tokens)) < len(tokens):
        raise wrong(name, value, "a list of at least one index, each once")
    return tokens


def check_token_field(value: object) -> Tokens | dict[str, Tokens] | None:
    """What `trainable_token_indices` can be: tokens, or tokens for each of the embeddings named.

    Raises: ConfigError.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping):
        return check_tokens(TOKENS_FIELD, value)
    if not value or not all(isinstance(name, str) and name for name in value):
        raise wrong(TOKENS_FIELD, value, "a dict from names of embeddings to lists of tokens")
    return {name: check_tokens(f"{TOKENS_FIELD}[{name!r}]", tokens) for name, tokens in value.items()}


def note_storage(config: Any, hosts: Sequence[tuple[str, Host]]) -> None:
    """Note in the model's own config how the adapted weights are stored, as readers of the file expect it."""
    config.fan_in_fan_out = any(host.transposed for _, host in hosts)
