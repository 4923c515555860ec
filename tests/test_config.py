"""Configs: the same fields and files as PEFT's, checked when made, and never a key that is silently ignored."""

from __future__ import annotations

import dataclasses
import json
import stat
import string
from pathlib import Path
from typing import Any

import peft
import pytest
from hypothesis import given
from hypothesis import strategies as st

import peftlite.config as config_module
from peftlite import defaults
from peftlite.config import (
    CONFIG_NAME,
    FORMAT_VERSION,
    HubOptions,
    PeftConfig,
    PeftType,
    TaskType,
    atomic_path,
    config_from_dict,
)
from peftlite.errors import (
    AdapterFilesNotFoundError,
    CheckpointError,
    ConfigError,
    PeftliteWarning,
    UnsupportedFeatureError,
)
from peftlite.registry import Registry
from peftlite.tuners.lora.config import UNBUILT, LoraConfig
from peftlite.tuners.lora.values import LoraRuntimeConfig

NAMES = st.text(string.ascii_letters + string.digits + "_.", min_size=1, max_size=12)
NAME_LISTS = st.lists(NAMES, max_size=5, unique=True)
INDICES = st.none() | st.integers(0, 99) | st.lists(st.integers(0, 99), max_size=4, unique=True)
PATTERNS = st.sampled_from(["q", "v_proj", r"^model\.layers\.\d+\.q", "layers.(0|1).q", "é"])
NUMBERS = st.integers(-64, 64) | st.floats(-64, 64, allow_nan=False)


