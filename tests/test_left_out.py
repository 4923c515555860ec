"""The page of what is left out is all that is left out: of PEFT's public names, each is in peftlite or on the page."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
from torch import nn

import peftlite
from peftlite.standin.finder import ELSEWHERE
from peftlite.standin.table import names_of
from tests.models import tiny
from tests.versions import works_with_peft

PAGE = Path(__file__).parent.parent / "docs" / "left-out.md"
NAME = re.compile(r"`(\w+)`")
MODULES = (
    *("auto", "config", "functional", "helpers", "import_utils", "mapping", "mapping_func", "optimizers"),
    *("peft_model", "tuners", "tuners.tuners_utils", "utils"),
)
KINDS = [kind.value for kind in peftlite.PEFT_TYPE_TO_TUNER_MAPPING]
TASKS = list(peftlite.MODEL_TYPE_TO_PEFT_MODEL_MAPPING)
FIELDS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 9},
    "IA3": {"feedforward_modules": []},
    "LN_TUNING": {"target_modules": ["norm"]},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [1]},
}


def listed() -> dict[str, list[str]]:
    """Heading -> the names in the first column of the table below it."""
    found = {}
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        heading, _, text = section.partition("\n")
        rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
        found[heading] = [name for row in rows for name in NAME.findall(row)]
    return found


LISTED = listed()


def check(heading: str, lacking: set[str]) -> None:
    """Exactly these names are under a heading."""
    there = set(LISTED[heading])
    assert not lacking - there, f"in PEFT, not in peftlite, and not under `{heading}` of docs/{PAGE.name}"
    assert not there - lacking, f"under `{heading}` of docs/{PAGE.name}, and not left out"


def public(thing: Any) -> set[str]:
    """The public names that an object has, but for those of every module."""
    return {name for name in {*dir(type(thing)), *vars(thing)} - ORDINARY if not name.startswith("_")}


ORDINARY = {*dir(nn.Module), *vars(nn.Module())}


def offered(module: ModuleType) -> set[str]:
    """What a module of PEFT offers: names of `__all__`, and what is defined in it."""
    own = {name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
    return {name for name in {*getattr(module, "__all__", ()), *own} if not name.startswith("_")}


# ---- names
def test_no_name_is_listed_twice() -> None:
    for heading, names in LISTED.items():
        assert names, f"no names under `{heading}`"
        assert not [name for name, count in Counter(names).items() if count > 1], heading


def test_names_at_the_top_level() -> None:
    check("Names at the top level", set(peft.__all__) - set(peftlite.__all__))


def test_names_in_modules() -> None:
    lacking = set()
    for name in MODULES:
        module = f"peft.{name}"
        ours = {found for at in (module, *ELSEWHERE) for found in names_of(at)} | set(peftlite.__all__)
        lacking |= offered(importlib.import_module(module)) - ours
    check("Names in modules", lacking - set(LISTED["Names at the top level"]))


# ---- attributes
def adapted(library: Any, kind: str, task: str = "CAUSAL_LM") -> Any:
    config = library.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    return library.get_peft_model(
        tiny("llama"), config(**{"target_modules": ["q_proj"], "task_type": task, **FIELDS.get(kind, {})})
    )


@pytest.fixture(scope="module")
def pairs() -> dict[str, tuple[Any, Any]]:
    """Kind of adapter -> a model with one, by PEFT and by peftlite."""
    return {kind: (adapted(peft, kind), adapted(peftlite, kind)) for kind in KINDS}


def layer(model: Any) -> Any:
    return next(module for module in model.modules() if isinstance(module, model.base_model.tuner_layer_cls))


def lacking(theirs: Any, ours: Any) -> set[str]:
    return {name for name in public(theirs) if not hasattr(ours, name)}


pytestmark = [works_with_peft, pytest.mark.filterwarnings("ignore")]


def test_methods_of_wrappers(pairs: dict[str, tuple[Any, Any]]) -> None:
    found = set().union(*(lacking(*pair) for pair in pairs.values()))
    for task in TASKS:
        ours, theirs = (library.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task] for library in (peftlite, peft))
        made = pairs["LORA"][1]
        names = {name for name in set(dir(theirs)) - ORDINARY if not name.startswith("_")}
        found |= {name for name in names if not hasattr(ours, name) and not hasattr(made, name)}
    check("Methods of `PeftModel` and its kinds", found)


def test_methods_of_tuners_models(pairs: dict[str, tuple[Any, Any]]) -> None:
    found = set().union(*(lacking(one.base_model, other.base_model) for one, other in pairs.values()))
    check("Methods of tuners' models", found)


def test_methods_of_layers(pairs: dict[str, tuple[Any, Any]]) -> None:
    found = set().union(*(lacking(layer(one), layer(other)) for one, other in pairs.values()))
    check("Methods of layers", found - {"bias", "in_features", "out_features"})  # the base layer's, if it has them


def test_methods_of_configs(pairs: dict[str, tuple[Any, Any]]) -> None:
    configs = [[model.peft_config["default"] for model in pair] for pair in pairs.values()]
    check("Methods of configs", set().union(*(lacking(*pair) for pair in configs)))
