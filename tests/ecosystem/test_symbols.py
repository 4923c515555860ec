"""What code written for `peft` touches: every name and attribute that libraries read is there, and does what it should.

The lists are of what transformers, accelerate, diffusers, sentence-transformers, TRL, LLaMA-Factory and axolotl import.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import warnings
from types import ModuleType
from typing import Any

import peft
import pytest
import torch

from peftlite.base_tuner import TUNER_MODELS
from peftlite.standin import merging
from peftlite.standin.table import MODULES
from tests.ecosystem.programs import program
from tests.versions import works_with_peft

IMPORTS = {
    "transformers": """
        peft: PeftModel PeftMixedModel PeftConfig PeftType inject_adapter_in_model get_peft_model_state_dict
        peft.functional: delete_adapter
        peft.tuners.lora: LoraLayer
        peft.tuners.tuners_utils: BaseTunerLayer
        peft.utils: ModulesToSaveWrapper
        peft.utils.other: AuxiliaryTrainingWrapper fsdp_auto_wrap_policy
        peft.utils.transformers_weight_conversion: build_peft_weight_mapping
        """,
    "accelerate": "peft: PeftModel get_peft_model_state_dict set_peft_model_state_dict",
    "diffusers": """
        peft: LoKrConfig LoraConfig PeftConfig get_peft_model_state_dict
        peft: inject_adapter_in_model set_peft_model_state_dict
        peft.helpers: disable_input_dtype_casting
        peft.tuners.loha.layer: LoHaLayer
        peft.tuners.lokr.layer: LoKrLayer factorization
        peft.tuners.lora: LoraLayer
        peft.tuners.lora.layer: LoraLayer
        peft.tuners.tuners_utils: BaseTunerLayer
        peft.utils: _get_submodules get_peft_model_state_dict
        peft.utils.hotswap: check_hotswap_configs_compatible hotswap_adapter_from_state_dict
        peft.utils.hotswap: prepare_model_for_compiled_hotswap
        """,
    "sentence-transformers": "peft: PeftConfig\npeft.utils: ModulesToSaveWrapper",
    "TRL": """
        peft: PeftConfig PeftModel LoraConfig get_peft_model PrefixTuningConfig PromptLearningConfig __version__
        peft: prepare_model_for_kbit_training get_peft_model_state_dict set_peft_model_state_dict
        peft: AutoPeftModelForCausalLM
        peft.tuners.tuners_utils: BaseTunerLayer
        """,
    "LLaMA-Factory": """
        peft: LoftQConfig LoraConfig LoraModel OFTConfig PeftModel TaskType get_peft_model set_peft_model_state_dict
        peft.utils: SAFETENSORS_WEIGHTS_NAME WEIGHTS_NAME
        """,
    "axolotl": """
        peft: AdaptionPromptConfig LoftQConfig LoraConfig PeftConfig PeftMixedModel PeftModel TaskType
        peft: PeftModelForCausalLM get_peft_model prepare_model_for_kbit_training get_peft_model_state_dict
        peft.tuners.lora: LoraLayer QuantLinear
        peft.tuners.lora.layer: Embedding Linear LoraLayer
        peft.utils.other: ModulesToSaveWrapper
        """,
    "scripts": """
        peft: AutoPeftModel PeftModelForSeq2SeqLM PeftModelForSequenceClassification AdaLoraConfig IA3Config LoHaConfig
        peft: EvaConfig LoraGAConfig LoraRuntimeConfig replace_lora_weights_loftq get_peft_config
        peft: MODEL_TYPE_TO_PEFT_MODEL_MAPPING PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_TUNER_MAPPING get_layer_status
        peft.config: PeftConfig PeftConfigMixin
        peft.helpers: check_if_peft_model rescale_adapter_scale
        peft.import_utils: is_bnb_4bit_available is_bnb_available is_gptqmodel_available
        peft.mapping: PEFT_TYPE_TO_PREFIX_MAPPING get_peft_model inject_adapter_in_model
        peft.mapping_func: get_peft_model
        peft.optimizers: create_lorafa_optimizer create_loraplus_optimizer
        peft.peft_model: PeftModel get_model_status set_peft_model_state_dict
        peft.tuners: LoraConfig LoraModel AdaLoraModel
        peft.tuners.adalora.layer: AdaLoraLayer SVDLinear
        peft.tuners.ia3.layer: IA3Layer Linear
        peft.tuners.lora: Conv2d Embedding Linear LoraConfig LoraLayer LoraModel
        peft.tuners.lora.bnb: Linear4bit Linear8bitLt
        peft.tuners.lora.config: CordaConfig EvaConfig LoraConfig
        peft.tuners.lora.corda: preprocess_corda
        peft.tuners.lora.eva: get_eva_state_dict initialize_lora_eva_weights
        peft.tuners.lora.loraga: preprocess_loraga
        peft.tuners.tuners_utils: BaseTuner cast_adapter_dtype check_target_module_exists delete_adapter set_adapter
        peft.tuners.vera: VeraConfig VeraLayer VeraModel
        peft.utils: PeftType TaskType CONFIG_NAME TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING transpose
        peft.utils.constants: TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        peft.utils.loftq_utils: replace_lora_weights_loftq
        peft.utils.merge_utils: dare_linear dare_ties magnitude_prune task_arithmetic ties
        peft.utils.other: _freeze_adapter _get_submodules infer_device prepare_model_for_kbit_training transpose
        peft.utils.peft_types: PeftType TaskType
        peft.utils.save_and_load: get_peft_model_state_dict load_peft_weights set_peft_model_state_dict
        """,
}
LACKING = {("axolotl", "QuantLinear")}
"""What PEFT 0.21.2 does not have either."""

NOT_OURS = {
    "merging": "calculate_majority_sign_mask disjoint_merge magnitude_based_pruning random_pruning",
    "parts of PEFT's own layers": """
        HadaWeight HadaWeightCP LoraEmbeddingATPHolder LoraVariant RankAllocator SVDConv2d SVDQuantLinear
        dispatch_default make_kron make_weight make_weight_cp register_peft_method
        """,
}
"""Names in modules of what peftlite has that are not about using it."""


def pairs(text: str) -> list[tuple[str, str]]:
    """(module, name) of each name in a list of imports."""
    lines = [line.strip().partition(":") for line in text.strip().splitlines()]
    return [(module, name) for module, _, names in lines for name in names.split()]


def real_modules() -> dict[str, ModuleType]:
    """PEFT's modules, as far as they can be imported here."""
    found = {"peft": peft}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for info in pkgutil.walk_packages(peft.__path__, "peft."):
            try:
                found[info.name] = importlib.import_module(info.name)
            except ImportError:  # some need packages that are not there
                continue
    return found


