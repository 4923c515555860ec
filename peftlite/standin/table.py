"""Which names `peft` has, module by module, and which objects of peftlite they are.

An entry is `name` (the public name of peftlite), or `name=module:attribute`. A module has its submodules as attributes.
"""

from __future__ import annotations

from typing import Final

from peftlite.config import FORMAT_VERSION

PEFT_VERSION: Final = FORMAT_VERSION
"""The release of PEFT that the stand-in says it is."""


def _at(home: str, names: str) -> str:
    """Entries for names that a module of ours has under the same name."""
    return " ".join(f"{name}={home}:{name}" for name in names.split())


_CONFIGS = "AdaLoraConfig IA3Config LNTuningConfig LoHaConfig LoKrConfig LoraConfig TrainableTokensConfig VeraConfig"
_MODELS = "AdaLoraModel IA3Model LNTuningModel LoHaModel LoKrModel LoraModel TrainableTokensModel VeraModel"
_PEFT_MODELS = (
    "PeftModel PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering "
    "PeftModelForSeq2SeqLM PeftModelForSequenceClassification PeftModelForTokenClassification"
)
_AUTO = (
    "AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction AutoPeftModelForQuestionAnswering "
    "AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification"
)
_AUTO_HERE = _at("peftlite.auto", _AUTO)
_KINDS = "peftlite.kinds"
_LAYERS = _at(_KINDS, "BaseTunerLayer")
_WRAPPERS = _at(_KINDS, "AuxiliaryTrainingWrapper ModulesToSaveWrapper TrainableTokensWrapper")
_FILES = (
    "CONFIG_NAME=peftlite.checkpoint.keys:CONFIG_NAME WEIGHTS_NAME=peftlite.checkpoint.keys:WEIGHTS_NAME "
    "SAFETENSORS_WEIGHTS_NAME=peftlite.checkpoint.keys:SAFETENSORS_WEIGHTS_NAME"
)
_ERRORS = "PeftError=peftlite.errors:PeftliteError NoMatchingPeftModuleError=peftlite.errors:TargetNotFoundError"
_WARNING = "PeftWarning=peftlite.errors:PeftliteWarning"
_INJECT = "inject_adapter_in_model=peftlite.standin.functions:inject_adapter_in_model"
_SAVE = (
    "get_peft_model_state_dict set_peft_model_state_dict load_peft_weights get_base_model_state_dict "
    "set_base_model_state_dict"
)
_PATTERNS = (
    "INCLUDE_LINEAR_LAYERS_SHORTHAND=peftlite.core.targets:ALL_LINEAR "
    "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING=peftlite.defaults:IA3_FEEDFORWARD "
    + " ".join(
        f"TRANSFORMERS_MODELS_TO_{name.replace('_', '')}_TARGET_MODULES_MAPPING=peftlite.defaults:{name}"
        for name in ("LORA", "LOHA", "LOKR", "VERA", "ADALORA", "IA3", "LN_TUNING")
    )
)
_FUNCTIONS = "peftlite.standin.functions"
_OTHER = (
    f"cast_mixed_precision_params infer_device=peftlite.checkpoint.weights:infer_device "
    f"{_at(_FUNCTIONS, '_freeze_adapter _get_submodules fsdp_auto_wrap_policy id_tensor_storage transpose')}"
)
_MAPPINGS = "MODEL_TYPE_TO_PEFT_MODEL_MAPPING PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_TUNER_MAPPING get_peft_config"
_ABSENT = _at(
    "peftlite.standin.absent",
    "AdaptionPromptConfig OFTConfig PeftMixedModel PrefixTuningConfig PromptEncoderConfig "
    "PromptLearningConfig PromptTuningConfig",
)
_TYPES = "PeftType TaskType"
_LORA_CONFIGS = "LoraConfig LoraRuntimeConfig ArrowConfig BdLoraConfig EvaConfig LoftQConfig LoraGAConfig"
_LORA = f"{_LORA_CONFIGS} LoraModel"
_EVA = "get_eva_state_dict initialize_lora_eva_weights"


