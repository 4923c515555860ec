"""Names of adapter files, and their keys <-> places in a model, both ways; pure string work.

    in a file               base_model.model.model.layers.0.q_proj.lora_A.weight
                            '-- prefix -----''-- path of the layer --''-- suffix -'
    in a wrapped model      base_model.model.model.layers.0.q_proj.lora_A.default.weight
    in an in-place model                     model.layers.0.q_proj.lora_A.default.weight

A file never holds an adapter's name, and its keys are the same whichever shape the adapter was saved from. What all
layers of an adapter share belongs to no layer: `base_model.vera_A`.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from functools import lru_cache
from itertools import islice, pairwise
from typing import NamedTuple

CONFIG_NAME = "adapter_config.json"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
WEIGHTS_NAME = "adapter_model.bin"
RECORD_NAME = "peftlite.json"

PREFIX = "base_model.model."
MODULES_TO_SAVE = "modules_to_save"
WRAPPER_PARTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""What torch.compile, FSDP and activation checkpointing put into the names of parameters."""

_SHOWN = 160
_MANY = 4000
_NUMBER = re.compile(r"\d+")


def file_key(path: str, suffix: str) -> str:
    """A file's key: `("lm_head", "lora_A.weight")` -> `base_model.model.lm_head.lora_A.weight`."""
    return PREFIX + (f"{path}.{suffix}" if path else suffix)


def shared_key(slot: str) -> str:
    """The key of a tensor that all layers share: `base_model.vera_A`."""
    return f"base_model.{slot}"


def split_file_key(key: str, suffixes: Iterable[str]) -> tuple[str, str] | None:
    """The (path, suffix) that `file_key` made `key` of, given the suffixes that can occur; None for any other key."""
    if not key.startswith(PREFIX):
        return None
    rest = key[len(PREFIX) :]
    for suffix, ending in _longest_first(tuple(suffixes)):
        if rest.endswith(ending):
            return rest[: -len(ending)], suffix
        if rest == suffix:
            return "", suffix
    return None


@lru_cache(64)
def _longest_first(suffixes: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(suffix, f".{suffix}") for suffix in sorted(suffixes, key=len, reverse=True)]


def with_prefix(key: str) -> str:
    """`key` as files have it. A key that begins with the prefix is taken to have it already."""
    return key if key.startswith(PREFIX) else PREFIX + key


def without_prefix(key: str) -> str:
    """`key` relative to the base model."""
    return key.removeprefix(PREFIX)


def unwrapped(key: str) -> str:
    """`key` without what DataParallel, torch.compile, FSDP and checkpoint wrappers put into names."""
    parts = key.split(".")
    kept = [part for part in parts if part not in WRAPPER_PARTS]
    while len(kept) > 1 and kept[0] == "module":
        kept = kept[1:]
    return ".".join(kept)


def strip_adapter(live_key: str, adapter_name: str, slots: Collection[str]) -> str | None:
    """A key of `state_dict()` without the adapter's name; None if it does not belong to that adapter.

    `slots` are the names of the containers ("lora_A", ...): the part that follows one is an adapter's name. The
    container of copies of whole modules goes with it: `lm_head.modules_to_save.default.weight` -> `lm_head.weight`.
    """
    parts = live_key.split(".")
    for at in range(len(parts) - 2, -1, -1):
        if parts[at] in slots or parts[at] == MODULES_TO_SAVE:
            if parts[at + 1] != adapter_name:
                return None
            head = parts[:at] if parts[at] == MODULES_TO_SAVE else parts[: at + 1]
            return ".".join(head + parts[at + 2 :])
    return None


def without_name(key: str) -> str:
    """`key` without an adapter's name that PEFT left in it, as in `head.modules_to_save.default.dense.bias`."""
    above, separator, inside = key.partition(f".{MODULES_TO_SAVE}.")
    return above + separator + inside.partition(".")[2]


