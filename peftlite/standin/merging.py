"""PEFT's functions on tensors of several adapters, in terms of ours."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from peftlite.tuners.lora.sparse import agreeing_mean, dropped, pruned, weighted_sum


def prune(tensor: Tensor, density: float, method: str, rescale: bool = False) -> Tensor:
    """A share of the entries, zeros for the rest: the largest ones ("magnitude"), or random ones ("random").

    Raises: ValueError for another method.
    """
    if method not in ("magnitude", "random"):
        raise ValueError(f"`method` is `{method}`; it can be `magnitude` or `random`.")
    if density >= 1:
        return tensor
    if method == "random":
        return dropped(tensor, density, None) * (1 if rescale else density)
    return pruned(tensor, density) / (density if rescale else 1)


def _weights(weights: Tensor | Sequence[float]) -> list[float]:
    return weights.tolist() if isinstance(weights, Tensor) else list(weights)


def task_arithmetic(task_tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The sum of weight times tensor."""
    return weighted_sum(task_tensors, _weights(weights))


def magnitude_prune(task_tensors: Sequence[Tensor], weights: Tensor, density: float) -> Tensor:
    """The weighted sum of the largest entries of each."""
    return task_arithmetic([prune(tensor, density, "magnitude") for tensor in task_tensors], weights)


def dare_linear(task_tensors: Sequence[Tensor], weights: Tensor, density: float) -> Tensor:
    """The weighted sum of random entries of each, divided by their share."""
    return task_arithmetic([prune(tensor, density, "random", rescale=True) for tensor in task_tensors], weights)


def ties(
    task_tensors: Sequence[Tensor], weights: Tensor, density: float, majority_sign_method: str = "total"
) -> Tensor:
    """The weighted mean of those among the largest entries of each that have the majority's sign."""
    kept = [prune(tensor, density, "magnitude") for tensor in task_tensors]
    return agreeing_mean(kept, _weights(weights), majority_sign_method)


def dare_ties(
    task_tensors: Sequence[Tensor], weights: Tensor, density: float, majority_sign_method: str = "total"
) -> Tensor:
    """The weighted mean of those among random entries of each that have the majority's sign."""
    kept = [prune(tensor, density, "random", rescale=True) for tensor in task_tensors]
    return agreeing_mean(kept, _weights(weights), majority_sign_method)