def _kinds(kind: str, hosts: str) -> str:
    """Entries for the kind of one tuner's layers, and for those on one kind of base layer, as PEFT names them."""
    named = kind.removesuffix("Layer")
    return " ".join((f"{kind}={_KINDS}:{kind}", *(f"{host}={_KINDS}:{named}{host}" for host in hosts.split())))


_LORA_LAYERS = _kinds("LoraLayer", "Linear Embedding Conv1d Conv2d Conv3d MultiheadAttention ParamWrapper")
_ADALORA_LAYERS = f"AdaLoraLayer={_KINDS}:AdaLoraLayer SVDLinear={_KINDS}:AdaLoraLinear"
_HOTSWAP = _at(
    "peftlite.hotswap",
    "check_hotswap_configs_compatible hotswap_adapter hotswap_adapter_from_state_dict "
    "prepare_model_for_compiled_hotswap",
)
_AVAILABLE = _at(
    _FUNCTIONS,
    "is_aqlm_available is_bnb_4bit_available is_bnb_available is_diffusers_available is_eetq_available "
    "is_gptqmodel_available is_hqq_available is_inc_available is_optimum_available is_torchao_available",
)
_MERGING = _at("peftlite.standin.merging", "dare_linear dare_ties magnitude_prune prune task_arithmetic ties")
_HELPERS = _at(
    "peftlite.helpers",
    "check_if_peft_model disable_input_dtype_casting rescale_adapter_scale "
    "update_forward_signature update_generate_signature update_signature",
)
_OPTIMIZERS = "create_lorafa_optimizer create_loraplus_optimizer"
_FACTORS = "factorization=peftlite.tuners.lokr:factorized"
_SWITCHES = f"set_requires_grad {_at(_FUNCTIONS, 'cast_adapter_dtype delete_adapter set_adapter')}"


def _tuner(package: str, name: str, layers: str) -> dict[str, str]:
    """The modules of one tuner in `peft.tuners`."""
    path = f"peft.tuners.{package}"
    config, model = f"{name}Config", f"{name}Model"
    whole = f"{config} {model} {layers}"
    return {path: whole, f"{path}.config": config, f"{path}.model": model, f"{path}.layer": layers}