def public(module: ModuleType) -> set[str]:
    """What a module of PEFT offers: names of `__all__`, and what is defined in it."""
    listed = set(getattr(module, "__all__", ()))
    own = {n for n, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
    return {name for name in listed | own if not name.startswith("_")}


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    """What the stand-in says of every public name of PEFT: nothing if it has it, else the error."""
    asked = {name: sorted(public(module)) for name, module in real_modules().items()}
    asked["peft"] = sorted({*asked["peft"], "__version__"})
    for text in IMPORTS.values():
        for module, name in pairs(text):
            asked[module] = [*asked.get(module, ()), name]
    code = f"""
        import json
        import peftlite.as_peft

        answers = {{}}
        for module, names in json.loads({json.dumps(asked)!r}).items():
            for name in names:
                try:
                    exec(f"from {{module}} import {{name}}")
                    answers[f"{{module}}.{{name}}"] = ""
                except ImportError as error:
                    answers[f"{{module}}.{{name}}"] = str(error)
        print(json.dumps(answers))
        """
    found: dict[str, str] = json.loads(program(code).stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("library", IMPORTS)
def test_import_lists_resolve(library: str, answers: dict[str, str]) -> None:
    missing = {f"{m}.{n}" for m, n in pairs(IMPORTS[library]) if answers[f"{m}.{n}"] and (library, n) not in LACKING}
    assert not missing


@works_with_peft
def test_the_lists_are_of_what_peft_has() -> None:
    moved = {"get_peft_model"}  # `peft.mapping` had it, and programs still ask there
    for library, text in IMPORTS.items():
        for module, name in pairs(text):
            there = module == "peft.tuners.lora.corda" or hasattr(importlib.import_module(module), name)
            assert there or name in moved or (library, name) in LACKING, (module, name)


def test_a_name_that_is_lacking_says_so(answers: dict[str, str]) -> None:
    lacking = {name: error for name, error in answers.items() if error}
    assert len(lacking) > 100
    for name, error in lacking.items():
        assert error.startswith("peftlite stands in for `peft`, and has no `peft."), (name, error)


def test_what_peftlite_has_is_found_where_peft_has_it(answers: dict[str, str]) -> None:
    """Modules that are about one of our methods, or about using any, lack only what is written down here."""
    ours = {kind.value.lower() for kind in TUNER_MODELS}
    excused = {name for names in NOT_OURS.values() for name in names.split()}
    for module in MODULES:
        parts = module.split(".")
        if parts[1:2] == ["tuners"] and len(parts) > 2 and parts[2] in ours - {"lora"}:
            missing = {n for n in public(importlib.import_module(module)) if answers[f"{module}.{n}"]}
            assert not missing - excused, module
    for module in ("peft.mapping_func", "peft.functional", "peft.utils.error", "peft.utils.hotswap"):
        assert not [n for n in public(importlib.import_module(module)) if answers[f"{module}.{n}"]], module
    for kind in TUNER_MODELS:
        config = next(v for k, v in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items() if k.value == kind.value).__name__
        assert not answers[f"peft.{config}"]
        assert not answers[f"peft.{config.replace('Config', 'Model')}"]


# ---- attributes that libraries read
MODEL = """
    get_base_model base_model active_adapters active_adapter active_peft_config peft_config load_adapter set_adapter
    save_pretrained create_or_update_model_card get_nb_trainable_parameters print_trainable_parameters disable_adapter
    add_adapter merge_adapter unmerge_adapter merge_and_unload unload delete_adapter config generate forward
    modules_to_save add_weighted_adapter get_layer_status get_model_status
    """
CONFIG = """
    peft_type is_prompt_learning inference_mode base_model_name_or_path save_pretrained from_pretrained to_dict
    task_type target_modules r lora_alpha lora_dropout rank_pattern alpha_pattern use_dora use_rslora lora_bias bias
    trainable_token_indices target_parameters modules_to_save revision auto_mapping layers_to_transform
    """
LAYER = """
    set_adapter enable_adapters active_adapter active_adapters scale_layer unscale_layer set_scale merge unmerge merged
    merged_adapters delete_adapter get_base_layer r lora_alpha scaling lora_A lora_B lora_embedding_A lora_dropout
    lora_magnitude_vector adapter_layer_names other_param_names base_layer weight bias in_features out_features
    disable_adapters requires_grad_
    """

BEHAVIOUR = """
    import peftlite.as_peft
    import peft, torch, transformers

    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    tokens = torch.arange(8)[None]

    def base():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()

    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(base(), config).eval()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj

    def gaps(thing, names):
        return [name for name in names.split() if not hasattr(thing, name)]

    """

USE = """
    # transformers
    active = model.active_peft_config
    assert active.peft_type.value == "LORA" and not active.is_prompt_learning and not active.inference_mode
    assert model.base_model.model is model.get_base_model() and model.active_adapters == ["default"]
    assert type(model).__name__ == "PeftModelForCausalLM"
    trainable, all_of_them = model.get_nb_trainable_parameters()
    assert 0 < trainable < all_of_them
    head = model.get_base_model().lm_head
    assert isinstance(head, peft.utils.AuxiliaryTrainingWrapper)
    assert head.adapter_state_dict_load_map("default") == {"weight": "modules_to_save.default.weight"}
    layer.enable_adapters(enabled=False)
    plain = model(tokens).logits
    layer.enable_adapters(enabled=True)
    assert not torch.equal(model(tokens).logits, plain)

    # diffusers, on layers
    before = layer.scaling["default"]
    layer.scale_layer(0.5)
    assert layer.scaling["default"] == before * 0.5
    layer.unscale_layer(0.5)
    layer.set_scale("default", 2.0)
    assert layer.scaling["default"] == 2.0 * layer.lora_alpha["default"] / layer.r["default"]
    layer.set_scale("default", 1.0)
    weight = layer.get_base_layer().weight.clone()
    layer.merge(safe_merge=True, adapter_names=["default"])
    assert layer.merged_adapters == ["default"] and not torch.equal(layer.get_base_layer().weight, weight)
    layer.unmerge()
    assert layer.merged_adapters == [] and torch.equal(layer.get_base_layer().weight, weight)
    assert set(layer.lora_A) == set(layer.lora_B) == {"default"} and layer.r == {"default": 2}
    assert layer.adapter_layer_names[:2] == ("lora_A", "lora_B")
    assert peft.utils._get_submodules(model.get_base_model(), "model.layers.0.self_attn.q_proj")[1] is layer

    # TRL: parameter names, and a second adapter as the reference
    names = [name for name, _ in model.named_parameters()]
    for part in (".base_layer", "modules_to_save.default.", "original_module"):
        assert any(part in name for name in names), part
    model.add_adapter("ref", config)
    model.set_adapter("default")
    assert model.active_adapter == "default" and model.base_model.prefix == "lora_"
    with model.disable_adapter():
        assert torch.equal(model(tokens).logits, base()(tokens).logits)
    model.merge_adapter()
    model.unmerge_adapter()
    layer.delete_adapter("ref")
    assert list(layer.lora_A) == ["default"]

    # files
    import tempfile
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place, selected_adapters=["default"], is_main_process=True)
        assert peft.PeftConfig.from_pretrained(place).base_model_name_or_path is None
        weights = peft.utils.save_and_load.load_peft_weights(place, device="cpu")
        assert len(weights) == 5
        model.load_adapter(place, "again", is_trainable=True)
        assert peft.PeftModel.from_pretrained(base(), place).active_peft_config.inference_mode

    # in place, with a state dict, as diffusers does
    state = peft.get_peft_model_state_dict(model)
    plain = peft.inject_adapter_in_model(config, base(), state_dict=state, low_cpu_mem_usage=True)
    assert plain.model.layers[0].self_attn.q_proj.lora_A["default"].weight.is_meta
    assert not peft.set_peft_model_state_dict(plain, state, low_cpu_mem_usage=True).unexpected_keys
    assert torch.equal(plain(tokens).logits, model(tokens).logits)
    assert not peft.functional.delete_adapter(plain, "default")
    assert isinstance(config.to_dict(), dict) and peft.get_peft_config(config.to_dict()) == config
    assert peft.tuners.tuners_utils.check_target_module_exists(config, "model.layers.0.self_attn.q_proj")
    """


def test_attributes_are_there() -> None:
    program(
        BEHAVIOUR,
        f"""
        found = gaps(model, {MODEL!r}), gaps(config, {CONFIG!r}), gaps(layer, {LAYER!r})
        assert found == ([], [], []), found
        """,
        USE,
    )


@pytest.mark.filterwarnings("ignore")
def test_attributes_are_of_peft() -> None:
    config = peft.LoraConfig(r=2, target_modules=["0"])
    model: Any = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), config)
    layer = model.base_model.model[0]
    not_of_a_plain_model = {"generate", "config", "add_weighted_adapter"}
    for thing, names in ((model, MODEL), (config, CONFIG), (layer, LAYER)):
        assert not [n for n in names.split() if not hasattr(thing, n) and n not in not_of_a_plain_model]


@pytest.mark.filterwarnings("ignore:The density 1.0")
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_merging_of_tensors_is_pefts(density: float) -> None:
    tensors = [torch.randn(6, 7) for _ in range(3)]
    weights = torch.tensor([0.5, 1.5, 1.0])
    for name, options in (
        ("task_arithmetic", ()),
        ("magnitude_prune", (density,)),
        ("ties", (density, "total")),
        ("ties", (density, "frequency")),
        ("dare_linear", (density,)),
        ("dare_ties", (density,)),
    ):
        if not name.startswith("dare") or density == 1:  # the random entries are drawn in another order
            theirs = getattr(importlib.import_module("peft.utils.merge_utils"), name)(tensors, weights, *options)
            assert torch.allclose(getattr(merging, name)(tensors, weights, *options), theirs, atol=1e-6), name
    with pytest.raises(ValueError, match="`method` is `smallest`"):
        merging.prune(tensors[0], 0.5, "smallest")
