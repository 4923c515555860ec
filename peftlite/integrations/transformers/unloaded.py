"""What a transformers model says of its weights, after adapters were merged for good: tied or not, quantised or not."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from peftlite.core.transaction import drop, keep, keep_all, put
from peftlite.errors import warn

QUANTISED = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")
"""Attributes of a model that was loaded quantised."""


def follow_weights(model: Any, dequantised: bool) -> None:
    """Make the model's config agree with its weights, so that it can be saved and loaded."""
    for part in tied_parts(model):
        untie(part)
    if dequantised:
        for part in models_in(model):
            forget_quantisation(part)


def models_in(model: nn.Module) -> Iterator[Any]:
    """The transformers models that a model is made of, itself included."""
    from transformers import PreTrainedModel

    return (part for part in model.modules() if isinstance(part, PreTrainedModel))


def tied_parts(model: nn.Module) -> list[Any]:
    """Those of them whose config says that their embeddings are tied."""
    return [part for part in models_in(model) if getattr(part.config, "tie_word_embeddings", False)]


def untie(model: Any) -> None:
    """Set `config.tie_word_embeddings` to False if weights that it says are tied are not.

    Others that still are get tensors of their own: such a model is saved and loaded with one for each name. The
    config of some types of model (T5) has no False; there, loading ties what is missing from the files only.
    """
    pairs = tied_pairs(model)
    broken = [target for target, source in pairs.items() if named(model, target) is not named(model, source)]
    if not broken:
        return
    accepted = accepts_untied(model.config) and not reads_flag(model)
    set_apart(model, list(pairs) if accepted else broken, pairs.values())
    if accepted:
        keep(model.config.__dict__, "tie_word_embeddings")
        model.config.tie_word_embeddings = False
    keys = getattr(model, "all_tied_weights_keys", {})
    for target in broken:
        drop(keys, target)
    names = ", ".join(f"`{target}`" for target in broken)
    warn(
        f"{names} of {type(model).__name__}, tied to the input embeddings before, differ from them now that adapters "
        f"are merged; `config.tie_word_embeddings` is {model.config.tie_word_embeddings}."
    )


def set_apart(model: nn.Module, targets: Iterable[str], sources: Iterable[str]) -> None:
    """Give those of these parameters tensors of their own that have a source's, or one another's."""
    taken = {id(named(model, source)) for source in sources}
    for target in targets:
        tensor = named(model, target)
        if id(tensor) in taken:
            module, _, name = target.rpartition(".")
            tensor = nn.Parameter(tensor.detach().clone(), tensor.requires_grad)
            put(model.get_submodule(module)._parameters, name, tensor)
        taken.add(id(tensor))


def tied_pairs(model: Any) -> dict[str, str]:
    """Name of a parameter -> name of the one that it should be, both relative to `model`."""
    expanded = getattr(model, "get_expanded_tied_weights_keys", None)
    if expanded is not None:
        return dict(expanded(all_submodels=False))
    source, target = model.get_input_embeddings(), model.get_output_embeddings()  # transformers 4
    if source is None or target is None:
        return {}
    paths = {id(module): path for path, module in model.named_modules()}
    return {f"{paths[id(target)]}.weight": f"{paths[id(source)]}.weight"}


def named(model: nn.Module, name: str) -> Any:
    """A parameter by its name."""
    module, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(module), leaf)


def accepts_untied(config: Any) -> bool:
    """Whether a config of this class can say, when it is loaded, that embeddings are not tied."""
    values = {**config.to_dict(), "tie_word_embeddings": False}
    return not type(config).from_dict(values).tie_word_embeddings


def reads_flag(model: nn.Module) -> bool:
    """Whether the outputs depend on what the config says, as those of T5 do in transformers 4, which scales them."""
    return "tie_word_embeddings" in inspect.unwrap(type(model).forward).__code__.co_names


def forget_quantisation(model: Any) -> None:
    """Take away what says that a model is quantised: none of its layers is."""
    keep_all(model.__dict__)
    keep_all(model.config.__dict__)
    for name in QUANTISED:
        if name in model.__dict__:
            delattr(model, name)
    if "quantization_config" in model.config.__dict__:
        del model.config.quantization_config
    for name in ("_is_quantized", "_pre_quantization_dtype"):
        model.config.__dict__.pop(name, None)
