"""What is changed in `PreTrainedModel` itself: how models with adapters are saved, and what is remembered."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from peftlite.integrations.transformers.owners import FLAG
from peftlite.registry import later

if TYPE_CHECKING:
    from peftlite.core import tree
    from peftlite.integrations.transformers import saving
else:
    tree = later("peftlite.core.tree")
    saving = later("peftlite.integrations.transformers.saving")

Method = Callable[..., Any]

FIRST = "_peftlite_first_vocab_size"
"""Where a model keeps the size that its vocabulary had before it was first changed."""
_ours: set[Method] = set()


def patch(cls: Any) -> None:
    """Have models with adapters in place save and push these, and all models remember that size; once per class."""
    if cls.save_pretrained in _ours:
        return
    cls.save_pretrained = _saving(cls.save_pretrained)
    cls.push_to_hub = _pushing(cls.push_to_hub)
    cls.resize_token_embeddings = _remembering(cls.resize_token_embeddings)
    _ours.add(cls.save_pretrained)


def vocabulary(model: Any) -> int | None:
    """How many tokens a transformers model knows, as its config says."""
    size: int | None = getattr(model.config.get_text_config(), "vocab_size", None)
    return size


def _saves_adapters(model: nn.Module) -> bool:
    return tree.find_state(model) is not None and bool(getattr(model, FLAG))


def _saving(original: Method) -> Method:
    @functools.wraps(original)
    def save_pretrained(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not _saves_adapters(self):
            return original(self, *args, **kwargs)
        return saving.save(self, inspect.signature(original).bind(self, *args, **kwargs).arguments)

    return save_pretrained


def _pushing(original: Method) -> Method:
    @functools.wraps(original)
    def push_to_hub(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (saving.push if _saves_adapters(self) else original)(self, *args, **kwargs)

    return push_to_hub


def _remembering(original: Method) -> Method:
    @functools.wraps(original)
    def resize_token_embeddings(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = vocabulary(self)
        found = original(self, *args, **kwargs)
        self.__dict__.setdefault(FIRST, before)
        return found

    return resize_token_embeddings
