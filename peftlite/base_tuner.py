"""The inner wrapper, PEFT's `LoraModel` and its like: a model's adapters as methods. Every one calls the core."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Generator, Tensor, nn

from peftlite import defaults
from peftlite.config import PeftConfig, PeftType
from peftlite.core.inject import check_config, inject
from peftlite.core.layer import AdapterLayer
from peftlite.core.transaction import atomic
from peftlite.core.tree import find_state, named_layers
from peftlite.core.variant import tuner_for
from peftlite.errors import AdapterNameError, nearest
from peftlite.registry import later
from peftlite.wrapping import Wrapper, check_bare, check_kind

if TYPE_CHECKING:
    from peftlite import kinds
    from peftlite.checkpoint import convert, state_dict
    from peftlite.tuners import combine
    from peftlite.tuners.adalora import allocation
    from peftlite.tuners.lora import lowrank
else:
    kinds = later("peftlite.kinds")
    convert = later("peftlite.checkpoint.convert")
    state_dict = later("peftlite.checkpoint.state_dict")
    combine = later("peftlite.tuners.combine")
    allocation = later("peftlite.tuners.adalora.allocation")
    lowrank = later("peftlite.tuners.lora.lowrank")


class OfClass:
    """What a class is asked for, or an instance, and is worked out of the class."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make

    def __get__(self, instance: object, owner: type) -> Any:
        return self.make(owner)


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
    layer_kind: ClassVar[str] = "BaseTunerLayer"
    """What PEFT calls this kind's layers."""
    tuner_layer_cls = OfClass(lambda cls: getattr(kinds, cls.layer_kind))
    """For `isinstance`: a layer with adapters of this kind."""
    target_module_mapping = OfClass(lambda cls: dict(defaults.TARGETS.get(cls.kind, {})))
    """Type of transformers model -> the modules that adapters go to when a config does not say."""

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

    @property
    def targeted_parameter_names(self) -> list[str]:
        """The paths of the base model's parameters that have adapters of their own (`target_parameters`)."""
        return [_own_path(path, layer) for path, layer in named_layers(self) if layer.param is not None]

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
    layer_kind = "LoraLayer"

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

    def subtract_mutated_init(
        self, output_state_dict: Mapping[str, Tensor], adapter_name: str, kwargs: object = None
    ) -> dict[str, Tensor]:
        """The tensors of a plain LoRA of twice the rank that does what training has changed since the adapter began.

        Args:
            output_state_dict: the trained adapter's tensors, by the keys of files.
            adapter_name: the adapter as it was at first.
            kwargs: nothing is asked of them.

        Raises: CheckpointError where the two differ in keys or shapes, ConfigError for forms of LoRA whose factors have
            no difference, AdapterNameError.
        """
        initial = state_dict.adapter_tensors(self, adapter_name)
        return convert.plain_lora(self.peft_config[adapter_name], output_state_dict, initial)[1]


class IA3Model(BaseTuner):
    """A model with (IA)^3 adapters (https://arxiv.org/abs/2205.05638)."""

    kind = PeftType.IA3
    prefix = "ia3_"
    layer_kind = "IA3Layer"

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Add an adapter whose scales are the weighted sum of those of others."""
        combine.add_weighted_adapter(self, adapters, weights, adapter_name)


class LNTuningModel(BaseTuner):
    """A model whose layer norms train (https://arxiv.org/abs/2312.11420)."""

    kind = PeftType.LN_TUNING
    prefix = "ln_tuning_"
    layer_kind = "LNTuningLayer"


class LoHaModel(BaseTuner):
    """A model with LoHa adapters (https://arxiv.org/abs/2108.06098)."""

    kind = PeftType.LOHA
    prefix = "hada_"
    layer_kind = "LoHaLayer"


class LoKrModel(BaseTuner):
    """A model with LoKr adapters (https://arxiv.org/abs/2212.10650)."""

    kind = PeftType.LOKR
    prefix = "lokr_"
    layer_kind = "LoKrLayer"


class AdaLoraModel(BaseTuner):
    """A model with AdaLoRA adapters (https://arxiv.org/abs/2303.10512)."""

    kind = PeftType.ADALORA
    prefix = "lora_"
    layer_kind = "LoraLayer"

    def update_and_allocate(self, global_step: int) -> None:
        """Between `optimizer.step()` and `zero_grad()`; see `peftlite.update_and_allocate`."""
        allocation.update_and_allocate(self, global_step)


class TrainableTokensModel(BaseTuner):
    """A model with a few rows of its embeddings training."""

    kind = PeftType.TRAINABLE_TOKENS
    prefix = "trainable_tokens_"
    layer_kind = "TrainableTokensLayer"


class VeraModel(BaseTuner):
    """A model with VeRA adapters (https://arxiv.org/abs/2310.11454)."""

    kind = PeftType.VERA
    prefix = "vera_lambda_"
    layer_kind = "VeraLayer"


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


def _config_named(name: str, config: PeftConfig | Mapping[str, PeftConfig]) -> PeftConfig:
    if not isinstance(config, Mapping):
        return config
    if name not in config:
        raise AdapterNameError(f"`peft_config` has no `{name}`; nearest: {nearest(name, config)}. Nothing was changed.")
    return config[name]


def _own_path(path: str, layer: AdapterLayer) -> str:
    """The path of the parameter that a layer is for, as it was without adapters: layers of one module are nested."""
    parts = path.split(".") if path else []
    while parts and parts[-1] == layer.tuner.base_slot:
        parts.pop()
    return ".".join([*parts, str(layer.param)])