MODULES: Final[dict[str, str]] = {
    "peft": " ".join(
        (
            *(_CONFIGS, _MODELS, _PEFT_MODELS, _AUTO_HERE, _LORA, _TYPES, _MAPPINGS, _ABSENT, _ERRORS, _WARNING),
            *(_INJECT, _SAVE, "PeftConfig get_peft_model get_layer_status get_model_status convert_to_lora"),
            "cast_mixed_precision_params create_arrow_model prepare_model_for_kbit_training save_as_lora",
        )
    ),
    "peft.auto": _AUTO_HERE,
    "peft.config": (
        "PeftConfig PeftConfigMixin=peftlite.config:PeftConfig "
        "PromptLearningConfig=peftlite.standin.absent:PromptLearningConfig"
    ),
    "peft.functional": f"{_INJECT} {_SWITCHES} get_peft_model_state_dict set_peft_model_state_dict",
    "peft.helpers": _HELPERS,
    "peft.import_utils": _AVAILABLE,
    "peft.mapping": f"{_INJECT} {_MAPPINGS} {_at('peftlite.mapping', 'PEFT_TYPE_TO_PREFIX_MAPPING')}",
    "peft.mapping_func": "get_peft_model",
    "peft.mixed_model": "PeftMixedModel=peftlite.standin.absent:PeftMixedModel",
    "peft.optimizers": _OPTIMIZERS,
    "peft.optimizers.lorafa": "create_lorafa_optimizer LoraFAOptimizer=peftlite.optimizers:LoraFAOptimizer",
    "peft.optimizers.loraplus": "create_loraplus_optimizer",
    "peft.optimizers.riemannian": "",
    "peft.peft_model": f"{_PEFT_MODELS} TunerLayerStatus TunerModelStatus get_layer_status get_model_status",
    "peft.tuners": f"{_CONFIGS} {_MODELS} {_LORA} {_ABSENT} convert_to_lora create_arrow_model save_as_lora",
    "peft.tuners.tuners_utils": (
        f"{_LAYERS} {_SWITCHES} BaseTuner=peftlite.base_tuner:BaseTuner "
        f"check_target_module_exists={_FUNCTIONS}:check_target_module_exists"
    ),
    "peft.tuners.lora": f"{_LORA} {_LORA_LAYERS} {_EVA} convert_to_lora create_arrow_model save_as_lora",
    "peft.tuners.lora.arrow": "ArrowConfig create_arrow_model",
    "peft.tuners.lora.bnb": f"Linear4bit={_KINDS}:LoraLinear4bit Linear8bitLt={_KINDS}:LoraLinear8bitLt",
    "peft.tuners.lora.config": f"{_LORA_CONFIGS} CordaConfig",
    "peft.tuners.lora.conversion": "convert_to_lora save_as_lora",
    "peft.tuners.lora.corda": "preprocess_corda",
    "peft.tuners.lora.eva": _EVA,
    "peft.tuners.lora.layer": _LORA_LAYERS,
    "peft.tuners.lora.loraga": "preprocess_loraga",
    "peft.tuners.lora.model": "LoraModel",
    "peft.tuners.lycoris_utils": (
        f"LycorisConfig=peftlite.tuners.lycoris:LycorisConfig LycorisLayer={_KINDS}:LycorisLayer"
    ),
    **_tuner("adalora", "AdaLora", _ADALORA_LAYERS),
    **_tuner("ia3", "IA3", _kinds("IA3Layer", "Linear Conv2d Conv3d")),
    **_tuner("ln_tuning", "LNTuning", _kinds("LNTuningLayer", "")),
    **_tuner("loha", "LoHa", _kinds("LoHaLayer", "Linear Conv1d Conv2d")),
    **_tuner("lokr", "LoKr", f"{_kinds('LoKrLayer', 'Linear Conv1d Conv2d')} {_FACTORS}"),
    **_tuner("trainable_tokens", "TrainableTokens", _kinds("TrainableTokensLayer", "")),
    **_tuner("vera", "Vera", _kinds("VeraLayer", "Linear")),
    "peft.tuners.oft": "OFTConfig=peftlite.standin.absent:OFTConfig",
    "peft.utils": " ".join(
        (_TYPES, _FILES, _WRAPPERS, _SAVE, _OTHER, _PATTERNS, _ERRORS, _WARNING, "prepare_model_for_kbit_training")
    ),
    "peft.utils.constants": f"{_FILES} {_PATTERNS}",
    "peft.utils.error": _ERRORS,
    "peft.utils.hotswap": _HOTSWAP,
    "peft.utils.integrations": f"init_empty_weights={_FUNCTIONS}:init_empty_weights",
    "peft.utils.loftq_utils": "replace_lora_weights_loftq",
    "peft.utils.merge_utils": _MERGING,
    "peft.utils.other": f"{_WRAPPERS} {_OTHER} {_FILES} {_PATTERNS} prepare_model_for_kbit_training",
    "peft.utils.peft_types": _TYPES,
    "peft.utils.save_and_load": _SAVE,
    "peft.utils.transformers_weight_conversion": f"build_peft_weight_mapping={_FUNCTIONS}:build_peft_weight_mapping",
    "peft.utils.warning": _WARNING,
}
"""Module of `peft` -> the names in it."""


def names_of(module: str) -> dict[str, tuple[str, str]]:
    """Name -> (module of ours, attribute there), of a module of `peft`."""
    found: dict[str, tuple[str, str]] = {}
    for entry in MODULES[module].split():
        name, _, target = entry.partition("=")
        home, _, attribute = target.partition(":")
        found[name] = (home or "peftlite", attribute or name)
    return found
