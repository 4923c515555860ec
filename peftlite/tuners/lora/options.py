"""The parts of LoRA's config that have fields of their own, as in PEFT 0.21.2."""

from __future__ import annotations

from dataclasses import dataclass

from peftlite.checks import check_bool, check_choice, check_int, check_names, check_number, check_text, wrong

DIRECTIONS = ("ArBr", "A2rBr", "ArB2r", "random")
SCALES = ("stable", "weight_svd", "gd_scale", "unit")


@dataclass
class EvaConfig:
    """EVA: how to find the first factors from activations, and how to spread the ranks over the layers.

    `rho`: a layer may get up to rho times its rank. `tau`: components count as found when their cosine to the last
    step's exceeds it. `use_label_mask`: leave out tokens whose label is `label_mask_value`. `whiten`: divide components
    by their singular values. `adjust_scaling_factors`: keep each layer's scaling while its rank changes.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        self.rho, self.tau = check_number("rho", self.rho), check_number("tau", self.tau)
        if self.rho < 1:
            raise wrong("rho", self.rho, "at least 1")
        if not 0 <= self.tau <= 1:
            raise wrong("tau", self.tau, "between 0 and 1")
        for name in ("use_label_mask", "whiten", "adjust_scaling_factors"):
            check_bool(name, getattr(self, name))


@dataclass
class CordaConfig:
    """CorDA: the decomposition of the weight that `preprocess_corda` makes from covariances of the inputs.

    `corda_method`: "ipm" begins with what the covariance finds most important, "kpm" with the least, to keep knowledge.
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: str = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def __post_init__(self) -> None:
        self.corda_method = check_choice("corda_method", self.corda_method, ("ipm", "kpm"))
        for name in ("cache_file", "covariance_file"):
            check_text(name, getattr(self, name))
        for name in ("verbose", "use_float16_for_covariance", "prune_temporary_fields"):
            check_bool(name, getattr(self, name))


@dataclass
class LoraGAConfig:
    """LoRA-GA: which singular vectors of the gradient the factors begin as (`direction`), and how large (`scale`)."""

    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: int = 16

    def __post_init__(self) -> None:
        self.direction = check_choice("direction", self.direction, DIRECTIONS)
        self.scale = check_choice("scale", self.scale, SCALES)
        self.stable_gamma = check_int("stable_gamma", self.stable_gamma, 1)


@dataclass
class LoftQConfig:
    """LoftQ: the number of bits of the quantised base, and of rounds of quantising and approximating the rest."""

    loftq_bits: int = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        if self.loftq_bits not in (4, 8):
            raise wrong("loftq_bits", self.loftq_bits, "4 or 8")
        self.loftq_iter = check_int("loftq_iter", self.loftq_iter, 1)


@dataclass
class BdLoraConfig:
    """BD-LoRA: `nblocks` blocks in A, or in B, of the modules whose paths contain one of these names.

    A target that neither list names is an error, unless `match_strict=False`.
    """

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def __post_init__(self) -> None:
        for name in ("target_modules_bd_a", "target_modules_bd_b"):
            setattr(self, name, check_names(name, getattr(self, name), sort=False))
        self.nblocks = check_int("nblocks", self.nblocks, 1)
        check_bool("match_strict", self.match_strict)


@dataclass
class ArrowConfig:
    """Arrow: how tokens find their adapters among `task_adapter_names`, which `create_arrow_model` fills in.

    Each token goes to the `top_k` adapters whose main direction is most like it, weighted by a softmax of the likeness
    over `router_temperature`. `use_gks` subtracts the mean of the `gks_adapter_names`, which know what is general.
    `rng_seed` changes nothing: directions are exact.
    """

    top_k: int = 3
    router_temperature: float = 1.0
    use_gks: bool = False
    rng_seed: int | None = None
    task_adapter_names: list[str] | None = None
    gks_adapter_names: list[str] | None = None

    def __post_init__(self) -> None:
        self.top_k = check_int("top_k", self.top_k, 1)
        self.router_temperature = check_number("router_temperature", self.router_temperature)
        if self.router_temperature <= 0:
            raise wrong("router_temperature", self.router_temperature, "above 0")
        check_bool("use_gks", self.use_gks)
        for name in ("task_adapter_names", "gks_adapter_names"):
            setattr(self, name, check_names(name, getattr(self, name), sort=False))
        count = len(self.task_adapter_names or ())
        if count and self.top_k > count:
            raise wrong("top_k", self.top_k, f"at most {count}, the number of `task_adapter_names`")
        if count and self.use_gks != bool(self.gks_adapter_names):
            raise wrong("gks_adapter_names", self.gks_adapter_names, f"given exactly with `use_gks={True}`")
