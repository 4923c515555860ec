"""Arrow: an adapter that has nothing of its own, and sends each token to the LoRA adapters that suit it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftlite.core.hosts import Host, LinearHost
from peftlite.core.slots import View
from peftlite.core.variant import Program
from peftlite.errors import StateError
from peftlite.tuners.lora.factors import entering
from peftlite.tuners.lora.lowrank import Decomposed, LowRank
from peftlite.tuners.lora.plain import Lora
from peftlite.tuners.lora.start import Shifted, net_pair

Pair = tuple[Tensor, Tensor]


class Routed(Lora):
    """Arrow (https://arxiv.org/abs/2405.11157): W x + sum over experts k of c_k(x) scaling_k B_k A_k x.

    c(x) is the softmax of |p_k x| / temperature over the top k, where p_k (in,) is the first right singular vector of
    B_k A_k. With `use_gks` (https://arxiv.org/abs/2505.10939) A_k and B_k are less the means of the general adapters'.
    Slots: LoRA's, which files have and nothing reads. Experts that a layer does not have do not count there.
    """

    frozen = frozenset({"lora_A", "lora_B"})
    mixes = True

    def check(self, host: Host, config: Any, path: str) -> str | None:
        if not isinstance(host, LinearHost):
            return f"`arrow_config` has no form for {host.label}"
        if not config.arrow_config.task_adapter_names:
            return "`arrow_config` has no `task_adapter_names`; `create_arrow_model` fills them in"
        return super().check(host, config, path)

    def size(self, host: Host, config: Any, path: str) -> tuple[int | None, int]:
        return super().size(host, config, path)[0], 0

    def forward(self, a: View, call: Program, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = call(x, *args, **kwargs)
        experts: Experts | None = a.__dict__.get("experts")
        if experts is None:
            experts = a.__dict__["experts"] = Experts(a)
        return (y + experts(x, entering(a.layer.host, a, x))).to(y.dtype) if experts.tasks else y

    def why_not_merge(self, a: View) -> str | None:
        return "it sends each token to other adapters (`arrow_config`), which no weight can"

    def bind(self, a: View, slow: Program) -> Program | None:
        return None


class Experts:
    """The adapters of one layer that a router chooses from.

    Raises: StateError if the model, or the layer, does not have them as the router's config says.
    """

    def __init__(self, a: View) -> None:
        self.layer, self.config = a.layer, a.layer.state.configs[a.name].arrow_config
        self.stamp: tuple[Any, ...] = ()
        self.known = torch.empty(0)
        self.tasks, self.general = (self._views(a.name, names or ()) for names in self._names)
        shapes = {view.lora_A.weight.shape for view in (*self.tasks, *self.general)}
        wanted = len(self._names[1] or ())
        if self.tasks and wanted and (len(shapes) > 1 or len(self.general) < wanted):
            raise StateError(
                f"Adapter `{a.name}` has `use_gks`, which needs all its adapters on one layer, of one rank. "
                "Nothing was changed."
            )

    @property
    def _names(self) -> tuple[list[str] | None, list[str] | None]:
        return self.config.task_adapter_names, self.config.gks_adapter_names if self.config.use_gks else None

    def _views(self, router: str, names: Any) -> list[View]:
        for name in names:
            if name not in self.layer.state.configs:
                raise StateError(
                    f"Adapter `{router}` sends tokens to adapter `{name}`, which the model does not have. "
                    "Nothing was changed."
                )
            if name in self.layer.variants and type(self.layer.variants[name]) not in (Lora, Shifted):
                kind = type(self.layer.variants[name]).__name__
                raise StateError(
                    f"Adapter `{router}` can send tokens to plain LoRA only, and `{name}` is {kind}. "
                    "Nothing was changed."
                )
        return [View(self.layer, name) for name in names if name in self.layer.variants]

    def pairs(self) -> list[Pair]:
        """(A_k, B_k) of each expert, less the means of the general ones."""
        found = [net_pair(self.layer.host, view) for view in self.tasks]
        if not self.general:
            return found
        common = [
            torch.stack(side).mean(0)
            for side in zip(*(net_pair(self.layer.host, g) for g in self.general), strict=True)
        ]
        return [(A - common[0], B - common[1]) for A, B in found]

    def directions(self, pairs: list[Pair]) -> Tensor:
        """P (experts, in); found again when a factor has changed."""
        if torch.compiler.is_compiling():
            return directions(pairs)
        stamp = tuple(
            (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
            for view in (*self.tasks, *self.general)
            for weight in (view.lora_A.weight, view.lora_B.weight)
        )
        if stamp != self.stamp:
            self.known, self.stamp = directions(pairs), stamp
        return self.known

    def __call__(self, x: Tensor, entered: Tensor) -> Tensor:
        """What the experts add to the output for x; `entered` is x after dropout."""
        pairs = self.pairs()
        likeness = (x.to(entered.dtype) @ self.directions(pairs).to(entered.dtype).T).abs()  # (..., experts)
        top = likeness.topk(min(self.config.top_k, len(pairs)), dim=-1)
        shares = (top.values / self.config.router_temperature).softmax(-1)
        gates = torch.zeros_like(likeness).scatter(-1, top.indices, shares)
        gates = torch.cat(
            [
                (gates[..., k, None] * view.scaling).expand(*gates.shape[:-1], len(A))
                for k, (view, (A, _)) in enumerate(zip(self.tasks, pairs, strict=True))
            ],
            -1,
        )  # (..., sum of ranks)
        A, B = (torch.cat(side, dim).to(entered.dtype) for dim, side in enumerate(zip(*pairs, strict=True)))
        return F.linear(F.linear(entered, A) * gates, B)


def directions(pairs: list[Pair]) -> Tensor:
    """The first right singular vector of each B A (experts, in), in float64 where the device has it."""
    with torch.no_grad():
        return torch.stack([Decomposed.of(LowRank(A[None], B[None])).Vh[0, 0] for A, B in pairs])


ROUTED = Routed()
