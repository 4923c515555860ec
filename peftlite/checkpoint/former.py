"""Adapter files from before a model's layers were fused, or renamed, as the model is now."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch import Tensor, nn

from peftlite.checkpoint.fused import A, B, Fused, Piece
from peftlite.checkpoint.keys import file_key, shown, split_file_key, without_prefix
from peftlite.checkpoint.tensorfile import TensorInfo, TensorSource
from peftlite.config import PeftConfig
from peftlite.core.facts import facts_of
from peftlite.core.former import Former
from peftlite.core.found import Found, host_at, innermost
from peftlite.core.hosts import ParamHost
from peftlite.core.inject import choose_parameters, is_linear
from peftlite.core.targets import TargetSpec, absent, ending, entries_for, is_all_linear, match_pattern, select
from peftlite.core.tree import places
from peftlite.errors import CheckpointError, ConfigError, warn
from peftlite.tuners.lora.config import LoraConfig

_FACTORS = (A, B, "lora_B.bias", "lora_magnitude_vector", "lora_embedding_A", "lora_embedding_B")
_LISTED = 3
N = TypeVar("N", int, float)


def as_now(
    base: nn.Module, config: PeftConfig, source: TensorSource, what: str, strict: object
) -> tuple[PeftConfig, TensorSource]:
    """A file's config and tensors for the layers that `base` has now; both as they are if the file is about those.

    Raises: CheckpointError if factors of fused layers are missing, which `strict` tolerates if it is not True, or have
        other shapes.
    """
    if not isinstance(config, LoraConfig) or config.kind is not LoraConfig.kind:
        return config, source
    paths = factor_paths(source.infos)
    if are_layers(base, paths):
        return config, source
    found = Found.of(base)
    strange = paths - known_paths(found, config)
    old = Old.of(base, config, found, paths) if strange else None
    if old is None or not old.places.keys() & strange or not (old.fused or old.modules):
        return config, source
    missing = [key for key in old.pieces if key not in source.infos]
    if missing and strict is True:
        listed = ", ".join(map(shown, missing[:_LISTED])) + (", ..." if len(missing) > _LISTED else "")
        raise CheckpointError(
            f"{what} does not fit: {len(missing)} tensors missing of layers that are one parameter in this model: "
            f"{listed}. Nothing was changed."
        )
    old.check(source.infos, what)
    now = old.config(config)
    return now, Now(source, old, now)


def brought_up_to_date(base: nn.Module, config: PeftConfig) -> None:
    """Make the config of a new adapter, in place, mean the parameters that layers which it names were fused into.

    Names that layers of the model still have mean those alone; "all-linear" means whatever was a linear layer.

    Raises: ConfigError if layers that are one parameter now were to have different scalings.
    """
    if not isinstance(config, LoraConfig) or config.kind is not LoraConfig.kind or not config.target_modules:
        return
    names_alone = not isinstance(config.target_modules, str)
    if names_alone and not absent(config.target_modules, (place.path for place in places(base))):
        return
    everything = is_all_linear(config.target_modules)
    old = Old.of(base, config, Found.of(base), set())
    names = {ending(path, 1) for path in old.modules}
    asked = [one for one in old.fused if everything or not {ending(p.path, 1) for p in one.pieces} & names]
    for one in asked:
        scalings = {piece.scaling: piece.path for piece in one.pieces}
        if len(scalings) > 1:
            raise ConfigError(
                f"`alpha_pattern` and `rank_pattern` give {' and '.join(map(shown, scalings.values()))} scalings of "
                f"their own ({', '.join(f'`{number}`' for number in scalings)}), and they are one parameter in this "
                f"model, {shown(one.former.target)}. Nothing was changed."
            )
    if asked:
        config.__dict__.update(replace(old, fused=asked).config(config).__dict__)


def factor_paths(keys: Iterable[str]) -> set[str]:
    """The paths of the layers that have LoRA's factors in a file; "base_layer" is no part of them."""
    paths = {place[0] for key in keys if (place := split_file_key(key, _FACTORS)) is not None}
    return {without_base_layers(path) if "base_layer" in path else path for path in paths}


def without_base_layers(path: str) -> str:
    """A path without the parts "base_layer"."""
    return ".".join(part for part in path.split(".") if part != "base_layer")


def are_layers(base: nn.Module, paths: Iterable[str]) -> bool:
    """Whether there are layers at these paths, that adapters can be on as a whole."""
    seen: dict[str, nn.Module | None] = {"": base}

    def at(path: str) -> nn.Module | None:
        if path not in seen:
            parent, _, name = path.rpartition(".")
            above = at(parent)
            seen[path] = None if above is None else innermost(above)._modules.get(name)
        return seen[path]

    return all((module := at(path)) is not None and host_at(module, None) is not None for path in paths)


