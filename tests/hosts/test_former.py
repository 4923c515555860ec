"""Adapters for the layers of transformers 4 that transformers 5 has fused into one parameter, or renamed."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

import peftlite
from peftlite.checkpoint.files import read_config, write_adapter
from peftlite.errors import (
    CheckpointError,
    ConfigError,
    PeftliteWarning,
    TargetNotFoundError,
    UnsupportedLayerError,
)
from peftlite.integrations.transformers.former import Mapping, former_names
from tests.adapters import randomised, snapshot
from tests.models import tiny
from tests.versions import PEFT_WORKS, VERSION

_NEW = "transformers 4 has fused and renamed nothing"
get_model_conversion_mapping = pytest.importorskip(
    "transformers.conversion_mapping", reason=_NEW
).get_model_conversion_mapping
rename_source_key = pytest.importorskip("transformers.core_model_loading", reason=_NEW).rename_source_key
TOKENS = torch.arange(14).reshape(2, 7)
EXPERTS = 3


@dataclass(frozen=True)
class Kind:
    """A tiny model, and how transformers 4 called its layers."""

    name: str
    block: str = "mlp"
    layers: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    beside: str | None = None
    """A module beside the experts with linear layers of the same names."""

    def build(self) -> Any:
        """The model in float64."""
        return tiny(self.name, dtype=torch.float64)


KINDS = {
    "mixtral": Kind("mixtral", "block_sparse_moe", ("w1", "w3", "w2")),
    "qwen2": Kind("qwen2_moe", beside="shared_expert"),
    "qwen3": Kind("qwen3_moe"),
}


@dataclass
class OldFile:
    """An adapter as transformers 4 and its PEFT wrote it, and a model with the same updates in its weights."""

    kind: Kind
    targets: tuple[str, ...]
    fields: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    truth: Any = None

    def __post_init__(self) -> None:
        self.config = peftlite.LoraConfig(r=2, lora_alpha=6, target_modules=self.targets, **self.fields)
        self.generator = torch.Generator().manual_seed(1)
        self.truth = self.kind.build()
        with torch.no_grad():
            for number, layer in enumerate(self.truth.model.layers):
                self._update(f"model.layers.{number}.self_attn.q_proj", layer.self_attn.q_proj.weight)
                self._update_block(f"model.layers.{number}.{self.kind.block}", layer.mlp)

    def _update_block(self, path: str, block: Any) -> None:
        gate, up, down = self.kind.layers
        half = block.experts.gate_up_proj.shape[1] // 2
        for expert in range(EXPERTS):
            joint = block.experts.gate_up_proj[expert]
            self._update(f"{path}.experts.{expert}.{gate}", joint[:half])
            self._update(f"{path}.experts.{expert}.{up}", joint[half:])
            self._update(f"{path}.experts.{expert}.{down}", block.experts.down_proj[expert])
        self._update(f"{path}.gate", block.gate.weight)
        for name in self.kind.layers if self.kind.beside else ():
            self._update(
                f"{path}.{self.kind.beside}.{name}", getattr(block, str(self.kind.beside)).get_submodule(name).weight
            )

    def _update(self, path: str, weight: Tensor) -> None:
        if path.rpartition(".")[2] not in self.targets:
            return
        r = self.config.rank_for(path)
        A, B = (
            torch.randn(size, generator=self.generator) / 2 for size in ((r, weight.shape[1]), (weight.shape[0], r))
        )
        self.tensors |= {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}
        weight += self.config.scaling_for(path) * (B.double() @ A.double())

    def write(self, folder: Path) -> Path:
        keyed = {f"base_model.model.{key}": tensor for key, tensor in self.tensors.items()}
        write_adapter(folder, self.config.to_json(), keyed)
        return folder

    def loaded(self, folder: Path, wrapped: bool) -> Any:
        model = self.kind.build()
        if wrapped:
            return peftlite.PeftModel.from_pretrained(model, folder).eval()
        model.load_adapter(folder)
        return model

    def check(self, model: Any) -> None:
        torch.testing.assert_close(outputs(model), outputs(self.truth), rtol=1e-12, atol=1e-12)


def outputs(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits  # type: ignore[no-any-return]


def old_file(kind: str, *targets: str, **fields: Any) -> OldFile:
    """Targets "1", "2", "3" are the gate, up and down projections of the kind, in targets and in patterns."""
    names = dict(zip("123", KINDS[kind].layers, strict=True))
    fields = {
        name: {names.get(key, key): number for key, number in value.items()} if isinstance(value, dict) else value
        for name, value in fields.items()
    }
    return OldFile(KINDS[kind], tuple(names.get(name, name) for name in targets), fields)


CASES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "all": (("1", "2", "3", "q_proj", "gate"), {}),
    "gate and up": (("1", "2"), {}),
    "up only": (("2", "q_proj"), {}),
    "down only": (("3",), {}),
    "rslora": (("1", "2", "3"), {"use_rslora": True}),
    "rank_pattern": (("1", "2", "3", "q_proj"), {"rank_pattern": {"1": 3, "3": 1, "q_proj": 4}}),
    "alpha_pattern": (("1", "2", "3", "q_proj"), {"alpha_pattern": {"2": 1, "3": 5, "q_proj": 4}}),
    "one expert": (("1", "2", "3"), {"rank_pattern": {"experts.1.(w1|gate_proj)": 4}, "use_rslora": True}),
}
RIGHT_IN_PEFT = {"all", "down only"}  # for Mixtral and Qwen3


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_loads_and_is_written_as_what_the_model_has_now(kind: str, case: str, tmp_path: Path) -> None:
    targets, fields = CASES[case]
    old = old_file(kind, *targets, **fields)
    path = old.write(tmp_path / "old")
    model = old.loaded(path, wrapped=True)
    old.check(model)
    placed = old.loaded(path, wrapped=False)
    old.check(placed)
    model.save_pretrained(tmp_path / "new")
    placed.save_pretrained(tmp_path / "placed")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("new", "placed")]
    assert files[0] == files[1]
    old.check(old.loaded(tmp_path / "new", wrapped=True))
    assert read_config(tmp_path / "new")["target_parameters"]
    if not PEFT_WORKS:
        return
    theirs = peft_reads(KINDS[kind].build(), tmp_path / "new")
    torch.testing.assert_close(outputs(theirs), outputs(old.truth), rtol=1e-12, atol=1e-12)
    if case in RIGHT_IN_PEFT and kind != "qwen2":
        theirs = peft_reads(KINDS[kind].build(), path)
        torch.testing.assert_close(outputs(theirs), outputs(model), rtol=1e-12, atol=1e-12)


def peft_reads(model: Any, path: Path) -> Any:
    with quiet():
        return peft.PeftModel.from_pretrained(model, path).eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Without what PEFT warns of: that patterns for parameters match no module."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def peft_adds(model: Any, **fields: Any) -> Any:
    with quiet():
        return peft.inject_adapter_in_model(peft.LoraConfig(**fields), model)


def test_merges_trains_and_is_loaded_over_itself(tmp_path: Path) -> None:
    old = old_file("mixtral", "1", "2", "3", "gate", rank_pattern={"1": 3})
    path = old.write(tmp_path)
    model = old.kind.build()
    peftlite.load_adapter(model, path, is_trainable=True)
    model(TOKENS, labels=TOKENS).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(grads) == 12
    assert all(grad is not None and grad.any() for grad in grads.values())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in grads:
                parameter.zero_()
    peftlite.load_adapter(model, path)
    old.check(model)
    old.check(model.merge_and_unload())


def test_from_memory(tmp_path: Path) -> None:
    old = old_file("qwen3", "1", "2", "3")
    model = old.kind.build()
    model.load_adapter(peft_config=old.config, adapter_state_dict=old.tensors)
    old.check(model)


def test_the_joint_rank_and_alpha_are_in_the_config() -> None:
    old = old_file("mixtral", "1", "2", "3", "q_proj", rank_pattern={"q_proj": 5})
    model = old.kind.build()
    model.load_adapter(peft_config=old.config, adapter_state_dict=old.tensors)
    config = model.peft_config["default"]
    assert config.target_modules == ["q_proj"]
    assert config.target_parameters == ["experts.down_proj", "experts.gate_up_proj"]
    assert config.rank_pattern == {"experts.gate_up_proj": 4, "q_proj": 5}
    assert config.alpha_pattern == {"experts.gate_up_proj": 12}


def test_rslora_keeps_its_scaling() -> None:
    old = old_file("mixtral", "1", "2", use_rslora=True)
    model = old.kind.build()
    model.load_adapter(peft_config=old.config, adapter_state_dict=old.tensors)
    assert model.peft_config["default"].alpha_pattern == {"experts.gate_up_proj": pytest.approx(6 * math.sqrt(2))}


def test_only_some_layers(tmp_path: Path) -> None:
    old = old_file("qwen2", "1", "2", "3", layers_to_transform=[1])
    old.tensors = {key: tensor for key, tensor in old.tensors.items() if ".layers.1." in key}
    model = old.kind.build()
    model.load_adapter(peft_config=old.config, adapter_state_dict=old.tensors)
    assert model.peft_config["default"].target_parameters == [
        "model.layers.1.mlp.experts.down_proj",
        "model.layers.1.mlp.experts.gate_up_proj",
    ]
    peftlite.save_adapter(model, tmp_path)
    again = old.loaded(tmp_path, wrapped=False)
    assert torch.equal(outputs(again), outputs(model))


# ---- what cannot be loaded
def refused(old: OldFile, match: str, error: type[Exception] = CheckpointError) -> None:
    model = old.kind.build()
    before = snapshot(model)
    with pytest.raises(error, match=match) as caught:
        model.load_adapter(peft_config=old.config, adapter_state_dict=old.tensors)
    assert str(caught.value).endswith("Nothing was changed.")
    assert snapshot(model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_missing_experts_are_named(kind: str) -> None:
    old = old_file(kind, "1", "2", "3")
    path = f"model.layers.1.{KINDS[kind].block}.experts.2.{KINDS[kind].layers[1]}"
    del old.tensors[f"{path}.lora_B.weight"]
    refused(old, rf"1 tensors missing .* `base_model.model.{path}.lora_B.weight`")
    for key in [key for key in old.tensors if ".layers.1." in key]:
        del old.tensors[key]
    refused(old, f"{EXPERTS * 6} tensors missing")


def test_a_missing_expert_leaves_the_parameter_out_if_that_is_asked_for(tmp_path: Path) -> None:
    old = old_file("mixtral", "1", "2", "3")
    del old.tensors["model.layers.1.block_sparse_moe.experts.2.w3.lora_B.weight"]
    model = old.kind.build()
    with pytest.warns(PeftliteWarning, match="1 tensor missing"):
        report = peftlite.load_adapter(model, old.write(tmp_path), strict=False)
    assert report.missing_keys == ["base_model.model.model.layers.1.mlp.experts.base_layer.lora_B.weight"]


def test_an_expert_too_many_is_unexpected() -> None:
    old = old_file("mixtral", "3")
    old.tensors["model.layers.0.block_sparse_moe.experts.3.w2.lora_A.weight"] = torch.zeros(2, 12)
    refused(old, r"1 tensor unexpected: `base_model.model.model.layers.0.block_sparse_moe.experts.3.w2.lora_A.weight`")


def test_factors_of_layers_that_the_config_does_not_name_are_unexpected() -> None:
    old = old_file("mixtral", "1", "2", "3")
    old.config = peftlite.LoraConfig(r=2, target_modules=["w1", "w3"])
    refused(old, r"12 tensors unexpected: `base_model.model.model.layers.0.block_sparse_moe.experts.0.w2.lora_A")


def test_other_shapes_are_named() -> None:
    old = old_file("mixtral", "1", "2")
    old.config = peftlite.LoraConfig(r=4, target_modules=["w1", "w3"])
    refused(
        old,
        r"`base_model.model.model.layers.0.block_sparse_moe.experts.0.w1.lora_A.weight` is \(2, 16\), not \(4, 16\)",
    )


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_what_parameters_have_no_form_for(fields: dict[str, Any]) -> None:
    old = old_file("mixtral", "1", "2")
    old.config = peftlite.LoraConfig(r=2, target_modules=["w1", "w3"], **fields)
    refused(old, r"cannot adapt `model.layers.0.mlp.experts.gate_up_proj`", UnsupportedLayerError)


def test_dropout_is_off() -> None:
    old = old_file("mixtral", "1", "2", lora_dropout=0.1)
    for trainable in (False, True):
        model = old.kind.build()
        arguments: dict[str, Any] = {"peft_config": old.config, "adapter_state_dict": old.tensors}
        if trainable:
            with pytest.warns(PeftliteWarning, match="`lora_dropout` is `0.1`"):
                model.load_adapter(**arguments, is_trainable=True)
        else:
            model.load_adapter(**arguments)
        old.check(model)


# ---- new adapters
def test_a_new_adapter_may_name_the_old_layers() -> None:
    for names in (["w1", "w2", "w3", "q_proj", "gate"], r".*\.(w1|w2|w3|q_proj|gate)"):
        model = KINDS["mixtral"].build()
        model.add_adapter(peftlite.LoraConfig(r=3, lora_alpha=6, target_modules=names))
        config = model.peft_config["default"]
        assert config.target_parameters == ["experts.down_proj", "experts.gate_up_proj", "gate.weight"]
        theirs = peft_adds(KINDS["mixtral"].build(), r=3, lora_alpha=6, target_modules=names)
        shapes = [{key: tensor.shape for key, tensor in m.state_dict().items()} for m in (model, theirs)]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize("kind", ["mixtral", "qwen3"])
def test_all_linear_means_what_was_linear(kind: str) -> None:
    model, theirs = KINDS[kind].build(), peft_adds(KINDS[kind].build(), target_modules="all-linear")
    model.add_adapter(peftlite.LoraConfig(target_modules="all-linear"))
    assert list(model.state_dict()) == list(theirs.state_dict())


def test_layers_of_one_parameter_need_one_scaling() -> None:
    model = KINDS["mixtral"].build()
    with pytest.raises(ConfigError, match=r"scalings of their own .*gate_up_proj"):
        model.add_adapter(peftlite.LoraConfig(target_modules=["w1", "w3"], alpha_pattern={"w1": 1}))


def test_a_name_that_never_was_is_an_error() -> None:
    with pytest.raises(TargetNotFoundError, match="`w4`"):
        KINDS["mixtral"].build().add_adapter(peftlite.LoraConfig(target_modules=["w1", "w3", "w4"]))


def test_names_that_layers_still_have_mean_those() -> None:
    model = KINDS["qwen2"].build()
    model.add_adapter(peftlite.LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"]))
    assert model.peft_config["default"].target_parameters is None


# ---- names
@pytest.mark.parametrize(
    ("model_type", "source"),
    {
        "deepseek_v3": "model.layers.3.mlp.experts.*.gate_proj",
        "jamba": "model.layers.1.feed_forward.experts.*.gate_proj",
        "minimax": "model.layers.0.block_sparse_moe.experts.*.w1",
        "nemotron_h": "backbone.layers.1.mixer.experts.*.up_proj",
        "phimoe": "model.layers.0.block_sparse_moe.experts.*.w1",
        "qwen3_omni_moe_thinker": "thinker.language_model.layers.0.mlp.experts.*.gate_proj",
    }.items(),
)
def test_old_names_are_those_that_transformers_loads(model_type: str, source: str) -> None:
    if VERSION < (5, 4) and model_type in ("nemotron_h", "phimoe", "qwen3_omni_moe_thinker"):
        pytest.skip("transformers 5.0 does not convert these yet")
    config = transformers.AutoConfig.for_model(model_type)
    text = config.get_text_config()
    for name in {"num_hidden_layers", "num_experts", "num_local_experts", "n_routed_experts"} & text.to_dict().keys():
        setattr(text, name, 8 if name == "n_routed_experts" else 4)
    with torch.device("meta"):
        kind = transformers.AutoModel if text is not config else transformers.AutoModelForCausalLM
        model = kind.from_config(config)
    names = [name for name, _ in model.named_parameters()]
    found = former_names(model, names)
    assert source in itertools.chain.from_iterable(former.sources for former in found)
    stacked = {name for name, p in model.named_parameters() if p.dim() == 3 and "experts" in name}
    assert stacked == {former.target for former in found if former.stacked}
    mapping = Mapping.of(get_model_conversion_mapping(model))
    renamings = [one for one, _ in mapping.renamings]
    for former in found:
        for _, _, path in former.paths(2):
            assert rename_source_key(f"{path}.weight", renamings, mapping.conversions)[0] == former.target


def test_a_model_without_a_mapping_has_no_old_names(llama: Any) -> None:
    assert former_names(llama, [name for name, _ in llama.named_parameters()]) == []


@pytest.mark.parametrize("memory", [False, True], ids=["directory", "state dict"])
@pytest.mark.parametrize("kind", KINDS)
def test_is_swapped_in_for_another(kind: str, memory: bool, tmp_path: Path) -> None:
    old = old_file(kind, "1", "2", "3", "q_proj")
    model = old.loaded(old.write(tmp_path), wrapped=False)
    randomised(model)
    if memory:
        tensors = {f"base_model.model.{key}": tensor for key, tensor in old.tensors.items()}
        peftlite.hotswap_adapter_from_state_dict(model, tensors, "default", old.config)
    else:
        peftlite.hotswap_adapter(model, tmp_path, "default")
    old.check(model)


def test_tensors_alone_are_refused(tmp_path: Path) -> None:
    old = old_file("mixtral", "1", "2", "3")
    model = old.loaded(old.write(tmp_path), wrapped=False)
    before = snapshot(model)
    with pytest.raises(
        CheckpointError, match=r"missing: .*mlp.experts.*unexpected: .*experts.0.w1.*Nothing was changed"
    ):
        peftlite.set_peft_model_state_dict(model, old.tensors)
    assert snapshot(model) == before
