"""Which modules a config means: the same as PEFT's choice, and a word about each entry that means nothing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import peft
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import get_pattern_key
from torch import nn

from peftlite.core.targets import (
    TargetSpec,
    complain,
    is_all_linear,
    layer_index,
    match_pattern,
    report,
    select,
)
from peftlite.errors import ConfigError, PeftliteWarning, TargetNotFoundError
from peftlite.tuners.lora.config import LoraConfig

WORDS = ["layers", "h", "block", "attn", "q", "v_q", "head", "lm_head", "0", "1", "2", "10"]
USUAL = [f"{top}{layers}.{i}.{leaf}" for top in ("", "m.") for layers in ("layers", "h") for i in (0, 1, 10)
         for leaf in ("q", "v_q", "attn.q", "head")]  # fmt: skip
PATHS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map(".".join) | st.sampled_from(USUAL)
ENTRIES = st.lists(st.sampled_from(WORDS), min_size=1, max_size=3).map(".".join) | st.sampled_from(
    ["q", "v_q", "attn.q"]
)
REGEXES = st.sampled_from(
    ["q", ".*", r".*\.q", r".*(q|head)", r"layers\.0\..*", r"layers\..*", "nothing", r".*layers\.[01]\..*", "h|layers"]
)
LAYER_PATTERNS = st.sampled_from(
    ["layers", "h", "block", "l.*", "(h|layers)", "attn.layers", "^h", r"block\.layers", "."]
)
KEYS = st.lists(
    ENTRIES
    | REGEXES
    | st.sampled_from(["^layers.0.q", "^q", "q$", "^.*q", "v_q|head", "a.n", "(?:layers.)?0.q", ".q", "l.*"]),
    max_size=4,
    unique=True,
)


@st.composite
def specs(draw: st.DrawFn, targets: st.SearchStrategy[str] = ENTRIES) -> dict[str, Any]:
    """Fields of a config that name modules."""
    values: dict[str, Any] = {"target_modules": draw(st.lists(targets, min_size=1, max_size=4) | REGEXES)}
    if draw(st.booleans()):
        values["exclude_modules"] = draw(st.lists(ENTRIES, max_size=2) | REGEXES)
    if isinstance(values["target_modules"], list) and draw(st.booleans()):
        values["layers_to_transform"] = draw(st.integers(0, 2) | st.lists(st.sampled_from([0, 1, 2, 10]), max_size=2))
        values["layers_pattern"] = draw(st.none() | LAYER_PATTERNS | st.lists(LAYER_PATTERNS, max_size=2))
    return values


def ours(paths: Iterable[str], **values: Any) -> Any:
    return select(paths, TargetSpec.from_config(LoraConfig(**values)))


# -- the same as PEFT's --------------------------------------------------------------------------------------------


@settings(max_examples=500)
@given(st.lists(PATHS, min_size=1, max_size=12, unique=True), specs())
def test_the_same_paths_as_peft(paths: list[str], values: dict[str, Any]) -> None:
    config = peft.LoraConfig(**values)
    expected = [path for path in paths if check_target_module_exists(config, path)]
    expected = [
        path for path in expected if type(check_target_module_exists(config, path)).__name__ != "_ExcludedModule"
    ]
    event(f"{min(len(expected), 3)} found")
    assert list(ours(paths, **values).targets) == expected


@settings(max_examples=500)
@given(PATHS, KEYS)
def test_the_same_pattern_as_peft(path: str, keys: list[str]) -> None:
    expected = get_pattern_key(keys, path)
    event("found" if expected in keys else "not found")
    assert (match_pattern(keys, path) or path) == expected


LEAVES = ["q", "v_q", "head", "lm_head"]
INNER = ["layers", "h", "block", "attn", "0", "1", "10"]
LEAF_PATHS = st.builds(
    lambda above, leaf: ".".join([*above, leaf]), st.lists(st.sampled_from(INNER), max_size=4), st.sampled_from(LEAVES)
) | st.sampled_from(USUAL)


def tree(leaves: Iterable[str]) -> nn.Module:
    """A module tree with a linear layer at each of the paths."""
    root = nn.Module()
    for path in leaves:
        parent = root
        *above, last = path.split(".")
        for name in above:
            if name not in parent._modules:
                parent.add_module(name, nn.Module())
            parent = parent.get_submodule(name)
        parent.add_module(last, nn.Linear(1, 1))
    return root


def injected_by_peft(model: nn.Module, config: peft.LoraConfig) -> tuple[dict[str, tuple[int, float]], set[str]]:
    """Path -> rank and scaling of what PEFT adapts, and the outermost paths that it trains as a whole."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, config).base_model.model
    named = list(wrapped.named_modules())
    adapted = {n: (m.r["default"], m.scaling["default"]) for n, m in named if isinstance(m, LoraLayer)}
    saved = {n for n, m in named if isinstance(m, ModulesToSaveWrapper)}
    return adapted, {n for n in saved if not any(n.startswith(f"{other}.") for other in saved)}


