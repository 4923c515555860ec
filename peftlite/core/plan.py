"""What adding an adapter would do, as data and as a table."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from peftlite.core.hosts import Dense, Host
from peftlite.core.layer import AdapterLayer
from peftlite.core.replicas import Replicas
from peftlite.core.residency import near
from peftlite.core.slots import HALF_DTYPES
from peftlite.core.tree import NOTHING, Place
from peftlite.core.variant import Placement, TunerSpec, Variant

_ADAMW_STATES = 2  # first and second moment, each as large as the parameter


class Site(NamedTuple):
    """One module that gets an adapter, in all the places where it is."""

    places: tuple[Place, ...]
    tuner: TunerSpec
    variant: Variant
    host: Host
    rank: int | None
    parameters: int
    param: str | None
    """The parameter that is adapted, of a module that is not adapted as a whole."""
    shared: bool
    """Whether the base weight is another module's too, so that merging needs a copy of it."""
    leader: str | None = None
    """The path of the site whose adapter this is, where modules that share their weight have one together."""

    @property
    def path(self) -> str:
        """Where the module (or its parameter) is in the base model, by its first place."""
        path = self.places[0].path
        return path if self.param is None else f"{path}.{self.param}"

    @property
    def module(self) -> nn.Module:
        """What is there now: the base layer, or its adapter layer if it has adapters already."""
        return self.places[0].module

    @property
    def layer(self) -> AdapterLayer | None:
        """The adapter layer that the site's adapter will join, if it is there already."""
        module: nn.Module = self.module
        while isinstance(module, AdapterLayer):
            if module.param == self.param:
                return module
            module = module.wrapped
        return None

    def own(self) -> Dense:
        """The base layer's own weight and bias, whatever other adapters have merged into it."""
        if self.layer is not None:
            return self.layer.own()
        with near(self.host.layer):
            return self.host.read()


class InjectionPlan(NamedTuple):
    """What `inject` does: `sites`, and the model's own, completed copy of the config. Prints as a table."""

    model: nn.Module
    config: Any
    adapter_name: str
    sites: tuple[Site, ...]
    autocast_adapter_dtype: bool = True
    replicas: Replicas | None = None
    """A longer stack of layers that the model gets first; sites are in it."""

    @property
    def instead(self) -> Mapping[int, nn.Module]:
        """For walks over the model as it will be."""
        return NOTHING if self.replicas is None else self.replicas.instead

    def dtype(self, site: Site) -> torch.dtype:
        """The dtype of the adapter's tensors: fp32 on a base in half precision, else the base's own."""
        own = site.host.dtype
        if own.itemsize < 2 or not own.is_floating_point:
            return torch.float32
        return torch.float32 if self.autocast_adapter_dtype and own in HALF_DTYPES else own

    def placement(self, site: Site, on_meta: bool = False) -> Placement:
        """Where the site's new tensors go."""
        device = torch.device("meta") if on_meta else site.host.device
        return Placement(self.config, site.path, device, self.dtype(site), site.own)

    # ---- tensors
    def build(self, on_meta: bool = False) -> list[dict[str, Any]]:
        """New tensors and numbers for each site."""
        shared = self.shared(torch.device("meta") if on_meta and self.saves_shared else None)
        return [
            {**site.variant.init(site.host, self.placement(site, on_meta)), **(shared if site.tuner.shared else {})}
            for site in self.sites
        ]

    @property
    def saves_shared(self) -> bool:
        """Whether files have the tensors that all sites share; else they are made again from the config."""
        return any(site.tuner.shared is not None and site.tuner.shared.saved(self.config) for site in self.sites)

    def shared(self, device: torch.device | None = None) -> dict[str, torch.Tensor]:
        """New tensors that all sites share, on a device (default: that of the first site)."""
        sites = [site for site in self.sites if site.tuner.shared is not None]
        if not sites or (shared := sites[0].tuner.shared) is None:
            return {}
        placement = self.placement(sites[0])
        placement = placement if device is None else placement._replace(device=device)
        return shared.make(self.config, [site.host for site in sites], placement)

    # ---- totals
    @property
    def parameters(self) -> int:
        """Trainable parameters of the adapter."""
        return sum(site.parameters for site in self.sites)

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the adapter's tensors."""
        return sum(site.parameters * self.dtype(site).itemsize for site in self.sites)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of their gradients."""
        return self.adapter_bytes

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of AdamW's state for them."""
        return _ADAMW_STATES * self.adapter_bytes

    # ---- the table
    def rows(self) -> Iterator[tuple[str, str, str, str, str]]:
        """(path, base layer, shape, rank, parameters), with equal layers of a stack in one row."""
        grouped: dict[tuple[str, str, str, str, int], list[Site]] = {}
        for site in self.sites:
            kind, shape = type(site.host.layer).__name__, " x ".join(map(str, site.host.shape))
            rank = "-" if site.rank is None else str(site.rank)
            grouped.setdefault((_stack(site.path), kind, shape, rank, site.parameters), []).append(site)
        for (_, kind, shape, rank, parameters), sites in grouped.items():
            count = f" x {len(sites)}" if len(sites) > 1 else ""
            yield _range([site.path for site in sites]) + count, kind, shape, rank, f"{parameters * len(sites):,}"

    def __str__(self) -> str:
        table = [("path", "base layer", "shape", "rank", "parameters"), *self.rows()]
        widths = [max(len(row[k]) for row in table) for k in range(5)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        lines.append(
            f"adapter `{self.adapter_name}`: {len(self.sites)} layers, {self.parameters:,} parameters; "
            f"{_bytes(self.adapter_bytes)} + gradients {_bytes(self.gradient_bytes)} "
            f"+ AdamW {_bytes(self.optimizer_bytes)}"
        )
        return "\n".join(lines)


def _stack(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", path)


def _range(paths: list[str]) -> str:
    """`a.{0-3}.b` for the paths a.0.b ... a.3.b of one stack."""
    split = [path.split(".") for path in paths]
    parts = []
    for column in zip(*split, strict=True):
        values = list(dict.fromkeys(column))
        parts.append(values[0] if len(values) == 1 else "{" + _numbers([int(v) for v in values]) + "}")
    return ".".join(parts)


def _numbers(values: list[int]) -> str:
    """`0-3,5`."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
