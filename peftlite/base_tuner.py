"""The inner wrapper, PEFT's `LoraModel` and its like: a model's adapters as methods. Every one calls the core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Generator, nn

from peftlite.config import PeftConfig, PeftType
from peftlite.core import leaving, lifecycle
from peftlite.core.call import Call
from peftlite.core.inject import check_config, inject
from peftlite.core.merging import Undo
from peftlite.core.transaction import atomic, keep, keep_all
from peftlite.core.tree import Shell, base_model_of, find_state, named_layers
from peftlite.core.variant import tuner_for
from peftlite.errors import AdapterNameError, ConfigError, StateError, nearest
from peftlite.registry import later

if TYPE_CHECKING:
    from peftlite.tuners import combine
    from peftlite.tuners.adalora import allocation
    from peftlite.tuners.lora import lowrank
else:
    combine = later("peftlite.tuners.combine")
    allocation = later("peftlite.tuners.adalora.allocation")
    lowrank = later("peftlite.tuners.lora.lowrank")


class Wrapper(Shell):
    """A module around another one: calls and attributes pass through, the lifecycle of its adapters are methods."""

    inside: ClassVar[str]
    """The name under which the wrapped module is registered."""

    def inner(self) -> nn.Module:
        module: Any = self._modules[self.inside]
        return module  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == self.inside or self.inside not in self.__dict__.get("_modules", ()):
                raise
            return getattr(self.inner(), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner()(*args, **kwargs)

    # ---- what there is
    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The config of each adapter."""
        state = find_state(self)
        return {} if state is None else state.configs

    @property
    def active_adapters(self) -> list[str]:
        """The names of the adapters in use."""
        state = find_state(self)
        return [] if state is None else list(state.active)

    # ---- which are in use
    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Use these adapters, and no others, from now on; see `peftlite.set_adapter`."""
        lifecycle.set_adapter(self, adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Whether these adapters may train: their parameters require gradients while they are active."""
        lifecycle.set_requires_grad(self, adapter_names, requires_grad)

    def enable_adapter_layers(self) -> None:
        """Switch the adapters on again."""
        lifecycle.enable_adapters(self)

    def disable_adapter_layers(self) -> None:
        """Switch all adapters off until `enable_adapter_layers`."""
        lifecycle.disable_adapters(self)

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Calls inside the `with` block run on the base model; afterwards everything is as it was."""
        return lifecycle.disable_adapter(self)

    def use_adapter(self, *adapter_names: str) -> AbstractContextManager[Call]:
        """Calls that this thread makes inside the `with` block use these adapters; nothing is written to the model."""
        return lifecycle.use_adapter(self, *adapter_names)

    def scale_adapter(self, adapter_name: str, factor: float) -> None:
        """Multiply one adapter's scaling by `factor` on every layer."""
        lifecycle.scale_adapter(self, adapter_name, factor)

    # ---- merging and leaving
    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False, *, undo: Undo = "device"
    ) -> None:
        """Merge adapters (default: the active ones) into the base weights; see `peftlite.merge_adapter`."""
        lifecycle.merge_adapter(self, adapter_names, safe_merge, undo=undo)

    def unmerge_adapter(self, adapter_names: Sequence[str] | None = None) -> None:
        """Take adapters (default: all) out of the base weights again, bit for bit."""
        lifecycle.unmerge_adapter(self, adapter_names)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        *,
        dequantize: bool = False,
        undo: Undo = None,
    ) -> nn.Module:
        """Merge adapters (default: the active ones) for good and give back the base model, without adapter layers.

        With `dequantize`, quantised layers become dense ones; see `peftlite.merge_and_unload`.
        """
        return leaving.merge_and_unload(self, progressbar, safe_merge, adapter_names, dequantize=dequantize, undo=undo)

    def unload(self) -> nn.Module:
        """Give back the base model as it was, without adapter layers."""
        return leaving.unload(self)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from every layer; see `peftlite.delete_adapter`."""
        leaving.delete_adapter(self, adapter_name)


class BaseTuner(Wrapper):
    """A model and its adapters of one kind: `BaseTuner.model` is the base model, with the adapters in place.

    Args:
        model: the base model, changed in place.
        peft_config: what to add, or a dict that has it under `adapter_name`.
        adapter_name: the adapter's name.
        low_cpu_mem_usage: make the adapter's tensors on the meta device, to be loaded.
        autocast_adapter_dtype: keep adapters in fp32 on a base in half precision.

    Raises:
        StateError: `model` has adapters.
        ConfigError: the config is of another kind.
        AdapterNameError, TargetNotFoundError, UnsupportedLayerError: as `peftlite.plan`. The model is then as it was.
    """

    inside = "model"
    kind: ClassVar[PeftType]
    prefix: ClassVar[str] = ""
    """What the names of the adapters' parameters begin with."""

    model: nn.Module

    @atomic
    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | Mapping[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        *,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        super().__init__()
        config = _config_named(adapter_name, peft_config)
        check_bare(model)
        check_config(config)
        check_kind(self, self.kind, config.peft_type)
        inject(
            model,
            config,
            adapter_name,
            low_cpu_mem_usage=low_cpu_mem_usage,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )
        self.model = model

    @classmethod
    def around(cls, model: nn.Module) -> BaseTuner:
        """The wrapper of a model that has its adapters already."""
        tuner = cls.__new__(cls)
        nn.Module.__init__(tuner)
        tuner._hold(model)
        return tuner

    def _hold(self, model: nn.Module) -> None:
        self.model = model
        state = find_state(model)
        self._modules.update(state.shared if state is not None else {})  # where readers of PEFT's models look for them

    @property
    def active_adapter(self) -> list[str]:
        """The same as `active_adapters`."""
        return self.active_adapters

    @property
    def targeted_module_names(self) -> list[str]:
        """The paths of the base model's layers that have adapters (not those trained whole)."""
        return [path for path, layer in named_layers(self) if layer.tuner.peft_type == self.kind.value]

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """The config of a transformers model as a dict; of any other, `{"model_type": "custom"}`."""
        config = getattr(model, "config", None)
        if isinstance(config, dict):
            return config
        return dict(config.to_dict()) if config is not None else {"model_type": "custom"}


class LoraModel(BaseTuner):
    """A model with LoRA adapters (https://arxiv.org/abs/2106.09685)."""

    kind = PeftType.LORA
    prefix = "lora_"

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
        *,
        seed: int | Generator | None = None,
    ) -> lowrank.Approximation:
        """Add a combination of adapters, exact unless `svd_rank` is given; see `peftlite.add_weighted_adapter`."""
        return combine.add_weighted_adapter(
            self,
            adapters,
            weights,
            adapter_name,
            combination_type,
            svd_rank,
            svd_clamp,
            svd_full_matrices,
            svd_driver,
            density,
            majority_sign_method,
            seed=seed,
        )


