"""(IA)^3: a learned scale for each feature of a layer's output, or of its input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftlite.checks import check_bool, check_names_or_regex, show
from peftlite.config import PeftConfig, PeftType, register_config
from peftlite.core.hosts import ALL_ROWS, ConvHost, Dense, Host, LinearHost
from peftlite.core.slots import Slot, View
from peftlite.core.variant import Placement, Program, TunerSpec, Variant, register
from peftlite.errors import ConfigError
from peftlite.patterns import bounded
from peftlite.tuners.fields import check_targets, note_storage
from peftlite.tuners.scaled import by_columns


@dataclass
class IA3Config(PeftConfig):
    """(IA)^3 (https://arxiv.org/abs/2205.05638): y' = l * y, and for feed-forward modules W (l * x).

    A name in `feedforward_modules` stands for the paths that end with it, a string is a regular expression for a whole
    path. Which of a transformers model's default modules those are is known; of any other model it must be said.

    Raises: ConfigError.

    Example:
        >>> IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]).feedforward_modules
        ['down_proj']
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    feedforward_modules: list[str] | str | None = None
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    init_ia3_weights: bool = True

    kind: ClassVar[PeftType | None] = PeftType.IA3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_targets(self)
        self.feedforward_modules = check_names_or_regex("feedforward_modules", self.feedforward_modules)
        for name in ("fan_in_fan_out", "init_ia3_weights"):
            check_bool(name, getattr(self, name))
        if not isinstance(self.feedforward_modules, list) or not isinstance(self.target_modules, list):
            return
        targets = set(self.target_modules)
        strangers = [name for name in self.feedforward_modules if name not in targets]
        if strangers:
            raise ConfigError(
                f"`feedforward_modules` has {show(strangers[0])}, which `target_modules` has not: "
                f"{show(self.target_modules)}. Nothing was changed."
            )

    def is_feedforward(self, path: str) -> bool:
        """Whether the module at this path has its input scaled, and not its output."""
        names = self.feedforward_modules or ()
        if isinstance(names, str):
            return bounded(names).fullmatch(path)
        return path.endswith(tuple(names))


class IA3(Variant):
    """(IA)^3: y' = l * y with W' = l * W, b' = l * b by rows; feed-forward: y' = W (l * x) with W' = W * l by columns.

    Slot: ia3_l, (out, 1) or (1, in) for linear layers, (1, out, 1, ...) or (1, in, 1, ...) for convolutions; ones.
    """

    by_rows = True

    def check(self, host: Host, config: Any, path: str) -> str | None:
        return None if isinstance(host, (LinearHost, ConvHost)) else f"IA3 has no form for {host.label}"

    def init(self, host: Host, at: Placement) -> dict[str, Any]:
        feedforward = at.config.is_feedforward(at.path)
        out, kernel = host.shape[0], len(host.shape) - 2
        shape: tuple[int, ...] = (1, features_in(host)) if feedforward else (out, 1)
        if kernel:
            shape = (1, features_in(host) if feedforward else out, *[1] * kernel)
        scale = torch.ones(shape, device=at.device, dtype=at.dtype)
        if not at.config.init_ia3_weights:
            scale.normal_()
        return {"ia3_l": nn.Parameter(scale, requires_grad=False), "is_feedforward": feedforward}

    def size(self, host: Host, config: Any, path: str) -> tuple[int | None, int]:
        return None, features_in(host) if config.is_feedforward(path) else host.shape[0]

    def forward(self, a: View, call: Program, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        scale: Tensor = a.ia3_l.view(-1, *a.ia3_l.shape[2:]) if a.ia3_l.dim() > 2 else a.ia3_l.flatten()
        if a.is_feedforward:
            return call(by_columns(x, scale), *args, **kwargs)
        y: Tensor = call(x, *args, **kwargs)
        return by_columns(y, scale)

    def merge(self, a: View, dense: Dense, rows: slice = ALL_ROWS) -> Dense:
        host: Host = a.layer.host
        scale: Tensor = a.ia3_l.flatten()
        kernel = (1,) * (dense.weight.dim() - 2)
        if not a.is_feedforward:
            scale = host.take_bias(scale, rows)  # (rows,)
            bias = None if dense.bias is None else dense.bias * scale
            return Dense(dense.weight * scale.view(-1, 1, *kernel), bias)
        out, into = host.shape[:2]
        groups = len(scale) // into  # row r of a convolution in groups reads the inputs of group r // (out / groups)
        if groups > 1:
            scale = host.take(scale.view(groups, into).repeat_interleave(out // groups, 0), rows)
        return Dense(dense.weight * scale.view(-1, into, *kernel), dense.bias)


def features_in(host: Host) -> int:
    """The features of a layer's input, those of all groups."""
    layer: Any = host.layer
    return int(layer.in_channels) if isinstance(host, ConvHost) else host.shape[1]


def resolve(config: IA3Config, hosts: Sequence[tuple[str, Host]]) -> None:
    """Note how the adapted weights are stored, and refuse a config that leaves feed-forward modules open.

    Raises: ConfigError.
    """
    if config.feedforward_modules is None:
        raise ConfigError(
            "`feedforward_modules` is None, and there is no default for this model: name those of `target_modules` "
            "whose input is to be scaled, or `[]` for none. Nothing was changed."
        )
    note_storage(config, hosts)


_IA3 = IA3()

register_config(PeftType.IA3, IA3Config)
register(
    TunerSpec(
        peft_type=PeftType.IA3.value,
        slots=(Slot("ia3_l"),),
        variant_for=lambda config: _IA3,
        label=lambda host: host.name,
        numbers=("is_feedforward",),
        resolve=resolve,
    )
)