def add_adapter(key: str, adapter_name: str, slots: Collection[str]) -> str | None:
    """The inverse of `strip_adapter`; None for keys without a slot (a whole module's copy, a base weight)."""
    parts = key.split(".")
    for at in range(len(parts) - 1, -1, -1):
        if parts[at] in slots:
            return ".".join([*parts[: at + 1], adapter_name, *parts[at + 1 :]])
    return None


def shown(key: str) -> str:
    """A key from an untrusted file, fit for an error message: printable, one line, and not endless."""
    text = "".join("'" if c == "`" else c if c.isprintable() else ascii(c)[1:-1] for c in key[: _SHOWN + 1])
    return f"`{text[:_SHOWN]}...`" if len(text) > _SHOWN else f"`{text}`"


def nearest_keys(key: str, choices: Collection[str], n: int = 1) -> list[str]:
    """The choices most like `key`: by the parts between dots first, by their letters then."""
    wanted = Counter(key[:1000].split("."))
    if len(choices) > _MANY:
        ending = "." + key.rpartition(".")[2]
        choices = list(islice((c for c in choices if c.endswith(ending)), _MANY))
    scored = [(sum((wanted & Counter(c.split("."))).values()), c) for c in choices]
    best = sorted(scored, key=lambda pair: (-pair[0], pair[1]))[:40]
    return difflib.get_close_matches(key[:1000], [c for score, c in best if score], n=n, cutoff=0.4)


# ---- why keys do not fit


class Cause(NamedTuple):
    """A likely cause of a mismatch in words, and what to do to a file's key to mend it (None where nothing would)."""

    text: str
    mend: Callable[[str], str] | None = None


def diagnose(expected: Collection[str], found: Collection[str], slots: Collection[str] = ()) -> Cause | None:
    """Why the keys `found` in a file are not those `expected` by the model: the likeliest cause, or None for no idea.

    Both are file keys, as `file_key` makes them.
    """
    missing, unexpected = set(expected) - set(found), sorted(set(found) - set(expected))
    if not unexpected:
        return _unfound(missing, expected)
    if not missing:
        return _too_many(unexpected, expected)
    candidates = [*_wrapper_causes(unexpected), *_name_causes(unexpected, slots), *_prefix_causes(unexpected, missing)]
    hits = [(sum(cause.mend(key) in missing for key in unexpected), cause) for cause in candidates if cause.mend]
    best = max(hits, key=lambda hit: hit[0], default=None)
    if best is not None and 2 * best[0] >= min(len(unexpected), len(missing)):
        return best[1]
    return _other_depth(unexpected, expected) or _other_architecture(unexpected, expected)


def _wrapper_causes(unexpected: list[str]) -> list[Cause]:
    """Prefixes that a wrapper adds, or that saving by hand forgets."""
    causes = [
        Cause(f"the file's keys lack the prefix `{PREFIX}`", with_prefix),
        Cause("the file's keys begin with `base_model.` instead of `base_model.model.`", _after_base_model),
        Cause(f"the file's keys have the prefix `{PREFIX}` twice (a wrapped model was wrapped again)", without_prefix),
    ]
    for part in ("module", *sorted(WRAPPER_PARTS)):
        if any(part in key.split(".") for key in unexpected):
            text = f"the file's keys contain `{part}.`, which a wrapper of the model put there"
            causes.append(Cause(text, _dropper(part)))
    return causes


def _after_base_model(key: str) -> str:
    return with_prefix(key.removeprefix("base_model."))


def _dropper(part: str) -> Callable[[str], str]:
    def drop(key: str) -> str:
        return with_prefix(".".join(p for p in key.split(".") if p != part))

    return drop


