"""Making a model's adapters ready for being swapped under compiled code."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from peftlite.checkpoint.state_dict import check_unmerged
from peftlite.checks import check_choice, check_int
from peftlite.core.binding import rebind
from peftlite.core.lifecycle import state_of
from peftlite.core.transaction import atomic, keep
from peftlite.errors import StateError, warn
from peftlite.hotswap.compatible import lora_config
from peftlite.hotswap.place import Place, put_numbers, resize, scaling_as_tensor
from peftlite.tuners.lora.config import LoraConfig
from peftlite.tuners.lora.fit import adapted, fitted
from peftlite.tuners.lora.variant import LORA


@atomic
def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | Mapping[str, LoraConfig] | None = None,
    check_compiled: str = "error",
) -> None:
    """Let the LoRA adapters of `model` be hotswapped without torch.compile compiling again. Call it before compiling.

    Scalings become tensors, and factors are padded with zeros to `target_rank`; the adapters' effect stays the same.
    Their configs then say the new rank and alpha, so that they are saved as they are.

    Args:
        model: a model with adapters.
        target_rank: the largest rank of all adapters that are to come.
        config: ranks are read off the layers, so this changes nothing.
        check_compiled: what to do about a model that is compiled already: "error", "warn" or "ignore".

    Raises:
        StateError: the model is compiled already, or an adapter is merged.
        ConfigError: an adapter's rank exceeds `target_rank`, or cannot be changed.
        NoAdapterError: there is none.
    """
    check_not_compiled(model, check_choice("check_compiled", check_compiled, ("error", "warn", "ignore")))
    rank = None if target_rank is None else check_int("target_rank", target_rank, 1)
    state = state_of(model)
    places = [Place(p, layer, name) for p, layer in adapted(model) if layer.tuner is LORA for name in layer.variants]
    for name in state.configs:
        check_unmerged(model, name)
    wide = [({} if rank is None else place.widened(rank)) for place in places]
    numbers: dict[str, dict[str, tuple[int, float]]] = {}
    for place in places:
        r, scaling = place.layer.r[place.name], float(place.layer.scaling[place.name])
        numbers.setdefault(place.name, {})[place.path] = (r if rank is None else rank, scaling)
    configs = {name: fitted(lora_config(state.configs[name]), of_name) for name, of_name in numbers.items()}
    for place, tensors in zip(places, wide, strict=True):
        path, layer, name = place.path, place.layer, place.name
        for suffix, tensor in tensors.items():
            layer.assign(name, suffix, tensor)
        resize(layer, name)
        scaling_as_tensor(layer, name)
        put_numbers(layer, name, numbers[name][path][0], configs[name].alpha_for(path), configs[name].scaling_for(path))
    keep(state.configs, *configs)
    state.configs.update(configs)
    rebind(model, state)


def check_not_compiled(model: nn.Module, policy: str) -> None:
    """Do about a compiled model what the policy says.

    Raises: StateError.
    """
    compiled = any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in model.modules())
    text = "The model is compiled already: call `prepare_model_for_compiled_hotswap` before `torch.compile`."
    if compiled and policy == "error":
        raise StateError(f"{text} Nothing was changed.")
    if compiled and policy == "warn":
        warn(text)
