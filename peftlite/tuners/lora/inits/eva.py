"""EVA (https://arxiv.org/abs/2410.07170): A begins as the main directions of its inputs; ranks go where many count."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peftlite.core.binding import rebind, sync
from peftlite.core.hosts import LinearHost
from peftlite.core.layer import AdapterLayer
from peftlite.core.lean import Linear
from peftlite.core.lifecycle import disable_adapter, state_of
from peftlite.core.transaction import atomic, put
from peftlite.core.tree import base_model_of, find_state, layer_places, named_layers
from peftlite.errors import ConfigError, StateError
from peftlite.tuners.lora.fit import addressed, fitted
from peftlite.tuners.lora.inits.pca import IncrementalPCA
from peftlite.tuners.lora.inits.watch import linear_targets, watched
from peftlite.tuners.lora.options import EvaConfig

_ROUNDING = 1e-6  # a cosine of 1 is computed as a little less
Prepare = Callable[..., Any]


# ---- what is looked at
def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Call the model with a batch that is a dict of its arguments."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Mapping[str, Any], peft_config: Any) -> Tensor | None:
    """Which tokens of a batch count (rows, tokens): those attended to, and with a label if labels are given."""
    mask: Tensor | None = model_input.get("attention_mask")
    labels: Tensor | None = model_input.get("labels")
    if labels is not None and peft_config.eva_config.use_label_mask:
        labelled = labels != peft_config.eva_config.label_mask_value
        mask = labelled if mask is None else mask.bool() & labelled
    return None if mask is None else mask.bool()


def prepare_layer_inputs_fn_language_modeling(
    layer_input: Tensor, model_input: Tensor | None, layer_name: str
) -> Tensor:
    """The rows of a layer's input (rows, tokens, size) that belong to tokens which count."""
    if model_input is None or layer_input.shape[:-1] != model_input.shape:
        return layer_input.flatten(0, -2)
    return layer_input[model_input.to(layer_input.device)]


# ---- finding components
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: Any = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Prepare | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Prepare | Mapping[str, Prepare] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """First values of A (rank, in) for each layer, by its name in `model`; the model does not change.

    The samples are run again and again until the components that count agree, to `eva_config.tau`, with those found
    before. Layers that are called with the same tensor share one analysis.

    Args:
        model: a bare model, or one with the adapter, wrapped or not.
        dataloader: batches.
        peft_config: the adapter's config; of a model with the adapter, that adapter's.
        forward_fn: runs the model on a batch.
        prepare_model_inputs_fn: (batch, config) -> what the next one is given; None for the batch itself.
        prepare_layer_inputs_fn: (layer input, that, layer name) -> rows (rows, in) to look at; one for all layers, or
            by name; None for all rows.
        adapter_name: whose config, if none is given.
        gather_distributed_inputs: look at the rows of all processes.
        show_progress_bar: show which round it is.

    Raises: ConfigError, StateError if the samples do not reach a target layer.
    """
    config = peft_config if peft_config is not None else configured(model, adapter_name)
    modules = targets(model, config, adapter_name)
    names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    search = Search(config, {path: names[id(module)] for path, module in modules.items()}, prepare_layer_inputs_fn)
    search.gathers = gather_distributed_inputs and dist.is_available() and dist.is_initialized()
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), plain(model), watched({module: search.watcher(path) for path, module in modules.items()}):
            for batch in rounds(dataloader, show_progress_bar):
                batch = moved(batch, next(model.parameters()).device)
                search.about = batch if prepare_model_inputs_fn is None else prepare_model_inputs_fn(batch, config)
                forward_fn(model, batch)
                if search.done():
                    break
    finally:
        model.train(training)
    return search.found()