def known_paths(found: Found, config: LoraConfig) -> set[str]:
    """Where the model has a layer, or a module with a parameter that the config means."""
    layers = {path for path, place in found.places.items() if host_at(place.module, None) is not None}
    return layers | {found.split(target)[0] for target in choose_parameters(config, found).targets}


@dataclass(frozen=True)
class Old:
    """What a config means in the model as it was."""

    found: Found
    places: dict[str, tuple[Former, int, int]]
    """Path of an old layer that is no more -> what became of it, which source, which expert."""
    fused: list[Fused] = field(default_factory=list)
    moved: dict[str, str] = field(default_factory=dict)
    """Path of an old module -> path of the same one now."""
    modules: set[str] = field(default_factory=set)
    """The paths of the layers that have adapters now, but for parameters."""

    @classmethod
    def of(cls, base: nn.Module, config: LoraConfig, found: Found, paths: set[str]) -> Old:
        """Found by the config, with the names that the file has."""
        facts = facts_of(base)
        formers = [*(facts.former(found.parameter_paths()) if facts.former is not None else ()), *replaced(found)]
        taken = set(choose_parameters(config, found).targets)
        chosen: dict[str, Former] = {}
        for former in formers:
            if former.target not in taken and (former.target not in chosen or _hits(found, former, paths)):
                chosen[former.target] = former
        places = {
            path: (former, part, expert)
            for former in chosen.values()
            for part, expert, path in former.paths(_experts(found, former))
        }
        hosted = [path for path, place in found.places.items() if host_at(place.module, None) is not None]
        blocks = {_parent(_parent(former.target)) for former in chosen.values() if former.stacked}
        linear = [path for path in hosted if is_linear(m := found.at(path).module) and m is not facts.output_head]
        linear += [path for path, (former, _, _) in places.items() if _parent(_parent(former.target)) in blocks]
        pool = [*dict.fromkeys([*found.places, *places])]
        selected = set(select(pool, TargetSpec.from_config(config), linear=linear).targets)
        old = cls(found, places, modules=selected & set(hosted))
        for former in chosen.values():
            old._add(former, config, selected)
        return old

    def _add(self, former: Former, config: LoraConfig, selected: Collection[str]) -> None:
        module, param = self.found.split(former.target)
        if not former.stacked:
            self.moved[former.sources[0]] = module
        if host_at(self.found.at(module).module, None) is not None:
            if former.sources[0] in selected:
                self.modules.add(module)
            return
        pieces = tuple(
            Piece(path, part, expert, config.rank_for(path), config.scaling_for(path))
            for part, expert, path in former.paths(_experts(self.found, former))
            if path in selected
        )
        host = host_at(self.found.at(module).module, param)
        if pieces and isinstance(host, ParamHost):
            self.fused.append(Fused(former, host, pieces, config.use_rslora))

    @property
    def pieces(self) -> list[str]:
        """The keys of the factors that are fused."""
        return [file_key(piece.path, suffix) for one in self.fused for piece in one.pieces for suffix in (A, B)]

    def check(self, infos: Mapping[str, TensorInfo], what: str) -> None:
        """Refuse factors that do not have the shapes that config and model say.

        Raises: CheckpointError.
        """
        for one in self.fused:
            for piece in one.pieces:
                for suffix in (A, B):
                    info, shape = infos.get(file_key(piece.path, suffix)), one.piece_shape(piece, suffix)
                    if info is not None and info.shape != shape:
                        raise CheckpointError(
                            f"{what} does not fit: {shown(file_key(piece.path, suffix))} is {info.shape}, not {shape}. "
                            "Nothing was changed."
                        )

    # ---- the config now
    def config(self, config: LoraConfig) -> LoraConfig:
        """The config that means the same for the model as it is now."""
        parameters = self.found.parameter_paths()
        targets = {one.former.target for one in self.fused}
        own = choose_parameters(config, self.found).targets
        others = [*self.modules, *own]
        now = replace(
            config.copy(),
            target_modules=self._modules(config),
            target_parameters=sorted({*(config.target_parameters or ()), *entries_for(parameters, targets, 2)}),
            layers_to_transform=config.layers_to_transform if self.modules else None,
            layers_pattern=config.layers_pattern if self.modules else None,
            lora_dropout=0.0 if self.fused else config.lora_dropout,
            rank_pattern={key: r for key, r in config.rank_pattern.items() if _any(key, others)},
            alpha_pattern={key: alpha for key, alpha in config.alpha_pattern.items() if _any(key, others)},
        )
        ranks = {
            one.former.target: sum(one.ranks) for one in self.fused if now.rank_for(one.former.target) != sum(one.ranks)
        }
        alphas = {one.former.target: one.alpha for one in self.fused if now.alpha_for(one.former.target) != one.alpha}
        now.rank_pattern = {**entries(ranks, targets, others), **now.rank_pattern}
        now.alpha_pattern = {**entries(alphas, targets, others), **now.alpha_pattern}
        if config.lora_dropout and self.fused and not config.inference_mode:
            warn(
                f"`lora_dropout` is `{config.lora_dropout}`, and is 0 from now on: the adapter is on parameters now, "
                "whose input it does not see."
            )
        return now

    def _modules(self, config: LoraConfig) -> list[str] | str:
        spec, paths = TargetSpec.from_config(config), list(self.found.places)
        given = config.target_modules or []

        def meant(targets: tuple[str, ...] | str, pool: Iterable[str] = paths) -> set[str]:
            return set(select(pool, spec._replace(target_modules=targets)).targets)

        if isinstance(given, str):
            return (
                entries_for(paths, self.modules, 1) if is_all_linear(given) or meant(given) != self.modules else given
            )
        idle = [name for name in given if not meant((name,)) and not meant((name,), self.places)]
        kept = [name for name in given if meant((name,)) and meant((name,)) <= self.modules]
        return [*(kept if meant(tuple(kept)) == self.modules else entries_for(paths, self.modules, 1)), *idle]


