"""A new LoRA adapter out of others: a weighted sum of what they add to the weights, or of the entries that matter.

    linear, cat, svd                        sum over i of w_i D_i, with D_i = scaling_i B_i A_i
    magnitude_prune, dare_linear            the same of D_i with entries pruned, or dropped at random
    ties, dare_ties                         means over those w_i D_i, pruned or dropped, that agree on the sign

All are exact: sums by putting the scaled factors side by side, the others, which have no low rank, by factors of full
rank. What is approximated is what a rank is given for (`svd_rank`); how well, is returned. PEFT adds up factors
instead, so that its `linear` has cross terms A_i B_j, and prunes factors, whose entries mean nothing by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from peftlite.core.hosts import widened
from peftlite.core.layer import AdapterLayer
from peftlite.core.slots import View
from peftlite.tuners.lora.factors import bias_of_B
from peftlite.tuners.lora.lowrank import Decomposed, LowRank, Part, clamped, distance, norm, summed, undivided
from peftlite.tuners.lora.sparse import agreeing_mean, dropped, pruned, weighted_sum
from peftlite.tuners.lora.stacks import product_of

SUMS = ("linear", "cat", "svd")
SPARSE = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
TYPES = (*SUMS, *(f"{kind}{form}" for kind in SPARSE for form in ("", "_svd")))
"""The combination types; the forms with `_svd` mean the same as those without."""


@dataclass(frozen=True)
class Recipe:
    """What to do with the adapters' updates."""

    kind: str
    weights: tuple[float, ...]
    rank: int | None = None
    clamp: float | None = None
    driver: str | None = None
    density: float = 1.0
    majority: str = "total"
    generator: torch.Generator | None = None

    def is_sum(self, count: int) -> bool:
        """Whether the result is the weighted sum of `count` updates as they are."""
        if self.kind in SUMS:
            return True
        means = self.kind in ("ties", "dare_ties")
        return self.density == 1 and not (means and count > 1)

    def copies(self, count: int, rank: int) -> bool:
        """Whether the result is the only one of `count` adapters, whose ranks are at most `rank`, as it is."""
        alone = count == 1 and self.weights == (1.0,) and self.is_sum(1)
        return alone and self.clamp is None and (self.rank is None or self.rank >= rank)

    def apply(self, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The combination of tensors of one shape."""
        if self.kind in ("dare_linear", "dare_ties"):
            thin: Callable[[Tensor], Tensor] = partial(dropped, density=self.density, generator=self.generator)
        else:
            thin = partial(pruned, density=self.density)
        if self.density < 1 and self.kind not in SUMS:
            deltas = [thin(delta) for delta in deltas]
        if self.is_sum(len(deltas)) or self.kind in ("dare_linear", "magnitude_prune"):
            return weighted_sum(deltas, weights)
        return agreeing_mean(deltas, weights, self.majority)


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one layer: scaling * product to the weight, scaling * bias to the bias."""

    product: LowRank
    scaling: float
    bias: Tensor | None = None

    @classmethod
    def of(cls, layer: AdapterLayer, name: str) -> Update:
        """Of a live adapter."""
        a = View(layer, name)
        bias = bias_of_B(layer.host, a)
        return cls(product_of(layer.host, a), float(a.scaling), None if bias is None else bias.detach())


@dataclass(frozen=True)
class Made:
    """What a layer gets: its update, and how near that is to the exact one."""

    update: Update
    part: Part
    full: bool = False
    """Whether it has as many rows as the weight, since nothing smaller is exact."""


# ---- one layer
def combined(updates: Sequence[Update], weights: Sequence[float], recipe: Recipe, count: int = 1) -> Made:
    """The combination of some updates of one layer; `count`: how many matrices of the stack share the rank."""
    rank = None if recipe.rank is None else max(1, recipe.rank // count)
    bias = combined_bias(updates, weights, recipe)
    if recipe.is_sum(len(updates)):
        exact, scaling = weighted(updates, weights)
        most = exact.most if recipe.kind == "svd" or recipe.clamp is not None else exact.rank
        most = min(exact.rank, most if rank is None else rank)
        if most < exact.rank or recipe.clamp is not None:
            return cut(LowRank(widened(exact.A), widened(exact.B) * scaling), most, recipe, bias, count)
        part = Part(exact.rank * count, 0.0, abs(scaling) * norm(exact))
        return Made(Update(exact, scaling, None if bias is None else bias / scaling), part)
    dense = recipe.apply([widened(u.product.dense()) * u.scaling for u in updates], weights)
    most = min(dense.shape[1:])
    if recipe.clamp is not None or (rank is not None and rank < most):
        return cut(dense, min(most, rank or most), recipe, bias, count)
    return Made(Update(undivided(dense), 1.0, bias), Part(most * count, 0.0, norm(dense)), full=True)


def weighted(updates: Sequence[Update], weights: Sequence[float]) -> tuple[LowRank, float]:
    """(product, scaling) of the weighted sum. Factors are copied as they are, where one scaling serves all.

    Else they are multiplied, in at least fp32.
    """
    factors = [weight * update.scaling for weight, update in zip(weights, updates, strict=True)]
    terms = [update.product for update in updates]
    scaling = abs(factors[0])
    if not scaling or any(abs(factor) != scaling for factor in factors):
        scaling = 1.0
        terms = [LowRank(widened(term.A), widened(term.B)) for term in terms]
    terms = [LowRank(term.A, term.B * (factor / scaling)) for term, factor in zip(terms, factors, strict=True)]
    return summed(terms), scaling


def combined_bias(updates: Sequence[Update], weights: Sequence[float], recipe: Recipe) -> Tensor | None:
    """The combination of what the updates add to the bias, an update without counting as zero."""
    like = next((update.bias for update in updates if update.bias is not None), None)
    if like is None:
        return None
    biases = [torch.zeros_like(like) if u.bias is None else u.bias * u.scaling for u in updates]
    return recipe.apply(biases, weights)


def cut(exact: Tensor | LowRank, rank: int, recipe: Recipe, bias: Tensor | None, count: int) -> Made:
    """The best update of a rank, clamped if that is asked for, and how far it is from the exact one."""
    dtype = exact.dtype if isinstance(exact, Tensor) else exact.A.dtype
    if isinstance(exact, LowRank) and (exact.rank >= exact.most or recipe.clamp is not None):
        exact = widened(exact.dense())  # clamping depends on the signs of singular vectors: have those that PEFT has
    found = Decomposed.of(exact, recipe.driver).cut(rank)
    if recipe.clamp is not None:
        found = clamped(found, recipe.clamp)
    near = LowRank(found.A.to(dtype), found.B.to(dtype))
    return Made(Update(near, 1.0, bias), Part(near.rank * count, distance(exact, near), norm(exact)))