class Search:
    """What is known of each layer's inputs, by path."""

    def __init__(self, config: Any, names: Mapping[str, str], prepare: Prepare | Mapping[str, Prepare] | None) -> None:
        self.config = config
        self.names = names
        self.prepare = prepare
        self.gathers = False
        self.about: Any = None
        self.seen: dict[int, tuple[ref[Tensor], str]] = {}
        """Id of an input tensor -> that, and the first layer that was called with it."""
        self.leaders: dict[str, str] = {}
        self.analyses: dict[str, IncrementalPCA] = {}

    @property
    def options(self) -> EvaConfig:
        """How to search."""
        options: EvaConfig = self.config.eva_config
        return options

    def watcher(self, path: str) -> Callable[[Tensor, Tensor], None]:
        """What looks at the inputs of one layer."""

        def look(x: Tensor, y: Tensor) -> None:
            if path not in self.leaders:
                tensor, leader = self.seen.get(id(x), (ref(x), path))
                self.leaders[path] = leader if tensor() is x else path  # an id is used again after its tensor's end
                self.seen[id(x)] = (ref(x), self.leaders[path])
            if self.leaders[path] != path:
                return
            most = max(self.config.rank_for(other) for other in self.names)
            analysis = self.analyses.setdefault(path, IncrementalPCA(max(1, round(most * self.options.rho))))
            rows = self._rows(x, path)
            if len(rows):
                analysis.add(rows.float())

        return look

    def _rows(self, x: Tensor, path: str) -> Tensor:
        prepare = self.prepare.get(self.names[path]) if isinstance(self.prepare, Mapping) else self.prepare
        rows: Tensor = x.flatten(0, -2) if prepare is None else prepare(x, self.about, self.names[path])
        if not self.gathers:
            return rows
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, rows.cpu())  # of different lengths
        return torch.cat(parts).to(rows.device)

    def done(self) -> bool:
        """Whether all components that count have been found.

        Raises: StateError if a layer was not called.
        """
        silent = [path for path in self.names if path not in self.leaders]
        if silent:
            raise StateError(f"The samples did not reach `{silent[0]}`. Nothing was changed.")
        if not all(analysis.ready for analysis in self.analyses.values()):
            return False
        tau = self.options.tau - _ROUNDING
        ranks = self.ranks()
        return all(bool((self.of(path).agreement[: ranks[path]] >= tau).all()) for path in self.names)

    def of(self, path: str) -> IncrementalPCA:
        """The analysis of a layer's inputs."""
        return self.analyses[self.leaders[path]]

    def ranks(self) -> dict[str, int]:
        """The rank of each layer: as many in all as the config has, where components explain the largest shares."""
        budget = sum(self.config.rank_for(path) for path in self.names)
        shares = [
            (float(share), path)
            for path in self.names
            for share in self.of(path).ratios[: round(self.config.rank_for(path) * self.options.rho)]
        ]
        chosen = [path for _, path in sorted(shares, key=lambda entry: -entry[0])[:budget]]
        return {path: chosen.count(path) for path in self.names}

    def found(self) -> dict[str, Tensor]:
        """First values of A by layer name, without layers of rank 0.

        Raises: StateError if there were too few samples.
        """
        if not self.analyses or not all(analysis.count for analysis in self.analyses.values()):
            raise StateError("There were not enough samples to find any component. Nothing was changed.")
        result = {}
        for path, rank in self.ranks().items():
            analysis = self.of(path)
            A = analysis.components[:rank]
            if rank:
                result[self.names[path]] = A / analysis.values[:rank, None].sqrt() if self.options.whiten else A.clone()
        return result