def entries(numbers: Mapping[str, N], targets: Collection[str], others: Collection[str]) -> dict[str, N]:
    """What a pattern says of parameters that have these numbers: by their last parts, where that means no others."""
    result: dict[str, N] = {}
    for path, number in numbers.items():
        short = ending(path, 2)
        same = all(numbers.get(one) == number for one in targets if match_pattern([short], one))
        result[short if same and not _any(short, others) else path] = number
    return result


def replaced(found: Found) -> list[Former]:
    """Modules that have a matrix for a weight and are no kind of layer: they may have been linear layers before."""
    return [
        Former(f"{path}.weight", (path,))
        for path, place in found.places.items()
        if host_at(place.module, None) is None
        and (weight := place.module._parameters.get("weight")) is not None
        and weight.dim() == 2
    ]


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _any(pattern: str, paths: Iterable[str]) -> bool:
    return any(match_pattern([pattern], path) for path in paths)


def _experts(found: Found, former: Former) -> int:
    module, param = found.split(former.target)
    host = host_at(found.at(module).module, param)
    return host.shape[0] if host is not None and former.stacked else 1


def _hits(found: Found, former: Former, paths: set[str]) -> bool:
    return any(path in paths for _, _, path in former.paths(_experts(found, former)))


class Now:
    """A `TensorSource` of an old file's tensors as the model's layers have them now."""

    def __init__(self, source: TensorSource, old: Old, config: LoraConfig) -> None:
        self._source = source
        self._old: dict[str, str] = {}
        self._fused: dict[str, tuple[Fused, str]] = {}
        pieces = set(old.pieces)
        self.infos: dict[str, TensorInfo] = {}
        for key, info in source.infos.items():
            if key not in pieces:
                new = _moved(key, old.moved)
                self._old[new], self.infos[new] = key, info
        for path, one in paths_in_files(old, config):
            for suffix in (A, B):
                keys = [file_key(piece.path, suffix) for piece in one.pieces]
                if all(key in source.infos for key in keys):
                    key = file_key(path, suffix)
                    self._fused[key] = one, suffix
                    self.infos[key] = TensorInfo(source.infos[keys[0]].dtype, one.shape(suffix))

    def read(self, key: str) -> Tensor:
        if key not in self._fused:
            return self._source.read(self._old[key])
        one, suffix = self._fused[key]
        return one.build(suffix, {p.path: self._source.read(file_key(p.path, suffix)) for p in one.pieces})

    def close(self) -> None:
        self._source.close()


def _moved(key: str, moved: Mapping[str, str]) -> str:
    path = without_prefix(key)
    while "." in path:
        path = path.rpartition(".")[0]
        if path in moved:
            return file_key(moved[path], without_prefix(key).removeprefix(f"{path}."))
    return key


def paths_in_files(old: Old, config: LoraConfig) -> Iterable[tuple[str, Fused]]:
    """The path that each fused parameter's factors have in a file: a later one of a module is around an earlier one."""
    by_module: dict[str, list[str]] = {}
    for target in choose_parameters(config, old.found).targets:
        by_module.setdefault(old.found.split(target)[0], []).append(target)
    for one in old.fused:
        module = old.found.split(one.former.target)[0]
        targets = by_module[module]
        yield module + ".base_layer" * (len(targets) - 1 - targets.index(one.former.target)), one
