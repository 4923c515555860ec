"""LoRA's config: every field of PEFT 0.21.2, and what it means for one module."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

from peftlite.checks import (
    check_bool,
    check_choice,
    check_int,
    check_number,
    check_pattern,
    show,
)
from peftlite.config import PeftConfig, PeftType, register_config
from peftlite.errors import ConfigError, UnsupportedFeatureError, nearest
from peftlite.registry import later
from peftlite.tuners.fields import check_probability, check_targets, check_token_field
from peftlite.tuners.lora.values import LoraRuntimeConfig, check_ranges, check_tokens, given, plain

if TYPE_CHECKING:
    from peftlite.core import targets
    from peftlite.tuners.lora import options
else:
    targets = later("peftlite.core.targets")
    options = later("peftlite.tuners.lora.options")

# Fields whose feature this version does not have, and the value that asks for nothing.
UNBUILT: Final[Mapping[str, object]] = MappingProxyType(
    {
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "velora_config": None,
        "monteclora_config": None,
        "kasa_config": None,
    }
)
INITS: Final = (
    "gaussian",
    "pissa",
    "pissa_niter_16",
    "olora",
    "orthogonal",
    "mica",
    "eva",
    "corda",
    "lora_ga",
    "loftq",
)  # and True, False
DATA_DRIVEN: Final = (
    ("eva", "eva_config", "EvaConfig"),
    ("corda", "corda_config", "CordaConfig"),
    ("lora_ga", "lora_ga_config", "LoraGAConfig"),
)
BIASES: Final = ("none", "all", "lora_only")


class LoraSite(NamedTuple):
    """What a config means for one module: W' = W + scaling * B A, with B A of rank r."""

    r: int
    alpha: float
    scaling: float
    dropout: float


