"""What is imported when it is first used: only then, and nothing that enumerates is any the poorer for it."""

from __future__ import annotations

import ast
import importlib
import json
import pickle
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import torch

import peftlite
from peftlite.config import PeftType, config_class
from peftlite.core.variant import COMPANIONS, TUNERS, tuner_for
from peftlite.registry import Registry, later, registry
from tests.models import tiny

ROOT = Path(__file__).parent.parent
KINDS = ["LORA", "ADALORA", "IA3", "LN_TUNING", "LOHA", "LOKR", "TRAINABLE_TOKENS", "VERA"]


def fresh(code: str) -> Any:
    """The JSON that a fresh Python prints last."""
    command = [sys.executable, "-W", "ignore", "-c", f"import json, sys\n{code}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


OURS = "print(json.dumps(sorted(m for m in sys.modules if m.partition('.')[0] == 'peftlite')))"
UNUSED = ("eva", "gradients", "covariance", "dora", "arrow", "alora", "frugal", "combine", "allocation", "vera", "lokr")


def test_a_registry_imports_what_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    things: Registry[int] = registry("things of a test")
    for name in ("one", "two"):
        source = f"from peftlite.registry import registry\nregistry('things of a test').register('{name}', {len(name)})"
        (tmp_path / f"home_of_{name}.py").write_text(source)
        things.homes[name] = f"home_of_{name}"
    monkeypatch.syspath_prepend(tmp_path)
    assert list(things) == ["one", "two"]
    assert "two" in things
    assert "three" not in things
    assert len(things) == 2
    assert "home_of_one" not in sys.modules
    assert things["one"] == 3
    assert "home_of_two" not in sys.modules
    assert list(things.values()) == [3, 3]
    with pytest.raises(KeyError, match="three"):
        things["three"]


def test_a_module_is_stood_in_for_until_it_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "late_module.py").write_text("value = 1")
    monkeypatch.syspath_prepend(tmp_path)
    module = later("late_module")
    assert "late_module" in repr(module)
    assert "late_module" not in sys.modules
    assert module.value == 1
    monkeypatch.setattr("late_module.value", 2)
    assert module.value == 2
    with pytest.raises(AttributeError, match="other"):
        _ = module.other


def test_every_module_that_is_put_off_is_there_by_the_name_that_type_checkers_see() -> None:
    found = 0
    for file in sorted((ROOT / "peftlite").rglob("*.py")):
        tree = ast.parse(file.read_text())
        said = {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                if getattr(node.value.func, "id", "") != "later":
                    continue
                (name,), (module,) = node.targets, node.value.args
                assert isinstance(name, ast.Name)
                assert isinstance(module, ast.Constant)
                assert said[name.id] == module.value, f"{file}: {name.id}"
                importlib.import_module(str(module.value))
                found += 1
    assert found > 10


def test_the_configs_of_all_methods_are_known_before_any_is_imported() -> None:
    code = "import peftlite.config as c\nbefore = list(c._classes)\nours = [m for m in sys.modules if 'tuners.' in m]"
    assert fresh(f"{code}\nprint(json.dumps([before, ours]))") == [KINDS, []]
    assert [config_class(kind).kind for kind in KINDS] == [PeftType(kind) for kind in KINDS]
    assert list(TUNERS)[: len(KINDS)] == KINDS
    assert [tuner_for(kind).peft_type for kind in TUNERS] == list(TUNERS)
    assert [companion.tuner.peft_type for companion in COMPANIONS.values()] == list(COMPANIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_method_is_found_by_its_name_alone_in_a_fresh_process(kind: str) -> None:
    code = f"""
from peftlite.config import config_class
from peftlite.core.variant import tuner_for
print(json.dumps([tuner_for("{kind}").peft_type, config_class("{kind}").kind.value]))
"""
    assert fresh(code) == [kind, kind]


def test_an_unknown_method_is_answered_with_all_names_in_a_fresh_process() -> None:
    code = """
from peftlite.config import config_from_dict
try:
    config_from_dict({"peft_type": "OFT"})
except Exception as error:
    print(json.dumps(str(error)))
"""
    assert all(f"`{kind}`" in fresh(code) for kind in KINDS)


def test_importing_what_most_programs_import_imports_little() -> None:
    modules = fresh(f"from peftlite import LoraConfig, get_peft_model\n{OURS}")
    assert "peftlite.tuners.lora.config" in modules
    assert "peftlite.core.layer" not in modules
    assert not [module for module in modules if module.startswith(("peftlite.checkpoint.", "peftlite.model"))]


def test_a_lora_adapter_imports_nothing_of_other_methods_or_beginnings() -> None:
    code = """
import torch
from peftlite import LoraConfig, get_peft_model
get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))(torch.ones(1, 2))
"""
    modules = fresh(code + OURS)
    assert "peftlite.core.layer" in modules
    assert [module for module in modules if module.rpartition(".")[2] in UNUSED] == []


def test_an_adapted_model_is_unpickled_in_a_process_that_has_imported_nothing(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    adapted = peftlite.get_peft_model(model, peftlite.LoraConfig(target_modules=["0"], use_dora=True, r=1))
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(adapted))
    code = f"""
import pathlib, pickle, torch
model = pickle.loads(pathlib.Path({str(tmp_path / "model.pickle")!r}).read_bytes())
print(json.dumps(model(torch.ones(1, 2)).tolist()))
"""
    assert fresh(code) == adapted(torch.ones(1, 2)).tolist()


def test_transformers_models_get_their_methods_when_one_is_asked_for() -> None:
    code = """
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.integrations import PeftAdapterMixin
import peftlite
before = "peftlite.integrations.transformers.methods" in sys.modules
from peftlite.integrations.transformers import mixin
late = all(type(vars(PeftAdapterMixin)[name]).__name__ == "FirstUse" for name in mixin.METHODS)
doc = LlamaForCausalLM.merge_adapter.__doc__
now = {name: type(vars(PeftAdapterMixin)[name]).__name__ for name in mixin.METHODS}
from peftlite.integrations.transformers.methods import methods
every = set(methods({"add_adapter": print, "load_adapter": print})) == set(mixin.METHODS)
print(json.dumps([before, late, doc == peftlite.merge_adapter.__doc__, sorted(set(now.values())), every]))
"""
    assert fresh(code) == [False, True, True, ["function"], True]


def test_a_method_asked_for_by_super_is_the_mixins() -> None:
    code = """
from transformers import LlamaConfig, LlamaForCausalLM
import peftlite
class Mine(LlamaForCausalLM):
    def add_adapter(self, config, name="mine"):
        return super().add_adapter(config, name)
sizes = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=16)
model = Mine(LlamaConfig(**sizes))
model.add_adapter(peftlite.LoraConfig(target_modules=["q_proj"]))
print(json.dumps(model.active_adapters()))
"""
    assert fresh(code) == ["mine"]


def test_what_is_known_of_a_model_is_imported_with_the_first_adapter() -> None:
    model = peftlite.get_peft_model(tiny("llama"), peftlite.LoraConfig())
    assert model.peft_config["default"].target_modules == ["q_proj", "v_proj"]


def test_annotations_name_what_is_put_off() -> None:
    """Parsers of command lines read them."""
    assert typing.get_type_hints(peftlite.LoraConfig)["eva_config"] == peftlite.EvaConfig | dict[str, Any] | None
    assert typing.get_type_hints(peftlite.get_peft_model)["return"] is peftlite.PeftModel
    assert typing.get_type_hints(peftlite.PeftModel.load_adapter)["return"] is peftlite.LoadReport