def _name_causes(unexpected: list[str], slots: Collection[str]) -> list[Cause]:
    """An adapter's name inside the keys: files of early versions, or `model.state_dict()` saved by hand."""
    after: Counter[str] = Counter()
    for key in unexpected:
        parts = key.split(".")
        after.update(b for a, b in pairwise(parts) if a in slots or a == MODULES_TO_SAVE)
    names = [name for name, _ in after.most_common(2) if name not in {"weight", "bias"}]
    text = "the file's keys contain an adapter's name, {}"
    return [Cause(text.format(shown(name)), _stripper(name, slots)) for name in names]


def _stripper(name: str, slots: Collection[str]) -> Callable[[str], str]:
    def strip(key: str) -> str:
        return with_prefix(strip_adapter(key, name, slots) or key)

    return strip


def _prefix_causes(unexpected: list[str], missing: Collection[str]) -> list[Cause]:
    """Another beginning of the path: saved from a model with a head, loaded into the one without, or the reverse."""
    pairs: Counter[tuple[str, str]] = Counter()
    for key in unexpected[:5]:
        for choice in nearest_keys(key, missing, n=3):
            pairs[_unlike_heads(key, choice)] += 1
    words = "the file's keys begin with {} where this model's begin with {}"
    return [
        Cause(words.format(shown(mine), shown(theirs)), _replacer(mine, theirs))
        for (mine, theirs), _ in pairs.most_common(3)
        if mine != theirs and not _NUMBER.search(mine + theirs)  # beyond a layer's number it is another layer
    ]


def _unlike_heads(key: str, choice: str) -> tuple[str, str]:
    """What is left of two keys when the parts that they end with alike are taken away."""
    mine, theirs = key.split("."), choice.split(".")
    while mine and theirs and mine[-1] == theirs[-1]:
        mine, theirs = mine[:-1], theirs[:-1]
    return ".".join([*mine, ""]), ".".join([*theirs, ""])


def _replacer(old: str, new: str) -> Callable[[str], str]:
    def replace(key: str) -> str:
        return new + key[len(old) :] if key.startswith(old) else key

    return replace


def _shape_of(key: str) -> str:
    return _NUMBER.sub("#", key)


def _last_index(keys: Iterable[str]) -> int:
    return max((int(n) for key in keys for n in _NUMBER.findall(key)[:1] if len(n) < 10), default=-1)


def _other_depth(unexpected: list[str], expected: Collection[str]) -> Cause | None:
    """The same modules, in more layers than the model has."""
    kinds = {_shape_of(key) for key in expected}
    if not kinds or any(_shape_of(key) not in kinds for key in unexpected):
        return None
    return Cause(
        f"the adapter was made on a model with more layers (the file has an index {_last_index(unexpected)}, "
        f"this adapter's layers end at {_last_index(expected)})"
    )


def _other_architecture(unexpected: list[str], expected: Collection[str]) -> Cause | None:
    """Names of modules that the model has nowhere."""
    known = {part for key in expected for part in key.split(".")}
    parts = (part for key in unexpected for part in reversed(key.split(".")))
    strange = Counter(part for part in parts if part not in known and not part.isdigit())
    if not strange:
        return None
    names = ", ".join(shown(name) for name, _ in strange.most_common(3))
    return Cause(f"the adapter was made for another architecture or with other targets: no {names} is expected here")


def _too_many(unexpected: list[str], expected: Collection[str]) -> Cause | None:
    """Everything expected is there, and more."""
    return _other_depth(unexpected, expected) or Cause(
        "the file holds more than its config accounts for: the config was changed, or belongs to other weights"
    )


def _unfound(missing: Collection[str], expected: Collection[str]) -> Cause | None:
    """Nothing that is not expected is there, but not all that is."""
    if not missing:
        return None
    if len(missing) == len(expected):
        return Cause("the file holds no tensors")
    present = set(expected) - set(missing)
    if all(_shape_of(key) in {_shape_of(p) for p in present} for key in missing):
        return Cause("the adapter was made on a model with fewer layers, or on a part of these layers")
    return Cause("the file was not saved completely, or its config was changed afterwards")