@st.composite
def fields(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of a config that this version supports, some of them left out."""
    every = {
        "task_type": st.none() | st.sampled_from([t.value for t in TaskType]),
        "auto_mapping": st.none() | st.just({"parent_library": "a.b", "base_model_class": "C"}),
        "base_model_name_or_path": st.none() | st.text(max_size=8),
        "revision": st.none() | st.just("main"),
        "inference_mode": st.booleans(),
        "r": st.integers(1, 64),
        "target_modules": st.none() | NAME_LISTS | st.sampled_from(["all-linear", r".*\.(q|v)_proj"]),
        "exclude_modules": st.none() | NAME_LISTS | st.just(r"model\.layers\.0\..*"),
        "lora_alpha": NUMBERS,
        "lora_dropout": st.floats(0, 0.99),
        "fan_in_fan_out": st.booleans(),
        "bias": st.sampled_from(["none", "all", "lora_only"]),
        "use_rslora": st.booleans(),
        "modules_to_save": st.none() | NAME_LISTS,
        "init_lora_weights": st.booleans() | st.just("gaussian"),
        "layers_to_transform": INDICES,
        "layers_pattern": st.none() | st.just("layers") | st.just(["h", "layers"]),
        "rank_pattern": st.dictionaries(PATTERNS, st.integers(1, 64)),
        "alpha_pattern": st.dictionaries(PATTERNS, NUMBERS),
        "lora_bias": st.booleans(),
    }
    made = {name: draw(strategy) for name, strategy in every.items() if draw(st.booleans())}
    if made.get("lora_bias"):
        made["init_lora_weights"] = bool(made.get("init_lora_weights", True))
    if isinstance(made.get("target_modules"), str) or made.get("layers_to_transform") is None:
        made.pop("layers_pattern", None)
    if isinstance(made.get("target_modules"), str):
        made.pop("layers_to_transform", None)
    return made


def comparable(value: Any) -> Any:
    """Collections without the order that they have in one library and not in the other."""
    return sorted(value, key=str) if isinstance(value, (set, list, tuple)) else value


def assert_same_fields(ours: PeftConfig, theirs: peft.PeftConfig) -> None:
    got, expected = ours.to_dict(), theirs.to_dict()
    assert list(got) == list(expected)
    for name in got:
        assert comparable(got[name]) == comparable(expected[name]), name


# -- the same as PEFT's ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "theirs"), [(PeftConfig, peft.PeftConfig), (LoraConfig, peft.LoraConfig)])
def test_fields_their_order_and_defaults_are_pefts(ours: Any, theirs: Any) -> None:
    assert [f.name for f in dataclasses.fields(ours)] == [f.name for f in dataclasses.fields(theirs)]
    assert_same_fields(ours(), theirs())
    at_runtime = dataclasses.asdict(peft.LoraConfig().runtime_config)
    assert at_runtime.items() <= dataclasses.asdict(LoraRuntimeConfig()).items()


@pytest.mark.parametrize(("ours", "theirs"), [(PeftType, peft.PeftType), (TaskType, peft.TaskType)])
def test_kinds_and_tasks_are_pefts(ours: Any, theirs: Any) -> None:
    assert [(m.name, m.value) for m in ours] == [(m.name, m.value) for m in theirs]
    assert ours[next(iter(ours)).name] == next(iter(theirs)).value  # a member is its string


@given(fields())
def test_a_config_survives_its_file_and_its_file_is_deterministic(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("config")
    config = LoraConfig(**values)
    config.save_pretrained(folder)
    assert PeftConfig.from_pretrained(folder) == config
    text = (folder / CONFIG_NAME).read_text(encoding="utf-8")
    shuffled = {k: list(reversed(v)) if k in ("target_modules", "exclude_modules") and isinstance(v, list) else v
                for k, v in values.items()}  # fmt: skip
    assert LoraConfig(**shuffled).to_json() == text
    assert list(json.loads(text)) == sorted(json.loads(text))


@given(fields())
def test_peft_reads_our_files_and_we_read_those_it_writes_of_them(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("config")
    config = LoraConfig(**values)
    config.save_pretrained(folder)
    theirs = peft.PeftConfig.from_pretrained(str(folder))
    assert type(theirs) is peft.LoraConfig
    assert_same_fields(config, theirs)
    theirs.save_pretrained(str(folder))
    assert LoraConfig.from_pretrained(folder) == config


@given(fields())
def test_we_read_pefts_files_and_write_the_same_json(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("config")
    theirs = peft.LoraConfig(**values)
    theirs.save_pretrained(str(folder))
    ours = PeftConfig.from_pretrained(folder)
    assert_same_fields(ours, theirs)
    written = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    for name in ("target_modules", "exclude_modules", "layers_to_transform"):
        written[name] = comparable(written[name])
    got = json.loads(ours.to_json())
    got["layers_to_transform"] = comparable(got["layers_to_transform"])
    assert {k: comparable(v) for k, v in got.items()} == {k: comparable(v) for k, v in written.items()}


def test_the_file_is_pefts_byte_for_byte_when_nothing_in_it_is_a_set(tmp_path: Path) -> None:
    values = {"r": 4, "target_modules": "all-linear", "rank_pattern": {"a": 1, "b": 2}, "task_type": "CAUSAL_LM"}
    LoraConfig(**values).save_pretrained(tmp_path / "ours")
    peft.LoraConfig(**values).save_pretrained(str(tmp_path / "theirs"))
    assert (tmp_path / "ours" / CONFIG_NAME).read_bytes() == (tmp_path / "theirs" / CONFIG_NAME).read_bytes()


def test_the_order_of_overlapping_patterns_survives_the_file(tmp_path: Path) -> None:
    """PEFT sorts them on saving, so that another one is the first to match when it reads them back."""
    config = LoraConfig(rank_pattern={"q": 4, "layers.0.q": 2}, alpha_pattern={"q": 8, "layers.0.q": 1})
    config.save_pretrained(tmp_path)
    for read in (LoraConfig.from_pretrained(tmp_path), peft.LoraConfig.from_pretrained(str(tmp_path))):
        assert list(read.rank_pattern) == list(read.alpha_pattern) == ["q", "layers.0.q"]
    assert LoraConfig.from_pretrained(tmp_path).rank_for("layers.0.q") == 4


def test_the_default_targets_are_pefts() -> None:
    from peft.utils import constants

    for peft_type, table in defaults.TARGETS.items():
        name = peft_type.value.replace("_", "")
        theirs = getattr(constants, f"TRANSFORMERS_MODELS_TO_{name}_TARGET_MODULES_MAPPING")
        assert {k: v if isinstance(v, str) else list(v) for k, v in table.items()} == theirs
        for model_type, names in theirs.items():
            got = defaults.default_targets(model_type, peft_type)
            assert got == (names if isinstance(names, str) else sorted(names))
    feedforward = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    assert {k: list(v) for k, v in defaults.IA3_FEEDFORWARD.items()} == feedforward
    assert defaults.default_feedforward("mt5", PeftType.IA3) == []
    assert defaults.default_feedforward("llama", PeftType.LORA) is None
    assert defaults.default_targets("no_such_model", PeftType.LORA) is None
    assert defaults.default_targets("llama", PeftType.BOFT) is None


# -- what a config is --------------------------------------------------------------------------------------------------


def test_collections_become_lists_in_an_order_that_does_not_vary() -> None:
    config = LoraConfig(
        target_modules={"v", "q", "k"},
        exclude_modules=("b", "a", "a"),
        modules_to_save=["z", "a"],
        layers_to_transform=range(3),  # type: ignore[arg-type]
    )
    assert config.target_modules == ["k", "q", "v"]
    assert config.exclude_modules == ["a", "b"]
    assert config.modules_to_save == ["z", "a"]
    assert config.layers_to_transform == [0, 1, 2]
    config.target_modules = {"b", "a"}  # type: ignore[assignment]
    assert json.loads(config.to_json())["target_modules"] == ["a", "b"]


def test_the_users_objects_are_not_shared() -> None:
    ranks = {"q": 2}
    config = LoraConfig(rank_pattern=ranks)
    twin = config.copy()
    twin.rank_pattern["v"] = 3
    config.to_dict()["rank_pattern"]["k"] = 4
    ranks["o"] = 5
    assert config.rank_pattern == {"q": 2}
    assert twin == dataclasses.replace(config, rank_pattern={"q": 2, "v": 3})


def test_a_config_is_made_again_from_its_dict() -> None:
    config = LoraConfig(r=3, target_modules=["q"], task_type="CAUSAL_LM")
    assert LoraConfig(**config.to_dict()) == config_from_dict(config.to_dict()) == config
    assert config_from_dict(peft.LoraConfig(r=3, target_modules=["q"], task_type="CAUSAL_LM").to_dict()) == config
    assert PeftConfig.from_peft_type(peft_type="LORA", r=3) == LoraConfig(r=3)
    assert LoraConfig.from_peft_type(r=3) == LoraConfig(r=3)
    assert "runtime_config" not in config.to_dict()


def test_kinds_are_members_and_a_base_config_has_any_of_them() -> None:
    assert LoraConfig().peft_type is PeftType.LORA
    assert PeftConfig(peft_type="IA3").peft_type is PeftType.IA3
    assert PeftConfig().peft_type is None
    assert LoraConfig(task_type=TaskType.SEQ_CLS).task_type is TaskType.SEQ_CLS
    assert LoraConfig(peft_type=peft.PeftType.LORA, task_type=peft.TaskType.SEQ_CLS).task_type is TaskType.SEQ_CLS
    assert not LoraConfig().is_prompt_learning
    assert not LoraConfig().is_adaption_prompt


def test_a_path_is_as_good_as_its_text() -> None:
    assert LoraConfig(base_model_name_or_path=Path("a") / "b").base_model_name_or_path == str(Path("a") / "b")  # type: ignore[arg-type]


# -- files -------------------------------------------------------------------------------------------------------------


def write(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
    return folder


def test_a_file_of_another_version_says_so_and_is_written_as_ours(tmp_path: Path) -> None:
    config = PeftConfig.from_pretrained(write(tmp_path, '{"peft_type": "LORA", "peft_version": "0.4.0", "r": 3}'))
    assert config.peft_version == "0.4.0"
    assert config.to_dict() == {**LoraConfig(r=3).to_dict(), "peft_version": "0.4.0"}
    assert json.loads(config.to_json())["peft_version"] == FORMAT_VERSION


def test_a_subfolder_is_entered(tmp_path: Path) -> None:
    LoraConfig(r=5).save_pretrained(tmp_path / "outer" / "inner")
    assert LoraConfig.from_pretrained(tmp_path / "outer", subfolder="inner").r == 5


def test_a_class_reads_a_file_without_peft_type(tmp_path: Path) -> None:
    folder = write(tmp_path, '{"r": 3}')
    assert LoraConfig.from_pretrained(folder).r == 3
    with pytest.raises(ConfigError, match="`peft_type` is missing"):
        PeftConfig.from_pretrained(folder)


def test_auto_mapping_can_be_given_for_the_file_alone(tmp_path: Path) -> None:
    config = LoraConfig()
    config.save_pretrained(tmp_path, auto_mapping_dict={"base_model_class": "C"})
    assert config.auto_mapping is None
    assert PeftConfig.from_pretrained(tmp_path).auto_mapping == {"base_model_class": "C"}


def test_the_default_values_of_what_is_not_built_load(tmp_path: Path) -> None:
    everything = {**json.loads(LoraConfig().to_json()), "loftq_config": None, "use_dora": None, "rank_pattern": None}
    assert config_from_dict(everything) == LoraConfig()
    assert set(UNBUILT) < {f.name for f in dataclasses.fields(LoraConfig)}


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_an_unknown_key_that_is_off_is_ignored_with_a_warning(value: object) -> None:
    with pytest.warns(PeftliteWarning, match="`merge_weights`"):
        assert config_from_dict({"peft_type": "LORA", "merge_weights": value}) == LoraConfig()


def test_how_to_run_is_not_read_from_a_file() -> None:
    with pytest.warns(PeftliteWarning, match="`runtime_config`"):
        config_from_dict({"peft_type": "LORA", "runtime_config": {"ephemeral_gpu_offload": True}})


def test_a_runtime_field_without_effect_says_so() -> None:
    with pytest.warns(PeftliteWarning, match="`ephemeral_gpu_offload=True` has no effect"):
        LoraConfig(runtime_config=LoraRuntimeConfig(ephemeral_gpu_offload=True))


@pytest.mark.parametrize("value", [0, 1, True, "x", [0]])
@pytest.mark.parametrize(("version", "named"), [("0.99.1", "PEFT `0.99.1`"), (None, "an unknown version")])
def test_an_unknown_key_that_is_set_is_an_error_that_names_the_writer(value: object, version: Any, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict({"peft_type": "LORA", "peft_version": version, "use_doras": value})
    for part in ("`use_doras`", f"`{value!r}`", "`use_dora`", named, "Nothing was changed."):
        assert part in str(caught.value)


def test_kinds_that_are_unknown_or_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"`'LORRA'`; nearest: `LORA`.* This version has .*`LORA`"):
        config_from_dict({"peft_type": "LORRA"})
    with pytest.raises(ConfigError, match=r"`\['LORA'\]`; nearest"):
        config_from_dict({"peft_type": ["LORA"]})
    monkeypatch.setattr(config_module, "_classes", {"LORA": LoraConfig})
    with pytest.raises(UnsupportedFeatureError, match=r"`OFT`.*it has `LORA`"):
        config_from_dict({"peft_type": "OFT"})


def test_what_is_no_directory_is_fetched_with_all_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    LoraConfig(r=7).save_pretrained(tmp_path)
    asked = []

    def fetch(name: str, options: HubOptions) -> Path:
        asked.append((name, options))
        return tmp_path

    files: Registry[Any] = Registry()
    monkeypatch.setattr(config_module, "_files", files)
    config_module.register_fetch(fetch)
    config_module.register_reader(lambda place: PeftConfig.from_json_file(place / "adapter_config.json"))
    assert PeftConfig.from_pretrained("user/adapter", "sub", revision="v1", token="t", local_files_only=True).r == 7
    assert asked == [("user/adapter", HubOptions("sub", "v1", None, "t", True, False))]


def test_a_class_refuses_a_file_of_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Other(PeftConfig):
        kind = PeftType.IA3

    monkeypatch.setattr(config_module, "_classes", {"LORA": LoraConfig, "IA3": Other})
    LoraConfig().save_pretrained(tmp_path)
    assert isinstance(Other(), Other)
    with pytest.raises(ConfigError, match=r"`LORA` adapter; call `LoraConfig\.from_pretrained`"):
        Other.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "\udce4"])
def test_a_file_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    (tmp_path / CONFIG_NAME).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=CONFIG_NAME):
        PeftConfig.from_pretrained(tmp_path)


def test_a_directory_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(AdapterFilesNotFoundError, match=f"no `{CONFIG_NAME}`"):
        PeftConfig.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="no directory"):
        PeftConfig.from_pretrained(tmp_path, subfolder="nowhere")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / CONFIG_NAME
    target.write_text("old")

    def fail() -> None:
        with atomic_path(target) as path:
            path.write_text("half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
    link = tmp_path / "link"  # as in a hub cache, where names share a file
    link.hardlink_to(target)
    with atomic_path(target) as path:
        path.write_text("new")
    plain = tmp_path / "plain"
    plain.touch()
    assert target.read_text() == "new"
    assert link.read_text() == "old"
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


# -- what bad input gets -----------------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], str]] = [
    ({"r": 0}, "`r` must be an int of at least 1, not `0`"),
    ({"r": 2.5}, "`r` must be an int of at least 1, not `2.5`"),
    ({"r": True}, "`r` must be an int"),
    ({"r": "8"}, "`r` must be an int of at least 1, not `'8'`"),
    ({"lora_alpha": "16"}, "`lora_alpha` must be a finite number"),
    ({"lora_alpha": float("nan")}, "`lora_alpha` must be a finite number, not `nan`"),
    ({"lora_dropout": 1.0}, "`lora_dropout` must be a probability below 1"),
    ({"lora_dropout": -0.1}, "`lora_dropout` must be a probability below 1 (and not below 0), not `-0.1`"),
    ({"lora_dropout": None}, "`lora_dropout` must be a finite number"),
    ({"bias": "lora"}, "`bias` is `'lora'`; nearest: `lora_only`"),
    ({"bias": True}, "`bias` is `True`"),
    ({"task_type": "CAUSAL"}, "`task_type` is `'CAUSAL'`; nearest: `CAUSAL_LM`"),
    ({"peft_type": "IA3"}, "`peft_type` is `'IA3'`; nearest: `LORA`"),
    ({"inference_mode": "no"}, "`inference_mode` must be True or False"),
    ({"auto_mapping": "x"}, "`auto_mapping` must be a dict or None"),
    ({"revision": 3}, "`revision` must be a string or None"),
    ({"base_model_name_or_path": 3}, "`base_model_name_or_path` must be a string or None"),
    ({"target_modules": 3}, "`target_modules` must be a list of names or None, not `3`"),
    ({"target_modules": {"q": 1}}, "`target_modules` must be a list of names or None"),
    ({"target_modules": [1]}, "`target_modules` must be a list of non-empty strings"),
    ({"target_modules": [""]}, "`target_modules` must be a list of non-empty strings"),
    ({"target_modules": "(q"}, "`target_modules` must be a valid regular expression"),
    ({"exclude_modules": "(q"}, "`exclude_modules` must be a valid regular expression"),
    ({"modules_to_save": "lm_head"}, "did you mean `['lm_head']`?"),
    ({"layers_to_transform": -1}, "`layers_to_transform` must be an int of at least 0"),
    ({"layers_to_transform": "0"}, "`layers_to_transform` must be an int, a list of ints or None"),
    ({"layers_to_transform": [0, "1"]}, "`layers_to_transform` must be an int of at least 0, not `'1'`"),
    ({"layers_to_transform": True}, "`layers_to_transform` must be an int"),
    ({"target_modules": ".*q", "layers_to_transform": [0]}, "`layers_to_transform` is `[0]`, but it only works"),
    ({"target_modules": "all-linear", "layers_to_transform": 0}, "`layers_to_transform` is `0`, but it only works"),
    ({"target_modules": ".*q", "layers_pattern": "h"}, "`layers_pattern` is `'h'`, but it only works"),
    ({"target_modules": ["q"], "layers_pattern": "h"}, "`layers_to_transform` does not say which layers"),
    ({"layers_pattern": ["(h"], "layers_to_transform": 0}, "`layers_pattern` must be a valid regular expression"),
    ({"layers_pattern": "(h", "layers_to_transform": 0}, "`layers_pattern` must be a valid regular expression"),
    ({"rank_pattern": {"q": 0}}, "`rank_pattern['q']` must be an int of at least 1, not `0`"),
    ({"rank_pattern": {"q": 2.0}}, "`rank_pattern['q']` must be an int"),
    ({"rank_pattern": ["q"]}, "`rank_pattern` must be a dict"),
    ({"rank_pattern": {1: 2}}, "`rank_pattern` must be a dict whose keys are non-empty strings"),
    ({"alpha_pattern": {"(q": 2}}, "`alpha_pattern` must be a valid regular expression"),
    ({"alpha_pattern": {"q": None}}, "`alpha_pattern['q']` must be a finite number"),
    ({"fan_in_fan_out": None}, "`fan_in_fan_out` must be True or False"),
    ({"use_rslora": 1}, "`use_rslora` must be True or False"),
    ({"init_lora_weights": "gausian"}, "`init_lora_weights` is `'gausian'`; nearest: `gaussian`"),
    ({"init_lora_weights": None}, "`init_lora_weights` is `None`; nearest: `True`, `False`, `gaussian`"),
    ({"init_lora_weights": "gaussian", "lora_bias": True}, "`lora_bias` is `True`, which needs"),
]


@pytest.mark.parametrize(("values", "said"), BAD, ids=[str(values) for values, _ in BAD])
def test_a_bad_value_is_named_with_what_would_do(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**values)
    assert said in str(caught.value)
    assert str(caught.value).endswith("Nothing was changed.")
    assert not isinstance(caught.value, UnsupportedFeatureError)


ASKS: dict[str, Any] = {
    "megatron_config": {"a": 1},
    "megatron_core": "mcore",
    "trainable_token_indices": [1],
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 2.0},
    "corda_config": {"a": 1},
    "lora_ga_config": {"a": 1},
    "use_dora": True,
    "velora_config": {"a": 1},
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "qalora_group_size": 32,
    "monteclora_config": {"a": 1},
    "layer_replication": [(0, 4)],
    "target_parameters": ["a.b"],
    "use_bdlora": {"a": 1},
    "arrow_config": {"top_k": 1},
    "kasa_config": {"a": 1},
    "ensure_weight_tying": True,
}


@pytest.mark.parametrize("name", UNBUILT)
def test_what_is_not_built_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedFeatureError, match=rf"`{name}` is .*Nothing was changed\."):
        LoraConfig(**{name: ASKS[name]})


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"init_lora_weights": "loftq"}, "`loftq_config`"),
        ({"loftq_config": {"loftq_bits": 3}}, "`loftq_bits`"),
        ({"eva_config": {"rho": 0.5}}, "`rho`"),
        ({"eva_config": {"rank": 2}}, "`'rank'`.*`rho`"),
        ({"corda_config": {"corda_method": "pca"}}, "`corda_method`.*`ipm`"),
        ({"lora_ga_config": {"direction": "ArBrr"}}, "`direction`.*`ArBr`"),
        ({"use_bdlora": {"nblocks": 0}}, "`nblocks`"),
        ({"use_bdlora": True}, "`use_bdlora`.*BdLoraConfig"),
        ({"alora_invocation_tokens": "go"}, "`alora_invocation_tokens`"),
        ({"qalora_group_size": 0}, "`qalora_group_size`"),
    ],
)
def test_options_are_checked_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"{named}.*Nothing was changed\."):
        LoraConfig(**fields)


@pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'corda' but:UserWarning")  # PEFT's
@pytest.mark.parametrize(
    "fields",
    [
        {"init_lora_weights": "eva", "eva_config": {"rho": 3.0, "whiten": True}},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "lora_ga", "lora_ga_config": {"direction": "A2rBr", "stable_gamma": 4}},
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 8, "loftq_iter": 5}},
        {"init_lora_weights": "pissa_niter_4"},
        {"use_bdlora": {"target_modules_bd_a": ["o_proj"], "nblocks": 4, "match_strict": False}},
        {"alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"},
        {"use_qalora": True, "qalora_group_size": 32},
        {"use_dora": True},
    ],
)
def test_options_are_in_files_as_peft_has_them(fields: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = LoraConfig(**fields), peft.LoraConfig(**fields)
    for name, config in (("ours", ours), ("theirs", theirs)):
        config.save_pretrained(tmp_path / name)
    mine, other = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs"))
    assert {key: mine[key] for key in fields} == {key: other[key] for key in fields}
    assert PeftConfig.from_pretrained(tmp_path / "theirs") == ours
    assert peft.PeftConfig.from_pretrained(tmp_path / "ours").to_dict() == theirs.to_dict()


def test_numbers_of_other_types_become_plain_ones() -> None:
    numpy = pytest.importorskip("numpy")
    config = LoraConfig(r=numpy.int64(4), lora_alpha=numpy.float32(0.5), lora_dropout=numpy.float64(0.25))
    assert (type(config.r), type(config.lora_alpha), type(config.lora_dropout)) == (int, float, float)
    assert json.loads(config.to_json())["r"] == 4
    assert LoraConfig(init_lora_weights="Gaussian").init_lora_weights == "gaussian"


@pytest.mark.parametrize("core", ["megatron.core", "", "..", "no_such.package", None, 3])
def test_layers_of_megatron_are_refused_with_the_package_that_is_missing(core: Any) -> None:
    said = (
        r"`megatron_config` is .*megatron-core, which is not installed: there is no package `.*`.*Nothing was changed"
    )
    with pytest.raises(UnsupportedFeatureError, match=said):
        LoraConfig(megatron_config={"tensor_model_parallel_size": 2}, megatron_core=core)


def test_layers_of_megatron_are_refused_where_it_is_installed() -> None:
    with pytest.raises(UnsupportedFeatureError, match=r"`megatron_config` is .*does not have that feature yet"):
        LoraConfig(megatron_config={"a": 1}, megatron_core="json.decoder")