class IA3Model(BaseTuner):
    """A model with (IA)^3 adapters (https://arxiv.org/abs/2205.05638)."""

    kind = PeftType.IA3
    prefix = "ia3_"

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Add an adapter whose scales are the weighted sum of those of others."""
        combine.add_weighted_adapter(self, adapters, weights, adapter_name)


class LNTuningModel(BaseTuner):
    """A model whose layer norms train (https://arxiv.org/abs/2312.11420)."""

    kind = PeftType.LN_TUNING
    prefix = "ln_tuning_"


class LoHaModel(BaseTuner):
    """A model with LoHa adapters (https://arxiv.org/abs/2108.06098)."""

    kind = PeftType.LOHA
    prefix = "hada_"


class LoKrModel(BaseTuner):
    """A model with LoKr adapters (https://arxiv.org/abs/2212.10650)."""

    kind = PeftType.LOKR
    prefix = "lokr_"


class AdaLoraModel(BaseTuner):
    """A model with AdaLoRA adapters (https://arxiv.org/abs/2303.10512)."""

    kind = PeftType.ADALORA
    prefix = "lora_"

    def update_and_allocate(self, global_step: int) -> None:
        """Between `optimizer.step()` and `zero_grad()`; see `peftlite.update_and_allocate`."""
        allocation.update_and_allocate(self, global_step)


class TrainableTokensModel(BaseTuner):
    """A model with a few rows of its embeddings training."""

    kind = PeftType.TRAINABLE_TOKENS
    prefix = "trainable_tokens_"


class VeraModel(BaseTuner):
    """A model with VeRA adapters (https://arxiv.org/abs/2310.11454)."""

    kind = PeftType.VERA
    prefix = "vera_lambda_"


TUNER_MODELS: dict[PeftType, type[BaseTuner]] = {
    cls.kind: cls
    for cls in (
        LoraModel,
        AdaLoraModel,
        IA3Model,
        LNTuningModel,
        LoHaModel,
        LoKrModel,
        TrainableTokensModel,
        VeraModel,
    )
}


def tuner_model_for(config: PeftConfig) -> type[BaseTuner]:
    """The inner wrapper class for adapters of a config's kind.

    Raises: ConfigError for a kind that no tuner implements.
    """
    tuner_for(config)
    return TUNER_MODELS[PeftType(str(getattr(config.peft_type, "value", config.peft_type)))]


def check_bare(model: nn.Module) -> None:
    """Refuse to wrap what is wrapped, or has adapters.

    Raises: StateError.
    """
    if isinstance(model, Shell):
        raise StateError(
            f"`{type(model).__name__}` is a wrapper already: call its `add_adapter` (or `load_adapter`) for another "
            "adapter, or wrap the base model that its `unload` gives. Nothing was changed."
        )
    state = find_state(model)
    if state is not None:
        names = ", ".join(f"`{name}`" for name in state.configs)
        raise StateError(
            f"{type(base_model_of(model)).__name__} has adapters already ({names}): call `peftlite.wrap(model)` for a "
            "wrapper around it, and `add_adapter` or `load_adapter` on that for another adapter. Nothing was changed."
        )


def is_checkpointing(model: nn.Module) -> bool:
    """Whether a model of transformers recomputes activations; it asks all of its modules."""
    checkpointing = getattr(model, "is_activation_checkpointing", None)  # in older versions `is_gradient_checkpointing`
    return bool(getattr(model, "is_gradient_checkpointing", False) if checkpointing is None else checkpointing)


def require_gradients_of_inputs(model: nn.Module) -> None:
    """Have the embeddings' output require gradients: under gradient checkpointing, no layer would get any otherwise."""
    keep(model.__dict__, "_require_grads_hook", "_require_grads_hooks")
    for module in model.modules():
        keep_all(module._forward_hooks)
    if (enable := getattr(model, "enable_input_require_grads", None)) is not None:
        enable()
    elif (embeddings := getattr(model, "get_input_embeddings", None)) is not None:
        embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))


def check_kind(wrapper: Wrapper, kind: PeftType, given: object) -> None:
    """Refuse adapters of another kind than a wrapper's.

    Raises: ConfigError.
    """
    found = str(getattr(given, "value", given))
    if found != kind.value:
        raise ConfigError(
            f"`peft_type={found!r}`: a {type(wrapper).__name__} whose adapters are of the kind `{kind.value}` takes no "
            "other. Nothing was changed."
        )


def _config_named(name: str, config: PeftConfig | Mapping[str, PeftConfig]) -> PeftConfig:
    if not isinstance(config, Mapping):
        return config
    if name not in config:
        raise AdapterNameError(f"`peft_config` has no `{name}`; nearest: {nearest(name, config)}. Nothing was changed.")
    return config[name]
