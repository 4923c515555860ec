"""AdaLoRA's config: LoRA's, and a schedule that says how many ranks are left at which step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from peftlite.checks import check_int, check_number, check_pattern, show, wrong
from peftlite.config import PeftType, register_config
from peftlite.errors import ConfigError, UnsupportedFeatureError, warn
from peftlite.tuners.lora.config import LoraConfig
from peftlite.tuners.lora.values import LoraRuntimeConfig

WITHOUT_EFFECT: Final = ("r", "use_rslora", "alpha_pattern", "lora_bias")


@dataclass
class AdaLoraConfig(LoraConfig):
    """AdaLoRA (https://arxiv.org/abs/2303.10512): W' = W + alpha / init_r * B diag(E) A, of `init_r` triplets at first.

    Until step `tinit` all triplets train. Then, every `deltaT` steps, the model's least important ones are set to zero,
    down to `target_r` per layer on average at `tfinal` steps before `total_step`: `rank_pattern` says which are left.
    `beta1` and `beta2` smooth the importance, `orth_reg_weight` keeps A and B near to orthogonal. Other fields are
    LoRA's; those without a meaning here warn or raise.

    Raises: ConfigError, UnsupportedFeatureError.
    """

    rank_pattern: dict[str, list[bool]] | None = None  # type: ignore[assignment]
    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1  # noqa: N815 - the field's name in files
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None

    kind: ClassVar[PeftType | None] = PeftType.ADALORA
    ordered_fields: ClassVar[frozenset[str]] = frozenset({"alpha_pattern"})
    absent: ClassVar[tuple[str, ...]] = (
        *("megatron_config", "trainable_token_indices", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        *("use_dora", "velora_config", "alora_invocation_tokens", "use_qalora", "monteclora_config"),
        *("layer_replication", "target_parameters", "use_bdlora", "arrow_config", "kasa_config", "ensure_weight_tying"),
    )

    def check_runtime(self, value: object) -> LoraRuntimeConfig:
        runtime = super().check_runtime(value)
        for name in ("compute_dtype", "dropout_mask"):
            if getattr(runtime, name) != getattr(LoraRuntimeConfig, name):
                raise UnsupportedFeatureError(
                    f"`{name}` of `runtime_config` is {show(getattr(runtime, name))}, which AdaLoRA does not have; it "
                    f"can only be `{getattr(LoraRuntimeConfig, name)}`. Nothing was changed."
                )
        return runtime

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"init_r": 1, "target_r": 0, "tinit": 0, "tfinal": 0, "deltaT": 1, "total_step": 1}
        for name in least:
            setattr(self, name, check_int(name, getattr(self, name), least[name]))
        for name in ("beta1", "beta2"):
            if not 0 < check_number(name, getattr(self, name)) < 1:
                raise wrong(name, getattr(self, name), "a number between 0 and 1")
        if check_number("orth_reg_weight", self.orth_reg_weight) < 0:
            raise wrong("orth_reg_weight", self.orth_reg_weight, "a number of at least 0")
        if self.tinit >= self.last_allocation:
            raise ConfigError(
                f"`tinit` is `{self.tinit}` and `tfinal` is `{self.tfinal}`, which leaves no step of `total_step` "
                f"`{self.total_step}` to allocate ranks in. Nothing was changed."
            )
        self._warn()

    def _check_numbers(self) -> None:
        masks, self.rank_pattern = self.rank_pattern, {}  # LoRA's are ranks
        super()._check_numbers()
        self.rank_pattern = None if masks is None else check_pattern("rank_pattern", masks, check_mask)

    def _warn(self) -> None:
        idle = [name for name in WITHOUT_EFFECT if getattr(self, name) not in (False, {}, LoraConfig.r)]
        idle += ["init_lora_weights"] if isinstance(self.init_lora_weights, str) else []
        said = [f"`{name}` is {show(getattr(self, name))}, which has no effect on AdaLoRA" for name in idle]
        said += ["its ranks are `init_r` and `target_r`"] if "r" in idle else []
        if self.target_r > self.init_r:
            said.append(f"`target_r` is `{self.target_r}`, above `init_r` `{self.init_r}`: no rank is ever taken away")
        if said:
            warn("; ".join(said) + ".")

    @property
    def last_allocation(self) -> int:
        """The step at which ranks are allocated for the last time."""
        return int(self.total_step or 0) - self.tfinal

    def allocates_at(self, step: int) -> bool:
        """Whether triplets are chosen anew at this step, before the last time."""
        return self.tinit < step < self.last_allocation and step % self.deltaT == 0

    def budget(self, step: int, full: int, target: int) -> int:
        """How many of a model's `full` triplets are left after choosing at this step: falls cubically to `target`."""
        left = 1 - (min(step, self.last_allocation) - self.tinit) / (self.last_allocation - self.tinit)
        return int((full - target) * left**3 + target)

    def rank_for(self, path: str) -> int:
        """How many triplets the layer at this path is made with."""
        mask = (self.rank_pattern or {}).get(pattern_key(path))
        return self.init_r if mask is None else sum(mask)


def check_mask(name: str, mask: object) -> list[bool]:
    """Which of the first triplets of a layer are left."""
    if not isinstance(mask, Sequence) or isinstance(mask, str) or not all(isinstance(left, bool) for left in mask):
        raise wrong(name, mask, "a list of True and False, one for each of `init_r` triplets")
    return list(mask)


def pattern_key(path: str) -> str:
    """The key in `rank_pattern` of the layer at a path."""
    return f"{path}.lora_E"


register_config(PeftType.ADALORA, AdaLoraConfig)
