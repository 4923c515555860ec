"""What `import peftlite` gives, and what it costs; each claim in a fresh process."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import peftlite
from tests.versions import VERSION

ROOT = Path(__file__).parent.parent


def run(code: str) -> str:
    """What a fresh Python prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "numpy", "safetensors", "huggingface_hub", "accelerate", "peft")
    assert run(f"import peftlite, sys; print([m for m in {heavy} if m in sys.modules])") == "[]\n"


def test_only_integrations_import_transformers_or_the_hub() -> None:
    code = """
import sys, peftlite
for home, names in peftlite._HOMES.items():
    if not home.startswith("peftlite.integrations."):
        [getattr(peftlite, name) for name in names]
print([m for m in ("transformers", "huggingface_hub", "accelerate", "peft") if m in sys.modules])
"""
    assert run(code) == "[]\n"


@pytest.mark.parametrize("name", sorted(peftlite.__all__))
def test_each_public_name_resolves_to_one_object(name: str) -> None:
    value = getattr(peftlite, name)
    assert getattr(peftlite, name) is value
    assert name in dir(peftlite)
    if isinstance(value, type):
        assert value.__name__ == name
    if callable(value):
        assert value.__doc__, f"{name} has no docstring"


def test_type_checkers_see_the_names_that_there_are() -> None:
    tree = ast.parse((ROOT / "peftlite" / "__init__.py").read_text())
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {a.name: n.module for b in blocks for n in ast.walk(b) if isinstance(n, ast.ImportFrom) for a in n.names}
    assert seen == {name: home for home, names in peftlite._HOMES.items() for name in names}
    assert set(seen) == set(peftlite.__all__) - {"errors"}
    assert len(set(peftlite.__all__)) == len(peftlite.__all__)


def test_star_import_takes_all() -> None:
    assert run("from peftlite import *; print(LoraConfig.__name__, get_peft_model.__name__)") == (
        "LoraConfig get_peft_model\n"
    )


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(AttributeError, match="no `LoraConfg`; nearest: `LoraConfig`"):
        peftlite.LoraConfg  # noqa: B018
    with pytest.raises(ImportError):
        exec("from peftlite import no_such_name")


@pytest.mark.parametrize("first", ["PeftConfig", "inject", "get_layer_status"])
def test_whatever_is_used_first_the_tuners_are_there(first: str) -> None:
    """A registry that fills by imports must not depend on their order."""
    code = f"""
import peftlite
peftlite.{first}
import torch
model = torch.nn.Sequential(torch.nn.Linear(2, 2))
config = peftlite.PeftConfig.from_peft_type("LORA", target_modules=["0"])
print(len(peftlite.get_layer_status(peftlite.inject_adapter_in_model(config, model))))
"""
    assert run(code) == "1\n"


def function_of(attribute: Any) -> Any:
    return attribute.__func__ if isinstance(attribute, classmethod | staticmethod) else attribute


def shared() -> dict[str, tuple[Any, Any]]:
    """Functions and methods that both libraries have, by name: (ours, PEFT's)."""
    found = {}
    for name in peftlite.__all__:
        ours, theirs = getattr(peftlite, name), getattr(peft, name, None)
        if inspect.isfunction(ours) and theirs is not None:
            found[name] = (ours, theirs)
        if isinstance(ours, type) and isinstance(theirs, type) and issubclass(ours, torch.nn.Module):
            for method in dir(ours):
                mine, other = (function_of(inspect.getattr_static(cls, method, None)) for cls in (ours, theirs))
                if inspect.isfunction(mine) and inspect.isfunction(other) and not hasattr(torch.nn.Module, method):
                    found[f"{name}.{method}"] = (mine, other)
    return found


NOT_BUILT = {"task_ids"}  # prompt tuning


@pytest.mark.parametrize("name", sorted(shared()))
def test_what_pefts_functions_take_ours_take(name: str) -> None:
    if VERSION < (5, 0) and name.endswith("push_to_hub"):
        pytest.skip("PEFT has it from transformers, whose version 4 takes other arguments")
    ours, theirs = (inspect.signature(function).parameters for function in shared()[name])
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    wanted = [p for p in theirs.values() if p.kind not in kinds and p.name not in NOT_BUILT]
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in ours.values()):
        return
    assert list(ours)[: len(wanted)] == [p.name for p in wanted]
    for parameter in wanted:
        default, theirs_default = ours[parameter.name].default, parameter.default
        if inspect.isfunction(theirs_default):  # each has its own of that name
            default, theirs_default = default.__name__, theirs_default.__name__
        assert default == theirs_default, parameter.name
