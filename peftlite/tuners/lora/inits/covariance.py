"""CorDA (https://arxiv.org/abs/2406.05223): factors from the singular vectors of W C, C the inputs' covariance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from peftlite.core.hosts import Host
from peftlite.errors import ConfigError, StateError
from peftlite.tuners.lora.inits.watch import (
    by_path,
    check_called,
    linear_targets,
    read_cache,
    rows,
    watched,
    write_cache,
)
from peftlite.tuners.lora.options import CordaConfig

_DAMP = 0.01  # times the mean variance, added to the diagonal of C so that it has an inverse


@dataclass(frozen=True)
class Eigens:
    """Of W C = U S V^T, the r components that the method chooses: U (out, r), S (r,), and V C^-1 as `V` (r, in)."""

    method: str
    U: Tensor
    S: Tensor
    V: Tensor

    def factors(self, r: int, scaling: float) -> tuple[Tensor, Tensor]:
        """A and B, with scaling * B A = U S V C^-1, which is a part of W."""
        root = (self.S[:r] / scaling).sqrt()
        return root[:, None] * self.V[:r], self.U[:, :r] * root


_EIGENS: WeakKeyDictionary[nn.Module, Eigens] = WeakKeyDictionary()


def recall(layer: nn.Module, path: str, config: CordaConfig, r: int) -> Eigens:
    """What `preprocess_corda` found for a layer.

    Raises: StateError if it was not called, or for another rank or method.
    """
    found = _EIGENS.get(layer)
    if found is None or len(found.S) < min(r, *layer_shape(found)) or found.method != config.corda_method:
        why = "" if found is None else f" with rank {r} and `corda_method={config.corda_method!r}`"
        raise StateError(
            f"`init_lora_weights='corda'` needs the covariance of the inputs of `{path}`: call `preprocess_corda` on "
            f"this model{why} first. (An adapter file that says so was saved relative to weights that it does not "
            "have.) Nothing was changed."
        )
    return found


def layer_shape(found: Eigens) -> tuple[int, int]:
    """(out, in)."""
    return found.U.shape[0], found.V.shape[1]


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: Any,
    run_model: Callable[[], None] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Prepare `model` for an adapter with `init_lora_weights="corda"`; call it before adding that.

    Args:
        model: the bare model. Nothing is written to it.
        lora_config: the adapter's config; its `corda_config` says how, and where to keep what is found.
        run_model: runs the model on samples. Not needed where there is a cache file.
        hooked_model: the model that `run_model` runs, if that is another one.

    Raises: ConfigError, StateError if the samples do not reach a target layer.
    """
    hosts = linear_targets(model, lora_config, "corda")
    options = lora_config.corda_config
    cached = read_cache(options.cache_file)
    if cached is None:
        covariances = covariances_of(hooked_model or model, list(hosts), options, run_model)
        check_called(covariances, list(hosts), "The samples")
        found = {
            path: decomposed(host, covariances[path], lora_config.rank_for(path), options.corda_method)
            for path, host in hosts.items()
        }
        tensors = {f"{path}.{name}": getattr(e, name) for path, e in found.items() for name in ("U", "S", "V")}
        write_cache(options.cache_file, tensors)
    else:
        check_called({key.rpartition(".")[0]: None for key in cached}, list(hosts), f"`{options.cache_file}`")
        found = {p: Eigens(options.corda_method, *(cached[f"{p}.{n}"] for n in ("U", "S", "V"))) for p in hosts}
    for path, host in hosts.items():
        e = found[path]
        _EIGENS[host.layer] = replace(e, **{n: getattr(e, n).to(host.device) for n in ("U", "S", "V")})


def covariances_of(
    model: nn.Module, paths: list[str], options: CordaConfig, run_model: Callable[[], None] | None
) -> dict[str, Tensor]:
    """The covariance (in, in) of each layer's inputs; each call is divided by its largest entry first.

    Raises: ConfigError without samples, StateError if inputs are not finite.
    """
    cached = read_cache(options.covariance_file)
    if cached is not None:
        return cached
    if run_model is None:
        raise ConfigError("`run_model` is None, and there is no file with covariances or results. Nothing was changed.")
    dtype = torch.float16 if options.use_float16_for_covariance else torch.float32
    found: dict[str, Tensor] = {}

    def watch(path: str) -> Callable[[Tensor, Tensor], None]:
        def add(x: Tensor, y: Tensor) -> None:
            x = rows(x)
            x = x / (x.max().abs() or 1.0)
            if not bool(torch.isfinite(x).all()):
                raise StateError(f"The input of `{path}` is not finite. Nothing was changed.")
            covariance = (x.T @ x).to(dtype)
            found[path] = found[path] + covariance if path in found else covariance

        return add

    with watched({module: watch(path) for path, module in by_path(model, paths).items()}):
        run_model()
    write_cache(options.covariance_file, found)
    return found


def decomposed(host: Host, covariance: Tensor, r: int, method: str) -> Eigens:
    """The components of W C that "ipm" (the largest) or "kpm" (the smallest) chooses."""
    W = host.read().weight.float()
    C = covariance.to(W)
    C = C + _DAMP * C.diagonal().mean() * torch.eye(len(C), device=C.device)
    U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
    chosen = slice(0, r) if method == "ipm" else slice(max(0, len(S) - r), len(S))
    V = torch.cholesky_solve(Vh[chosen].T, torch.linalg.cholesky(C)).T  # C is symmetric: V C^-1
    return Eigens(method, U[:, chosen].contiguous(), S[chosen].contiguous(), V.contiguous())
