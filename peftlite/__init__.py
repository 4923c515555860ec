"""peftlite: parameter-efficient fine-tuning, wrapped or in place.

Names are resolved when they are first used: `import peftlite` imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from peftlite import _hooks, checkpoint, errors, tuners  # noqa: F401 - the rooms say where what is

if TYPE_CHECKING:
    from peftlite.auto import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from peftlite.base_tuner import (
        AdaLoraModel,
        IA3Model,
        LNTuningModel,
        LoHaModel,
        LoKrModel,
        LoraModel,
        TrainableTokensModel,
        VeraModel,
    )
    from peftlite.checkpoint.adapters import load_adapter, save_adapter
    from peftlite.checkpoint.attention import double_out_proj
    from peftlite.checkpoint.base import get_base_model_state_dict, set_base_model_state_dict
    from peftlite.checkpoint.report import LoadReport
    from peftlite.checkpoint.state_dict import get_peft_model_state_dict, set_peft_model_state_dict
    from peftlite.checkpoint.weights import load_peft_weights
    from peftlite.config import PeftConfig, PeftType, TaskType
    from peftlite.convert import convert_to_lora, extract_lora, save_as_lora
    from peftlite.core.inject import inject, plan
    from peftlite.core.leaving import delete_adapter, merge_and_unload, unload
    from peftlite.core.lifecycle import (
        active_adapters,
        adapter_ids,
        disable_adapter,
        disable_adapters,
        enable_adapters,
        merge_adapter,
        scale_adapter,
        set_adapter,
        set_requires_grad,
        unmerge_adapter,
        use_adapter,
        use_adapter_per_row,
    )
    from peftlite.core.overlay import overlay
    from peftlite.core.status import (
        TunerLayerStatus,
        TunerModelStatus,
        get_layer_status,
        get_model_status,
        print_trainable_parameters,
    )
    from peftlite.entry import get_peft_model, inject_adapter_in_model, wrap
    from peftlite.helpers import (
        cast_mixed_precision_params,
        check_if_peft_model,
        disable_input_dtype_casting,
        rescale_adapter_scale,
    )
    from peftlite.hotswap import (
        check_hotswap_configs_compatible,
        hotswap_adapter,
        hotswap_adapter_from_state_dict,
        prepare_model_for_compiled_hotswap,
    )
    from peftlite.integrations.quantised.training import prepare_model_for_kbit_training
    from peftlite.integrations.transformers.adalora import AdaLoraCallback
    from peftlite.integrations.transformers.baking import merge_checkpoint
    from peftlite.mapping import (
        MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
        get_peft_config,
    )
    from peftlite.model import (
        PeftModel,
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
    )
    from peftlite.model.arrow import create_arrow_model
    from peftlite.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
    from peftlite.tuners.adalora.allocation import orthogonal_regularisation, update_and_allocate
    from peftlite.tuners.adalora.config import AdaLoraConfig
    from peftlite.tuners.combine import add_weighted_adapter
    from peftlite.tuners.ia3 import IA3Config
    from peftlite.tuners.ln_tuning import LNTuningConfig
    from peftlite.tuners.loha import LoHaConfig
    from peftlite.tuners.lokr import LoKrConfig
    from peftlite.tuners.lora.config import LoraConfig
    from peftlite.tuners.lora.inits.covariance import preprocess_corda
    from peftlite.tuners.lora.inits.eva import get_eva_state_dict, initialize_lora_eva_weights
    from peftlite.tuners.lora.inits.gradients import preprocess_loraga
    from peftlite.tuners.lora.inits.repair import replace_lora_weights_loftq
    from peftlite.tuners.lora.inits.residual import residual_into_base
    from peftlite.tuners.lora.options import (
        ArrowConfig,
        BdLoraConfig,
        CordaConfig,
        EvaConfig,
        LoftQConfig,
        LoraGAConfig,
    )
    from peftlite.tuners.lora.runtime import set_runtime_config
    from peftlite.tuners.lora.values import LoraRuntimeConfig
    from peftlite.tuners.trainable_tokens import TrainableTokensConfig
    from peftlite.tuners.vera import VeraConfig

__version__ = "0.1.0"
__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "AdaLoraCallback",
    "AdaLoraConfig",
    "AdaLoraModel",
    "ArrowConfig",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BdLoraConfig",
    "CordaConfig",
    "EvaConfig",
    "IA3Config",
    "IA3Model",
    "LNTuningConfig",
    "LNTuningModel",
    "LoHaConfig",
    "LoHaModel",
    "LoKrConfig",
    "LoKrModel",
    "LoadReport",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "TaskType",
    "TrainableTokensConfig",
    "TrainableTokensModel",
    "TunerLayerStatus",
    "TunerModelStatus",
    "VeraConfig",
    "VeraModel",
    "active_adapters",
    "adapter_ids",
    "add_weighted_adapter",
    "cast_mixed_precision_params",
    "check_hotswap_configs_compatible",
    "check_if_peft_model",
    "convert_to_lora",
    "create_arrow_model",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "delete_adapter",
    "disable_adapter",
    "disable_adapters",
    "disable_input_dtype_casting",
    "double_out_proj",
    "enable_adapters",
    "errors",
    "extract_lora",
    "get_base_model_state_dict",
    "get_eva_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "initialize_lora_eva_weights",
    "inject",
    "inject_adapter_in_model",
    "load_adapter",
    "load_peft_weights",
    "merge_adapter",
    "merge_and_unload",
    "merge_checkpoint",
    "orthogonal_regularisation",
    "overlay",
    "plan",
    "prepare_model_for_compiled_hotswap",
    "prepare_model_for_kbit_training",
    "preprocess_corda",
    "preprocess_loraga",
    "print_trainable_parameters",
    "replace_lora_weights_loftq",
    "rescale_adapter_scale",
    "residual_into_base",
    "save_adapter",
    "save_as_lora",
    "scale_adapter",
    "set_adapter",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "set_requires_grad",
    "set_runtime_config",
    "unload",
    "unmerge_adapter",
    "update_and_allocate",
    "use_adapter",
    "use_adapter_per_row",
    "wrap",
]

_HOMES = {
    "peftlite.auto": (
        "AutoPeftModel",
        "AutoPeftModelForCausalLM",
        "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering",
        "AutoPeftModelForSeq2SeqLM",
        "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification",
    ),
    "peftlite.base_tuner": (
        "AdaLoraModel",
        "IA3Model",
        "LNTuningModel",
        "LoHaModel",
        "LoKrModel",
        "LoraModel",
        "TrainableTokensModel",
        "VeraModel",
    ),
    "peftlite.checkpoint.adapters": ("load_adapter", "save_adapter"),
    "peftlite.checkpoint.attention": ("double_out_proj",),
    "peftlite.checkpoint.base": ("get_base_model_state_dict", "set_base_model_state_dict"),
    "peftlite.checkpoint.report": ("LoadReport",),
    "peftlite.checkpoint.state_dict": ("get_peft_model_state_dict", "set_peft_model_state_dict"),
    "peftlite.checkpoint.weights": ("load_peft_weights",),
    "peftlite.config": ("PeftConfig", "PeftType", "TaskType"),
    "peftlite.convert": ("convert_to_lora", "extract_lora", "save_as_lora"),
    "peftlite.core.inject": ("inject", "plan"),
    "peftlite.core.leaving": ("delete_adapter", "merge_and_unload", "unload"),
    "peftlite.core.lifecycle": (
        "active_adapters",
        "adapter_ids",
        "disable_adapter",
        "disable_adapters",
        "enable_adapters",
        "merge_adapter",
        "scale_adapter",
        "set_adapter",
        "set_requires_grad",
        "unmerge_adapter",
        "use_adapter",
        "use_adapter_per_row",
    ),
    "peftlite.core.overlay": ("overlay",),
    "peftlite.core.status": (
        "TunerLayerStatus",
        "TunerModelStatus",
        "get_layer_status",
        "get_model_status",
        "print_trainable_parameters",
    ),
    "peftlite.entry": ("get_peft_model", "inject_adapter_in_model", "wrap"),
    "peftlite.integrations.quantised.training": ("prepare_model_for_kbit_training",),
    "peftlite.helpers": (
        "cast_mixed_precision_params",
        "check_if_peft_model",
        "disable_input_dtype_casting",
        "rescale_adapter_scale",
    ),
    "peftlite.hotswap": (
        "check_hotswap_configs_compatible",
        "hotswap_adapter",
        "hotswap_adapter_from_state_dict",
        "prepare_model_for_compiled_hotswap",
    ),
    "peftlite.mapping": (
        "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
        "PEFT_TYPE_TO_CONFIG_MAPPING",
        "PEFT_TYPE_TO_TUNER_MAPPING",
        "get_peft_config",
    ),
    "peftlite.model": (
        "PeftModel",
        "PeftModelForCausalLM",
        "PeftModelForFeatureExtraction",
        "PeftModelForQuestionAnswering",
        "PeftModelForSeq2SeqLM",
        "PeftModelForSequenceClassification",
        "PeftModelForTokenClassification",
    ),
    "peftlite.model.arrow": ("create_arrow_model",),
    "peftlite.tuners.combine": ("add_weighted_adapter",),
    "peftlite.integrations.transformers.adalora": ("AdaLoraCallback",),
    "peftlite.integrations.transformers.baking": ("merge_checkpoint",),
    "peftlite.optimizers": ("create_lorafa_optimizer", "create_loraplus_optimizer"),
    "peftlite.tuners.adalora.allocation": ("orthogonal_regularisation", "update_and_allocate"),
    "peftlite.tuners.adalora.config": ("AdaLoraConfig",),
    "peftlite.tuners.ia3": ("IA3Config",),
    "peftlite.tuners.ln_tuning": ("LNTuningConfig",),
    "peftlite.tuners.loha": ("LoHaConfig",),
    "peftlite.tuners.lokr": ("LoKrConfig",),
    "peftlite.tuners.lora.config": ("LoraConfig",),
    "peftlite.tuners.lora.inits.covariance": ("preprocess_corda",),
    "peftlite.tuners.lora.inits.eva": ("get_eva_state_dict", "initialize_lora_eva_weights"),
    "peftlite.tuners.lora.inits.gradients": ("preprocess_loraga",),
    "peftlite.tuners.lora.inits.repair": ("replace_lora_weights_loftq",),
    "peftlite.tuners.lora.inits.residual": ("residual_into_base",),
    "peftlite.tuners.lora.options": (
        "ArrowConfig",
        "BdLoraConfig",
        "CordaConfig",
        "EvaConfig",
        "LoftQConfig",
        "LoraGAConfig",
    ),
    "peftlite.tuners.lora.runtime": ("set_runtime_config",),
    "peftlite.tuners.lora.values": ("LoraRuntimeConfig",),
    "peftlite.tuners.trainable_tokens": ("TrainableTokensConfig",),
    "peftlite.tuners.vera": ("VeraConfig",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"peftlite has no `{name}`; nearest: {errors.nearest(name, __all__)}.")
    value = globals()[name] = getattr(import_module(_HOME_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_hooks.install()