@settings(max_examples=200)
@given(
    st.lists(LEAF_PATHS, min_size=4, max_size=12, unique=True),
    specs(targets=st.sampled_from([*LEAVES, "attn.q", "0.q", "layers.1.q", "attn"])),
    st.none() | st.lists(ENTRIES | st.sampled_from(["head", "layers.0", "q"]), max_size=2),
    st.dictionaries(st.sampled_from(["q", "layers.0.q", "^q", r"layers\.\d+\..*", "head", ".*"]), st.integers(1, 5)),
    st.booleans(),
)
def test_the_same_modules_as_peft_adapts(
    leaves: list[str], values: dict[str, Any], saved: list[str] | None, numbers: dict[str, int], rslora: bool
) -> None:
    values = {**values, "modules_to_save": saved, "rank_pattern": numbers, "use_rslora": rslora}
    values["alpha_pattern"] = {key: 2 * number + 1 for key, number in reversed(numbers.items())}
    model = tree(leaves)
    modules = dict(model.named_modules())
    selection = ours(modules, **values)
    try:
        adapted, kept = injected_by_peft(model, peft.LoraConfig(**values))
    except ValueError as error:
        event(type(error).__name__)
        if type(error).__name__ == "NoMatchingPeftModuleError":
            assert not selection.targets
        else:  # PEFT stops at the first target that is no layer; where that is, we have chosen it too
            assert any(not isinstance(modules[path], nn.Linear) for path in selection.targets)
        return
    except TypeError:  # PEFT adapts a layer and then wants to save the adapter: an entry ends inside a name
        event("TypeError")
        return
    event(f"adapted, {len(kept)} saved")
    config = LoraConfig(**values)
    assert set(selection.saved) == kept
    # where an entry ends inside a name, PEFT adapts the layers of what it trains as a whole too, twice
    adapted = {path: numbers for path, numbers in adapted.items() if ".original_module." not in path}
    adapted = {path: numbers for path, numbers in adapted.items() if ".modules_to_save." not in path}
    assert {path: (config.rank_for(path), config.scaling_for(path)) for path in selection.targets} == adapted


# -- the rules ----------------------------------------------------------------------------------------------------

MODEL = (
    "",
    "layers",
    "layers.0",
    "layers.0.q",
    "layers.0.k",
    "layers.1",
    "layers.1.q",
    "layers.1.k",
    "head",
    "lm_head",
)
DEEP = tuple(f"model.{path}" if path else "" for path in MODEL)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"target_modules": ["q"]}, "layers.0.q layers.1.q"),
        ({"target_modules": ["0.q", "lm_head"]}, "layers.0.q lm_head"),
        ({"target_modules": ["head"]}, "head"),
        ({"target_modules": r".*\.1\.[qk]"}, "layers.1.q layers.1.k"),
        ({"target_modules": "q"}, ""),
        ({"target_modules": ["q", "k"], "exclude_modules": ["0.q", "k"]}, "layers.1.q"),
        ({"target_modules": ["q", "k"], "exclude_modules": r"layers\.0\..*"}, "layers.1.q layers.1.k"),
        ({"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "layers"}, "layers.1.q"),
        ({"target_modules": ["q"], "layers_to_transform": []}, "layers.0.q layers.1.q"),
        ({"target_modules": ["q", "layers.0.k"], "layers_to_transform": [1], "layers_pattern": "layers"},
         "layers.0.k layers.1.q"),
        ({"target_modules": ["q", "head"], "modules_to_save": ["head"]}, "layers.0.q layers.1.q"),
        ({"target_modules": ["q"], "modules_to_save": ["layers.0"]}, "layers.1.q"),
        ({"target_modules": []}, ""),
    ],
)  # fmt: skip
def test_what_is_targeted(values: dict[str, Any], expected: str) -> None:
    assert " ".join(ours(MODEL, **values).targets) == expected


def test_layers_are_found_without_a_pattern_below_two_names() -> None:
    assert ours(DEEP, target_modules=["q"], layers_to_transform=1).targets == ("model.layers.1.q",)
    assert layer_index("model.layers.11.mlp.experts.3.up") == 11
    assert layer_index("model.layers.11.mlp.experts.3.up", ["experts"]) == 3
    assert layer_index("layers.0.q") is None
    assert layer_index("layers.0.q", ["h", "layers"]) == 0
    assert layer_index("lm_head") is None


def test_what_is_saved_is_outermost_and_holds_no_target() -> None:
    selection = ours(MODEL, target_modules=["q", "k"], modules_to_save=["layers.0", "layers.0.q", "head"])
    assert selection.saved == ("layers.0", "head", "lm_head")
    assert selection.targets == ("layers.1.q", "layers.1.k")
    assert not selection.unmatched


def test_all_linear_stands_for_the_paths_that_are_given() -> None:
    spec = TargetSpec.from_config(
        LoraConfig(target_modules="All-Linear", exclude_modules=["k"], modules_to_save=["lm_head"])
    )
    selection = select(MODEL, spec, linear=["layers.0.q", "layers.0.k", "layers.1.q", "lm_head"])
    assert selection.targets == ("layers.0.q", "layers.1.q")
    assert selection.saved == ("lm_head",)
    assert is_all_linear("all-linear")
    assert not is_all_linear(["all-linear"])