# ---- setting them
@atomic
def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Prepare | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Prepare | Mapping[str, Prepare] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Give a fresh adapter with `init_lora_weights="eva"` its first values and ranks, from samples or from what
    `get_eva_state_dict` found in them.

    Layers that get no rank lose the adapter. The model's config says afterwards what has which rank.

    Raises: ConfigError, StateError; nothing is changed then.
    """
    config = configured(model, adapter_name)
    if eva_state_dict is None:
        if dataloader is None:
            raise ConfigError("Neither `dataloader` nor `eva_state_dict` is given; one must be. Nothing was changed.")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            config,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
            gather_distributed_inputs,
            show_progress_bar,
        )
    layers = targets(model, config, adapter_name)
    first = by_path(model, layers, eva_state_dict)
    numbers = {
        path: (layer.r[adapter_name], layer.scaling[adapter_name])
        for path, layer in on_layers(model, adapter_name)
        if path not in layers
    }
    numbers |= {path: (len(A), scaling(config, path, len(A))) for path, A in first.items()}
    new_config = fitted(addressed(config, model, list(numbers)), numbers)
    state = state_of(model)
    for path, layer in layers.items():
        if path in first:
            begin(layer, adapter_name, first[path], new_config.alpha_for(path), numbers[path][1])
        else:
            layer.remove(adapter_name)
    take_out_empty(model)
    put(state.configs, adapter_name, new_config)
    sync(model, state, (adapter_name,))
    rebind(model, state)


def scaling(config: Any, path: str, rank: int) -> float:
    """The scaling of a layer whose rank has changed."""
    if config.eva_config.adjust_scaling_factors:
        return float(config.scaling_for(path))
    return float(config.alpha_for(path) / (rank**0.5 if config.use_rslora else rank))


def begin(layer: Any, name: str, A: Tensor, alpha: float, scale: float) -> None:
    """Factors of another rank: A as given, B zero."""
    old_A, old_B = layer.lora_A[name].weight, layer.lora_B[name].weight
    out, r = len(old_B), len(A)
    layer.lora_A[name] = Linear(A.to(layer.host.device, old_A.dtype, copy=True))
    zeros = torch.zeros(out, r, dtype=old_B.dtype, device=layer.host.device)
    layer.lora_B[name] = Linear(zeros)
    layer.r[name], layer.lora_alpha[name], layer.scaling[name] = r, alpha, scale
    layer.unbind()


def by_path(model: nn.Module, layers: Mapping[str, Any], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The given values by path, checked.

    Raises: ConfigError for names and shapes that the model does not have.
    """
    names = {name: module for name, module in model.named_modules(remove_duplicate=False)}
    base = base_model_of(model)
    paths = {id(layer): path for path, layer in layers.items()}
    found: dict[str, Tensor] = {}
    for name, A in given.items():
        module = names.get(name) or dict(base.named_modules()).get(name)
        path = paths.get(id(module))
        if path is None or A.dim() != 2 or A.shape[1] != layers[path].host.shape[1]:
            raise ConfigError(
                f"`eva_state_dict` has `{name}` of shape {tuple(A.shape)}, which is no linear layer with this adapter "
                "and as many inputs. Nothing was changed."
            )
        found[path] = A
    return found


# ---- the model
def configured(model: nn.Module, adapter_name: str) -> Any:
    """The config of an adapter that begins with EVA.

    Raises: ConfigError, AdapterNameError, NoAdapterError.
    """
    state = state_of(model)
    state.checked(adapter_name)
    config: Any = state.configs[adapter_name]
    if getattr(config, "init_lora_weights", None) != "eva":
        raise ConfigError(f"Adapter `{adapter_name}` was not made with `init_lora_weights='eva'`. Nothing was changed.")
    return config


def targets(model: nn.Module, config: Any, adapter_name: str) -> dict[str, Any]:
    """The modules to look at: layers with the adapter, or the ones that would get it."""
    state = find_state(model)
    if state is not None and adapter_name in state.configs:
        return {path: layer for path, layer in on_layers(model, adapter_name) if isinstance(layer.host, LinearHost)}
    return {path: host.layer for path, host in linear_targets(model, config, "eva").items()}


def on_layers(model: nn.Module, name: str) -> Iterator[tuple[str, AdapterLayer]]:
    """The layers that have LoRA's factors of an adapter, by path."""
    return ((path, layer) for path, layer in named_layers(model) if name in layer.__dict__.get("scaling", ()))


def plain(model: nn.Module) -> Any:
    """The base model, whatever adapters there are."""
    return disable_adapter(model) if find_state(model) is not None else torch.no_grad()


def take_out_empty(model: nn.Module) -> None:
    """Layers without any adapter become base layers again."""
    for place in reversed(layer_places(model)):
        if isinstance(place.module, AdapterLayer) and not place.module.variants:
            put(place.parent._modules, place.child, place.module.wrapped)


def rounds(dataloader: Iterable[Any], show: bool) -> Iterator[Any]:
    """The batches, again and again."""
    for number in itertools.count(1):
        empty = True
        for batch in dataloader:
            empty = False
            yield batch
        if empty:
            raise StateError("The dataloader gives no batches. Nothing was changed.")
        if show:
            print(f"EVA: round {number} through the samples is done")


def moved(batch: Any, device: torch.device) -> Any:
    """A batch on the model's device."""
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    return batch.to(device) if isinstance(batch, Tensor) else batch
