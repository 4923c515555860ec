"""Patterns out of configs: what `re` says of them, in time that is bounded."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from peftlite import patterns
from peftlite.core.targets import TargetSpec, match_pattern, select
from peftlite.errors import ConfigError
from peftlite.patterns import Automaton, bounded, single
from peftlite.tuners.ia3 import IA3Config
from peftlite.tuners.lora.config import LoraConfig

ONE = ["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", r"\d", "^", "$", r"\b", "ab", r"\A", r"\Z", "(?i:A)", "(?i:[^B])"]
ATOMS = st.sampled_from([*ONE, "(?s:.)", "(?=a)", "(?!b)", "(?<=a)", "(?<!ab)", "(?=a*b)", "(?=(?!a).)"])
REGEXES = st.recursive(
    ATOMS,
    lambda inner: (
        st.builds("({}|{})".format, inner, inner)
        | st.builds("{}{}".format, inner, inner)
        | st.builds("(?:{}){}".format, inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,3}", "{0,2}?"]))
    ),
    max_leaves=8,
)
TEXTS = st.text("abA.\n1", max_size=7)


def automaton(pattern: str) -> Automaton:
    """The automaton of any pattern, of those too that are left to `re`."""
    parsed = patterns._parser.parse(pattern)
    made = Automaton()
    made.end = made.add(0, parsed, lambda node: node, parsed.state)
    return made


@settings(max_examples=300)
@given(REGEXES, st.lists(TEXTS, min_size=1, max_size=6), st.integers(0, 2))
def test_the_automaton_says_what_re_says(pattern: str, texts: list[str], start: int) -> None:
    compiled, made = re.compile(pattern), automaton(pattern)
    for text in texts:
        begin = min(start, len(text))
        expected = compiled.fullmatch(text, begin) is not None
        event(f"{expected}")
        assert made.run(text, begin, len(text)) is expected


@pytest.mark.parametrize("flags", ["", "(?i)", "(?s)", "(?m)", "(?x)", "(?a)", "(?ims)"])
@pytest.mark.parametrize("pattern", ["(a .|^b)+", r"(\w$|.)*", "((?-i:A)|[k-m])+", r"(é|\w)+b"])
def test_flags_are_those_of_re(pattern: str, flags: str) -> None:
    compiled, made = re.compile(flags + pattern), automaton(flags + pattern)
    for text in map("".join, product("aAb\nKéS", repeat=3)):
        assert made.run(text, 0, len(text)) is (compiled.fullmatch(text) is not None)


ENDLESS = [
    "(a+)+b",
    "(a|aa)+b",
    "(.*)*(.*)*x",
    ".*" * 12 + "x",
    r"(\w+\.?)+!",
    "(?!(a+)+b)(a*)*c",
    "((a*)*)*b",
    "(a?){30}a{31}b",
]


@pytest.mark.parametrize("pattern", ENDLESS)
def test_patterns_with_endless_ways_are_matched_all_the_same(pattern: str) -> None:
    """With `re`, each of these takes longer than the age of the universe."""
    assert bounded(pattern).plain is None
    paths = ["a" * 60, "model.layers.0.self_attn.q_proj" * 3]
    assert not any(bounded(pattern).fullmatch(path) for path in paths)
    spec = TargetSpec(target_modules=("q",), exclude_modules=pattern)
    assert select([*paths, "q"], spec).targets == ("q",)
    assert select([*paths, "q"], TargetSpec(target_modules=pattern)).targets == ()
    assert match_pattern([pattern], paths[0]) is None
    assert not IA3Config(target_modules=["q"], feedforward_modules=pattern).is_feedforward(paths[0])


@pytest.mark.parametrize("pattern", ["q", r".*\.q_proj", r".*\.(q|k|v|o)_proj", r"^(?!.*lm_head).*$",
                                     r"(\w)\1", "(a{1000}){1000}"])  # fmt: skip
def test_usual_patterns_are_left_to_re(pattern: str) -> None:
    assert bounded(pattern).plain == single(pattern) == re.compile(pattern)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (r"(\w+)+\1", "refers to groups"),
        ("((ab?){200}){200}", "2000 steps"),
        ("((?=a*)(a*)*){50}", "32 conditions"),
        ("(?:(?=(?:(?=(?:a*)*b).){20}).){20}(a*)*", "32 conditions"),
        ("|" * 100_001, "100001 characters"),
    ],
)
def test_what_could_take_for_ever_is_refused_by_name(pattern: str, words: str) -> None:
    for fields in ({"target_modules": pattern}, {"exclude_modules": pattern}, {"rank_pattern": {pattern: 1}}):
        with pytest.raises(ConfigError, match=rf"{words}.*Nothing was changed"):
            LoraConfig(**fields)


def test_layers_patterns_are_for_re_alone() -> None:
    with pytest.raises(ConfigError, match=r"`\(l\+\)\+` could take for ever"):
        LoraConfig(target_modules=["q"], layers_to_transform=0, layers_pattern=["(l+)+"])


@pytest.mark.parametrize("pattern", ["[", "(" * 5000 + ")" * 5000, "a{99999999999}", "(?P<a>"])
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match="`target_modules` must be a valid regular expression"):
        LoraConfig(target_modules=pattern)


def test_masses_of_entries_are_looked_up_and_not_tried() -> None:
    many: dict[str, Any] = {f"m{i}": 1 for i in range(199_999)}
    config = LoraConfig(target_modules=[*many, "q"], modules_to_save=[*many, "head"], rank_pattern=many)
    found = select(["a.q", "b.head", "a.m7"], TargetSpec.from_config(config))
    assert (found.targets, found.saved) == (("a.q",), ("b.head", "a.m7"))
    assert IA3Config(target_modules=list(many), feedforward_modules=list(many)).is_feedforward("x.m199998")
    with pytest.raises(ConfigError, match="has 200001 entries"):
        LoraConfig(target_modules=[*many, "q", "v"])
    with pytest.raises(ConfigError, match="4097 patterns"):
        LoraConfig(rank_pattern={f"m{i}|x": 1 for i in range(4097)})