def test_targets_that_nobody_named_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"`target_modules` is None.*`all-linear`.*Nothing was changed"):
        ours(MODEL)


def test_numbers_for_a_module() -> None:
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.5, rank_pattern={"q": 4, "layers.0.q": 2}, use_rslora=True)
    site = config.for_site("layers.0.q")
    assert (site.r, site.alpha, site.scaling, site.dropout) == (4, 16, 8.0, 0.5)
    assert config.scaling_for("layers.0.k") == 16 / math.sqrt(8)
    assert LoraConfig(alpha_pattern={"^q": 2, "(?i)K": 3}).alpha_for("layers.0.q") == 8
    assert LoraConfig(alpha_pattern={"^q": 2, "(?i)K": 3}).alpha_for("layers.0.k") == 3


# -- entries that match nothing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "field", "entry", "near"),
    [
        ({"target_modules": ["q", "lm_hed"]}, "target_modules", "lm_hed", "`lm_head`, `head`"),
        ({"target_modules": ["layers.7.q", "k"]}, "target_modules", "layers.7.q", "`layers.1.q`, `layers.0.q`"),
        ({"target_modules": "lm_head_"}, "target_modules", "lm_head_", "`lm_head`, `head`"),
        ({"target_modules": ["q"], "exclude_modules": ["lm_hea"]}, "exclude_modules", "lm_hea", "`lm_head`, `head`"),
        ({"target_modules": ["q"], "exclude_modules": "hea"}, "exclude_modules", "hea", "`head`, `lm_head`"),
        ({"target_modules": ["q"], "modules_to_save": ["lm_hed"]}, "modules_to_save", "lm_hed", "`lm_head`, `head`"),
        ({"target_modules": ["q"], "rank_pattern": {"layers.0.k": 2}}, "rank_pattern", "layers.0.k", "`layers.0.q`"),
        ({"target_modules": ["q"], "alpha_pattern": {"q": 2, "^q": 3}}, "alpha_pattern", "^q", "`q`"),
        ({"target_modules": ["q"], "layers_to_transform": [0, 9], "layers_pattern": "layers"},
         "layers_to_transform", 9, "`0`, `1`"),
        ({"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": ["layers", "layer"]},
         "layers_pattern", "layer", "`layers`"),
    ],
)  # fmt: skip
def test_an_entry_that_matches_nothing_is_named_with_the_nearest(
    values: dict[str, Any], field: str, entry: str | int, near: str
) -> None:
    selection = ours(MODEL, **values)
    (item,) = selection.unmatched
    assert (item.field, item.entry) == (field, entry)
    assert item.nearest.startswith(near)
    with pytest.raises(TargetNotFoundError) as caught:
        complain(selection, "error", "Tiny")
    for part in (f"`{field}` has `{entry}`", "of Tiny", f"nearest: {near}", "Nothing was changed."):
        assert part in str(caught.value)


def test_a_name_that_was_given_as_a_regular_expression_is_recognised() -> None:
    selection = ours(MODEL, target_modules="q")
    assert "as a name it goes into a list: ['q']" in report(selection.unmatched)


@given(st.lists(PATHS, min_size=1, max_size=12, unique=True), specs())
def test_exactly_the_names_that_match_nothing_are_unmatched(paths: list[str], values: dict[str, Any]) -> None:
    selection = ours(paths, **values)
    for field in ("target_modules", "exclude_modules"):
        entries = values.get(field) or []
        if isinstance(entries, list):
            dead = {e for e in entries if not any(f".{path}".endswith(f".{e}") for path in paths)}
            assert {item.entry for item in selection.unmatched if item.field == field} == dead


def test_what_is_done_about_them_is_the_callers_choice() -> None:
    selection = ours(MODEL, target_modules=["q", "typo"])
    complain(selection, "ignore")
    with pytest.warns(PeftliteWarning, match="`typo`") as seen:
        complain(selection, "warn", stacklevel=1)
    assert seen[0].filename == __file__
    with pytest.raises(ConfigError, match="`unmatched` is `warning`"):
        complain(selection, "warning")  # type: ignore[arg-type]
    complain(ours(MODEL, target_modules=["q"]), "error")


def test_many_of_them_are_counted_not_listed() -> None:
    text = report(ours(MODEL, target_modules=[f"typo{i}" for i in range(25)]).unmatched)
    assert len(text.splitlines()) == 11
    assert text.endswith("... and 15 more entries that match nothing.")


def test_thousands_of_modules_and_patterns_are_no_burden() -> None:
    paths = [
        f"model.layers.{i}.experts.{j}.{name}" for i in range(40) for j in range(10) for name in ("up", "gate", "down")
    ]
    config = LoraConfig(target_modules=paths, rank_pattern={path: 2 for path in paths})
    selection = select(paths, TargetSpec.from_config(config))
    assert len(selection.targets) == 1200
    assert config.rank_for(paths[-1]) == 2
    assert "down" in ours(paths, target_modules=["model.layers.41.experts.0.dwn"]).unmatched[0].nearest
