"""The stand-in itself: what `import peft` gives, when it is active, when it comes too late, what it tolerates."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
from functools import reduce
from pathlib import Path
from typing import Any

import peft
import pytest

from peftlite.standin.table import MODULES, names_of
from peftlite.standin.tolerance import DEFAULTS
from tests.ecosystem.programs import QUIET, needs_libraries, program, run


def test_nothing_is_active_unless_asked() -> None:
    program(
        """
        import importlib.metadata, sys, peftlite, peft
        assert not hasattr(peft, "__peftlite__") and peft.__file__
        assert not any(type(finder).__module__.startswith("peftlite.standin") for finder in sys.meta_path)
        """
    )


@needs_libraries
def test_names_objects_versions_and_pickles() -> None:
    program(
        """
        import sys
        import peftlite.as_peft
        assert "torch" not in sys.modules, "the stand-in alone imports torch"
        peftlite.as_peft.install()  # again: no effect
        assert sum(type(finder).__name__ == "StandIn" for finder in sys.meta_path) == 1
        """,
        """
        import importlib.metadata, importlib.util, pickle, runpy
        import peft, peftlite
        from transformers.utils import is_peft_available
        import accelerate.utils, diffusers.utils
        assert peft.__version__ == importlib.metadata.version("peft") == "0.21.2"
        assert importlib.metadata.packages_distributions()["peft"][0] == "peft"
        assert importlib.util.find_spec("peft.tuners.lora") and peft.__spec__.name == "peft"
        assert is_peft_available() and accelerate.utils.is_peft_available() and diffusers.utils.is_peft_available()
        for name in peftlite.__all__:
            assert getattr(peft, name) is getattr(peftlite, name) or name == "inject_adapter_in_model", name
        from peft.tuners.lora.config import LoraConfig
        config = LoraConfig(r=3)
        assert pickle.loads(pickle.dumps(config)) == config and type(config) is peftlite.LoraConfig
        old = b"cpeft.tuners.lora.config\\nLoraConfig\\n."  # how real peft names it
        assert pickle.loads(old) is peftlite.LoraConfig
        runpy.run_module("peft.tuners.lora.layer")
        """,
    )


@pytest.mark.parametrize("module", MODULES)
def test_the_table_names_what_there_is(module: str) -> None:
    for home, attribute in names_of(module).values():
        assert hasattr(__import__(home, fromlist=[attribute]), attribute), (home, attribute)


def test_what_is_not_there_says_so() -> None:
    program(
        """
        import peftlite.as_peft, peft
        missing = ("from peft import XLoraConfig", "import peft.tuners.xlora.layer", "from peft.tuners import gralora")
        for code in missing:
            try:
                exec(code)
            except ImportError as error:
                assert "peftlite stands in for `peft`, and has no `peft." in str(error), error
            else:
                raise AssertionError(code)
        assert not hasattr(peft, "XLoraConfig")
        for kind in (peft.PrefixTuningConfig, peft.OFTConfig, peft.PeftMixedModel):
            try:
                kind()
            except peftlite.errors.UnsupportedFeatureError as error:
                assert kind.__name__ in str(error)
        from peft.utils.transformers_weight_conversion import build_peft_weight_mapping
        assert build_peft_weight_mapping(None, "default") == []
        try:
            build_peft_weight_mapping([object()], "default")
        except peftlite.errors.UnsupportedFeatureError as error:
            assert "`peftlite.load_adapter`" in str(error)
        else:
            raise AssertionError
        assert issubclass(peft.PrefixTuningConfig, peft.PromptLearningConfig)
        """
    )


# ---- asked for, and when
def test_a_program_runs_as_it_is_with_its_arguments(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("import peft\nHERE = peft.__peftlite__\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, peft, beside\n"
        "if __name__ == '__main__':\n    assert beside.HERE and sys.argv[1:] == ['a', '--b']\n    print('ran')\n"
    )
    assert "ran" in run([*QUIET, "-m", "peftlite.as_peft", str(script), "a", "--b"]).stdout
    assert "ran" in run([*QUIET, "-m", "peftlite.as_peft", "-m", "script", "a", "--b"], cwd=tmp_path).stdout
    assert "usage" in run(["-m", "peftlite.as_peft"], ok=False).stdout


def test_the_hook_asks_for_workers(tmp_path: Path) -> None:
    """In an environment of its own: the hook is a file that every process of its Python reads."""
    run(["-m", "venv", "--without-pip", str(tmp_path)])
    python = str(tmp_path / "bin" / "python")
    paths = str(Path(peft.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), paths]), "PYTHONWARNINGS": "ignore"}

    def ask(*arguments: str, **more: str) -> str:
        done = subprocess.run([python, *arguments], env=environment | more, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    probe = ("-c", "import importlib.util as u; print(type(u.find_spec('peft').loader).__name__)")
    assert ask(*probe, PEFTLITE_AS_PEFT="1") == "SourceFileLoader"
    assert str(tmp_path) in ask("-m", "peftlite.as_peft", "--install-hook")
    assert ask(*probe, PEFTLITE_AS_PEFT="1") == "StandInLoader"
    assert ask(*probe) == ask(*probe, PEFTLITE_AS_PEFT="0") == "SourceFileLoader"
    assert str(tmp_path) in ask("-m", "peftlite.as_peft", "--remove-hook")
    assert ask(*probe, PEFTLITE_AS_PEFT="1") == "SourceFileLoader"


def test_it_says_so_when_real_peft_is_there() -> None:
    done = run(["-c", "import peftlite.as_peft"])
    assert "The real `peft` 0.21.2 is installed; as asked" in done.stderr


@pytest.mark.parametrize("first", ["peft", "peft.tuners.lora"])
def test_too_late_for_real_peft(first: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"import {first}\n\nimport peftlite.as_peft\n")
    done = run([str(script)], ok=False)
    assert f"Move the line `import peftlite.as_peft` ({script}, line 3) above" in done.stderr
    assert "first import of `peft`" in done.stderr


NO_PEFT = """
    import importlib.metadata, sys
    sys.modules["peft"] = None  # as if it were not installed, while the first library is imported
    """


@needs_libraries
def test_too_late_for_diffusers() -> None:
    done = program(NO_PEFT, "import diffusers.utils\ndel sys.modules['peft']\nimport peftlite.as_peft", ok=False)
    assert "`diffusers` is imported already, and has noted that there is no `peft`" in done.stderr


def test_late_for_transformers_is_repaired() -> None:
    program(
        NO_PEFT,
        """
        import transformers
        from transformers import Trainer, trainer, trainer_utils
        from transformers.utils import is_peft_available
        assert not is_peft_available()
        del sys.modules["peft"]
        import peftlite.as_peft
        assert is_peft_available()
        import peft
        from torch import nn
        model = peft.get_peft_model(nn.Sequential(nn.Linear(2, 2)), peft.LoraConfig(target_modules=["0"]))
        homes = [module for module in (trainer, trainer_utils) if hasattr(module, "_is_peft_model")]
        assert homes and all(module._is_peft_model(model) for module in homes)
        """,
    )


# ---- what PEFT tolerates
@pytest.mark.parametrize("place", DEFAULTS)
def test_the_defaults_that_change_are_of_keyword_only_arguments(place: str) -> None:
    """Also of functions that are decorated, now or later: the signature is that of the function inside."""
    module, _, path = place.partition(":")
    found: Any = reduce(getattr, path.split("."), importlib.import_module(module))
    argument, value = DEFAULTS[place]
    parameter = inspect.signature(found).parameters[argument]
    assert parameter.kind is parameter.KEYWORD_ONLY
    assert parameter.default not in (value, parameter.empty)


def test_what_peft_tolerates_is_a_warning() -> None:
    program(
        """
        import peftlite.as_peft
        import warnings
        import peft, peftlite, torch
        from torch import nn

        def model():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

        def warned(call, words):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                result = call()
            assert any(words in str(w.message) for w in caught), [str(w.message) for w in caught]
            return result

        config = peft.LoraConfig(r=2, target_modules=["0", "1", "nowhere"])
        wrapped = warned(lambda: peft.get_peft_model(model(), config), "nowhere")
        state = peft.get_peft_model_state_dict(wrapped)
        first = next(iter(state))
        part = {key: tensor for key, tensor in state.items() if key != first}
        part["base_model.model.9.lora_A.weight"] = state[first]
        report = warned(lambda: peft.set_peft_model_state_dict(wrapped, part), "missing")
        assert report.missing_keys == [first] and len(report.unexpected_keys) == 1
        wrong = {**state, first: torch.zeros(3, 4)}
        for options in ({}, {"strict": True}):
            try:
                peft.set_peft_model_state_dict(wrapped, wrong, **options)
            except ValueError as error:
                assert "of another shape" in str(error)
            else:
                raise AssertionError("another shape was loaded")
        warned(lambda: peft.set_peft_model_state_dict(wrapped, wrong, ignore_mismatched_sizes=True), "of another shape")
        try:  # an explicit argument is what counts
            peftlite.get_peft_model(model(), config, unmatched="error")
        except peftlite.errors.TargetNotFoundError:
            pass
        else:
            raise AssertionError("`unmatched='error'` was not heeded")

        half = model().bfloat16()
        plain = peft.LoraConfig(r=2, target_modules=["0"])
        warned(lambda: peft.inject_adapter_in_model(plain, half), "in bfloat16, the base model's dtype")
        assert half[0].lora_A["default"].weight.dtype is torch.bfloat16 and list(half.peft_config) == ["default"]
        """
    )


def test_kinds_of_layers() -> None:
    program(
        """
        import peftlite.as_peft
        import peft, torch
        from torch import nn
        from peft.tuners.ia3 import IA3Layer
        from peft.tuners.loha import LoHaLayer
        from peft.tuners.lora import Conv2d, Embedding, Linear, LoraLayer
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

        def kinds(layer):
            every = (BaseTunerLayer, LoraLayer, Linear, Embedding, Conv2d, LoHaLayer, IA3Layer)
            every += (AuxiliaryTrainingWrapper, ModulesToSaveWrapper)
            return {kind.__name__ for kind in every if isinstance(layer, kind)}

        base = nn.ModuleDict({"lin": nn.Linear(4, 4), "emb": nn.Embedding(4, 4), "head": nn.Linear(4, 4)})
        config = peft.LoraConfig(target_modules=["lin", "emb"], modules_to_save=["head"])
        model = peft.get_peft_model(base, config).base_model.model
        assert kinds(model["lin"]) == {"BaseTunerLayer", "LoraLayer", "LoraLinear"}
        assert kinds(model["emb"]) == {"BaseTunerLayer", "LoraLayer", "LoraEmbedding"}
        assert kinds(model["head"]) == {"AuxiliaryTrainingWrapper", "ModulesToSaveWrapper"}
        assert not kinds(nn.Linear(2, 2)) and issubclass(type(model["lin"]), BaseTunerLayer)
        loha = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.LoHaConfig(target_modules=["0"]))
        assert kinds(loha.base_model.model[0]) == {"BaseTunerLayer", "LoHaLayer"}
        assert LoraLayer.scale_layer is type(model["lin"]).scale_layer
        for misuse in (lambda: LoraLayer(nn.Linear(2, 2)), lambda: setattr(Linear, "forward", None)):
            try:
                misuse()
            except TypeError as error:
                assert "one class" in str(error) or "cannot be replaced" in str(error)
            else:
                raise AssertionError
        """
    )