@dataclass
class LoraConfig(PeftConfig):
    """LoRA (https://arxiv.org/abs/2106.09685): W' = W + (alpha / r) B A; with `use_rslora` alpha / sqrt(r).

    Field names, order and defaults are PEFT's. A collection of names becomes a sorted list; a string given for
    `target_modules` or `exclude_modules` is a regular expression for a whole module path, but for "all-linear".

    Raises:
        ConfigError: a field has a value that cannot be used.
        UnsupportedFeatureError: a field asks for what this version does not have.

    Example:
        >>> config = LoraConfig(r=4, lora_alpha=8, target_modules=["v_proj", "q_proj"], rank_pattern={"v_proj": 2})
        >>> config.target_modules
        ['q_proj', 'v_proj']
        >>> config.for_site("model.layers.0.self_attn.v_proj")
        LoraSite(r=2, alpha=8, scaling=4.0, dropout=0.0)
    """

    r: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: options.LoftQConfig | dict[str, Any] = field(default_factory=dict)
    eva_config: options.EvaConfig | dict[str, Any] | None = None
    corda_config: options.CordaConfig | dict[str, Any] | None = None
    lora_ga_config: options.LoraGAConfig | dict[str, Any] | None = None
    use_dora: bool = False
    velora_config: dict[str, Any] | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: dict[str, Any] | None = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: options.BdLoraConfig | dict[str, Any] | None = None
    arrow_config: options.ArrowConfig | dict[str, Any] | None = None
    kasa_config: dict[str, Any] | None = None
    ensure_weight_tying: bool = False

    kind: ClassVar[PeftType | None] = PeftType.LORA
    runtime_fields: ClassVar[frozenset[str]] = frozenset({"runtime_config"})
    ordered_fields: ClassVar[frozenset[str]] = frozenset({"rank_pattern", "alpha_pattern"})
    absent: ClassVar[tuple[str, ...]] = ()
    """Fields that a method which has LoRA's config has no meaning for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_unbuilt()
        check_targets(self)
        self._check_numbers()
        self._check_flags()
        self._check_options()
        self._check_forms()

    def to_dict(self) -> dict[str, Any]:
        return {name: plain(value) for name, value in super().to_dict().items()}

    def rank_for(self, path: str) -> int:
        """The rank at this path (relative to the base model): of the first `rank_pattern` that matches, else `r`."""
        key = targets.match_pattern(self.rank_pattern, path) if self.rank_pattern else None
        return self.r if key is None else self.rank_pattern[key]

    def alpha_for(self, path: str) -> float:
        """The alpha at this path: of the first `alpha_pattern` that matches, else `lora_alpha`."""
        key = targets.match_pattern(self.alpha_pattern, path) if self.alpha_pattern else None
        return self.lora_alpha if key is None else self.alpha_pattern[key]

    def scaling_for(self, path: str) -> float:
        """What B A is multiplied with at this path."""
        r = self.rank_for(path)
        return self.alpha_for(path) / (math.sqrt(r) if self.use_rslora else r)

    def for_site(self, path: str) -> LoraSite:
        """The numbers for the module at this path."""
        return LoraSite(self.rank_for(path), self.alpha_for(path), self.scaling_for(path), self.lora_dropout)

    def check_runtime(self, value: object) -> LoraRuntimeConfig:
        """What may stand in `runtime_config`; a dict and None become one.

        Raises: ConfigError, or UnsupportedFeatureError of a method that does not have what is asked for.
        """
        return given("runtime_config", value, LoraRuntimeConfig) or LoraRuntimeConfig()

    def _check_unbuilt(self) -> None:
        for name in self.absent:
            if getattr(self, name):
                raise UnsupportedFeatureError(
                    f"`{name}` is {show(getattr(self, name))}, which {type(self).__name__} does not have. "
                    "Nothing was changed."
                )
        for name, off in UNBUILT.items():
            value = getattr(self, name)
            if value == off:
                continue
            if off or value:
                raise UnsupportedFeatureError(
                    f"`{name}` is {show(value)}, but {self._why_unbuilt(name)}; it can only be {show(off)}. "
                    "Nothing was changed."
                )
            setattr(self, name, {} if off == {} else off)

    def _why_unbuilt(self, name: str) -> str:
        package = str(self.megatron_core).partition(".")[0]
        if name == "megatron_config" and not (package.isidentifier() and find_spec(package)):
            return f"it is about layers of megatron-core, which is not installed: there is no package {show(package)}"
        return "this version does not have that feature yet"

    def _check_numbers(self) -> None:
        self.r = check_int("r", self.r, 1)
        self.lora_alpha = check_number("lora_alpha", self.lora_alpha)
        self.lora_dropout = check_probability("lora_dropout", self.lora_dropout)
        self.rank_pattern = check_pattern("rank_pattern", self.rank_pattern, lambda name, r: check_int(name, r, 1))
        self.alpha_pattern = check_pattern("alpha_pattern", self.alpha_pattern, check_number)

    def _check_flags(self) -> None:
        self.bias = check_choice("bias", self.bias, BIASES)
        for name in ("use_dora", "use_qalora"):
            value = getattr(self, name)
            setattr(self, name, value is not None and check_bool(name, value))
        for name in ("fan_in_fan_out", "use_rslora", "lora_bias", "ensure_weight_tying"):
            check_bool(name, getattr(self, name))
        if not isinstance(self.init_lora_weights, bool):
            self._check_init(self.init_lora_weights)

    def _check_options(self) -> None:
        self.arrow_config = self._option("arrow_config", "ArrowConfig")
        self.layer_replication = check_ranges("layer_replication", self.layer_replication)
        self.use_bdlora = self._option("use_bdlora", "BdLoraConfig")
        for init, name, kind in DATA_DRIVEN:
            given = self._option(name, kind)
            missing = given is None and self.init_lora_weights == init
            setattr(self, name, getattr(options, kind)() if missing else given)
        loftq = self._option("loftq_config", "LoftQConfig")
        if loftq is None and self.init_lora_weights == "loftq":
            raise ConfigError(
                "`init_lora_weights` is `loftq`, and `loftq_config` does not say with how many bits; give it "
                "`LoftQConfig(loftq_bits=4)`. Nothing was changed."
            )
        self.loftq_config = {} if loftq is None else plain(loftq)
        self.runtime_config = self.check_runtime(self.runtime_config)
        self.trainable_token_indices = check_token_field(self.trainable_token_indices)
        self.qalora_group_size = check_int("qalora_group_size", self.qalora_group_size, 1)
        self.alora_invocation_tokens = check_tokens("alora_invocation_tokens", self.alora_invocation_tokens)

    def _option(self, field: str, kind: str) -> Any:
        """A field with fields of its own, of the class of this name; most configs have none of them."""
        value = getattr(self, field)
        return None if value is None or value == {} else given(field, value, getattr(options, kind))

    def _check_forms(self) -> None:
        init = self.init_lora_weights
        forms = {
            "use_dora": self.use_dora,
            "use_qalora": self.use_qalora,
            "use_bdlora": self.use_bdlora is not None,
            "alora_invocation_tokens": bool(self.alora_invocation_tokens),
            "arrow_config": self.arrow_config is not None,
            "init_lora_weights='mica'": init == "mica",
        }
        asked = [name for name, wanted in forms.items() if wanted]
        if self.alora_invocation_tokens and self.task_type == "SEQ_2_SEQ_LM":
            raise ConfigError(
                "`alora_invocation_tokens` has no form for `task_type='SEQ_2_SEQ_LM'`: which of the decoder's tokens "
                "come after the invocation is not defined. Nothing was changed."
            )
        if len(asked) > 1:
            raise ConfigError(f"`{asked[0]}` and `{asked[1]}` have no form together; choose one. Nothing was changed.")
        if self.lora_bias and not isinstance(init, bool):
            raise ConfigError(
                "`lora_bias` is `True`, which needs `init_lora_weights` to be `True` or `False`, "
                f"not {show(init)}. Nothing was changed."
            )
        if self.lora_bias and (self.use_dora or self.use_bdlora is not None):
            raise ConfigError(f"`lora_bias` is `True`, which has no form with `{asked[0]}`. Nothing was changed.")
        if init not in (True, False, "gaussian") and (self.use_qalora or self.use_bdlora is not None):
            raise ConfigError(
                f"`init_lora_weights` is {show(init)}, and with `{asked[0]}` it can only be `True`, `False` or "
                "`gaussian`. Nothing was changed."
            )

    def _check_init(self, value: object) -> None:
        name = value.lower() if isinstance(value, str) else ""
        if name in INITS or re.fullmatch(r"pissa_niter_\d{1,3}", name, re.ASCII):
            self.init_lora_weights = name
            return
        choices = ", ".join(f"`{choice}`" for choice in ("True", "False", *INITS))
        raise ConfigError(
            f"`init_lora_weights` is {show(value)}; nearest: {nearest(str(value), ('True', 'False', *INITS))}. "
            f"It can be {choices}. Nothing was changed."
        )


register_config(PeftType.LORA, LoraConfig)
