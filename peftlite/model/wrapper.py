"""`PeftModel`: a model's adapters as methods, with their files, around the tuner's wrapper."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftlite.base_tuner import BaseTuner, tuner_model_for
from peftlite.config import PeftConfig, TaskType
from peftlite.core import lifecycle
from peftlite.core.inject import check_config, inject
from peftlite.core.modes import evaluate
from peftlite.core.rows import check_batch
from peftlite.core.targets import UnmatchedPolicy
from peftlite.core.transaction import atomic
from peftlite.core.tree import base_model_of
from peftlite.errors import UnsupportedFeatureError
from peftlite.model.about import Reporting
from peftlite.registry import later
from peftlite.tuners.lora.values import LoraRuntimeConfig
from peftlite.wrapping import check_bare, check_kind, is_checkpointing, require_gradients_of_inputs

if TYPE_CHECKING:
    from peftlite.checkpoint import adapters, card, hub, report
else:
    adapters = later("peftlite.checkpoint.adapters")
    card = later("peftlite.checkpoint.card")
    hub = later("peftlite.checkpoint.hub")
    report = later("peftlite.checkpoint.report")

TASK_MODELS: dict[TaskType, type[PeftModel]] = {}
"""The wrapper class of each task."""


class PeftModel(Reporting):
    """A model with adapters: `base_model` is the tuner's wrapper (`LoraModel`), `base_model.model` the model itself.

    Args:
        model: the base model, changed in place.
        peft_config: what to add.
        adapter_name: the adapter's name.
        autocast_adapter_dtype: keep adapters in fp32 on a base in half precision.
        low_cpu_mem_usage: make the adapter's tensors on the meta device, to be loaded.
        unmatched: what to do about entries of the config that match nothing: "error", "warn" or "ignore".

    Raises: StateError if `model` has adapters, and what `peftlite.plan` raises; the model is then as it was.
    """

    def __init_subclass__(cls, task: TaskType | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if task is not None:
            TASK_MODELS[task] = cls

    @atomic
    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        *,
        unmatched: UnmatchedPolicy = "error",
    ) -> None:
        super().__init__()
        check_bare(model)
        check_config(peft_config)
        tuner = tuner_model_for(peft_config)
        checkpointing = is_checkpointing(model)
        inject(
            model,
            peft_config,
            adapter_name,
            low_cpu_mem_usage=low_cpu_mem_usage,
            autocast_adapter_dtype=autocast_adapter_dtype,
            unmatched=unmatched,
        )
        self.base_model = tuner.around(model)
        if checkpointing:
            require_gradients_of_inputs(model)

    @classmethod
    @atomic
    def around(cls, model: nn.Module, checkpointing: bool | None = None) -> PeftModel:
        """The wrapper of a model that has its adapters already; see `peftlite.wrap`.

        checkpointing: whether it is under gradient checkpointing, if that is known.
        """
        wrapper = cls.__new__(cls)
        nn.Module.__init__(wrapper)
        config = next(iter(lifecycle.state_of(model).configs.values()))
        inside = base_model_of(model)
        wrapper.base_model = model if isinstance(model, BaseTuner) else tuner_model_for(config).around(inside)
        if is_checkpointing(inside) if checkpointing is None else checkpointing:
            require_gradients_of_inputs(inside)
        return wrapper

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base model does with these arguments and the active adapters, or with one for each row.

        `adapter_names` has the name of an adapter for each row of the batch; `"__base__"` stands for the base model. It
        may also be a tensor of ids, see `use_adapter_per_row`.
        """
        with self._rows(kwargs.pop("adapter_names", None), args, kwargs):
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate`, with the active adapters, or with `adapter_names`, one for each row."""
        with self._rows(kwargs.pop("adapter_names", None), args, kwargs):
            return self.get_base_model().generate(*args, **kwargs)  # type: ignore[operator]

    def _rows(
        self, names: Sequence[str] | Tensor | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> AbstractContextManager[object]:
        if names is None:
            return nullcontext()
        rows = lifecycle.use_adapter_per_row(self, names)
        check_batch(names, args, kwargs)
        return rows

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> None:
        """Have the output of a model's embeddings require gradients, as training under gradient checkpointing needs.

        A model that is under it already when it is wrapped was prepared.
        """
        require_gradients_of_inputs(model)

    # ---- more adapters
    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        *,
        unmatched: UnmatchedPolicy = "error",
    ) -> None:
        """Add another adapter of the same kind; `set_adapter` makes it the active one.

        Raises: ConfigError for one of another kind, and what `peftlite.plan` raises; nothing is changed then.
        """
        check_config(peft_config)
        check_kind(self, self.peft_type, peft_config.peft_type)
        inject(
            self,
            peft_config,
            adapter_name,
            low_cpu_mem_usage=low_cpu_mem_usage,
            autocast_adapter_dtype=autocast_adapter_dtype,
            unmatched=unmatched,
        )

    # ---- files
    @classmethod
    @atomic
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        *,
        torch_device: str | torch.device | None = None,
        strict: report.Strict = True,
        mmap: bool = False,
        **hub_options: Any,
    ) -> PeftModel:
        """Load an adapter into `model`, in place, and wrap it in the class that belongs to the adapter's task.

        Args:
            model: the bare base model.
            model_id: a directory, or the id of a repository.
            adapter_name: what to call the adapter.
            is_trainable: whether it may train; if not, the model is put into eval mode.
            config: in place of the one in the file.
            autocast_adapter_dtype: keep adapters in fp32 on a base in half precision.
            ephemeral_gpu_offload: has no effect, with a warning: DoRA's norms need no GPU.
            low_cpu_mem_usage: no tensor is made before it is loaded anyway, so this changes nothing.
            key_mapping: regular expression -> replacement, for keys of other libraries' files.
            torch_device: where the adapter's tensors go; by default, to the layers that they are for.
            strict: False leaves out whatever does not fit, with a warning; "shapes" accepts that tensors are missing
                or unexpected, and no more.
            mmap: have the tensors lie in a private map of the file, as `peftlite.load_adapter` says.
            **hub_options: subfolder, revision, token, cache_dir, local_files_only, force_download.

        Raises: StateError if `model` has adapters, and what `peftlite.load_adapter` raises; nothing is changed then.
        """
        check_bare(model)
        LoraRuntimeConfig(ephemeral_gpu_offload)  # says that it has no effect
        if config is not None:
            check_config(config)
        checkpointing = is_checkpointing(model)  # while it has few modules
        adapters.load_adapter(
            model,
            model_id,
            adapter_name,
            is_trainable=is_trainable,
            config=config,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            strict=strict,
            torch_device=torch_device,
            key_mapping=key_mapping,
            mmap=mmap,
            hub=hub.HubOptions.from_kwargs(hub_options),
        )
        wrapper = model_class_for(lifecycle.state_of(model).configs[adapter_name], cls).around(model, checkpointing)
        if not is_trainable:
            evaluate(wrapper)
        return wrapper

    @atomic
    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | torch.device | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        *,
        config: PeftConfig | None = None,
        strict: report.Strict = True,
        mmap: bool = False,
        **hub_options: Any,
    ) -> report.LoadReport:
        """Load another adapter of the same kind; `set_adapter` makes it the active one.

        If there is one of this name, its tensors are overwritten. Parameters are those of `from_pretrained`; as there,
        the model is put into eval mode unless `is_trainable`.

        Raises: ConfigError for one of another kind, and what `peftlite.load_adapter` raises; nothing is changed then.
        """
        LoraRuntimeConfig(ephemeral_gpu_offload)  # says that it has no effect
        if config is not None:
            check_config(config)
        loaded = adapters.load_adapter(
            self,
            model_id,
            adapter_name,
            is_trainable=is_trainable,
            config=config,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            strict=strict,
            torch_device=torch_device,
            key_mapping=key_mapping,
            mmap=mmap,
            hub=hub.HubOptions.from_kwargs(hub_options),
            admit=lambda chosen: check_kind(self, self.peft_type, chosen.peft_type),
        )
        if not is_trainable:
            evaluate(self)
        return loaded

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Collection[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | os.PathLike[str] | None = None,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write adapters to a directory: `default` into it, others into sub-directories of their names, and a card.

        Args:
            save_directory: where to; made if needed.
            safe_serialization: True; pickled files are read, never written.
            selected_adapters: which adapters; all by default.
            save_embedding_layers: whether the base model's embeddings are included. "auto": those with adapters on
                them, or all if their number of rows was changed.
            is_main_process: processes that say False write nothing.
            path_initial_model_for_weight_conversion: where the same adapter was saved before training. What training
                changed is written, as plain LoRA of twice the rank: for adapters that began with `pissa`, `olora`, ...
            state_dict: take the tensors from this state dict of the model, gathered from shards.

        Raises: NoAdapterError, AdapterNameError, CheckpointError if the file system refuses.
        """
        if not safe_serialization:
            raise UnsupportedFeatureError(
                "`safe_serialization` is `False`, which asks for a pickled file: peftlite reads those, and writes "
                "`adapter_model.safetensors` only. Nothing was written."
            )
        adapters.save_adapter(
            self,
            save_directory,
            selected_adapters=selected_adapters,
            save_embedding_layers=save_embedding_layers,
            is_main_process=is_main_process,
            path_initial_model_for_weight_conversion=path_initial_model_for_weight_conversion,
            state_dict=state_dict,
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: list[str] | None = None,
    ) -> str:
        """Upload all adapters, and a card with these `tags`, to a repository, which is made if there is none.

        Gives back the URL of the commit. An adapter is one file, so `max_shard_size` changes nothing.

        Raises: NoAdapterError, CheckpointError if the hub refuses or cannot be reached.
        """
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory)
            self.create_or_update_model_card(directory, tags)
            return hub.push_to_hub(
                directory,
                repo_id,
                commit_message=commit_message,
                commit_description=commit_description,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )

    def create_or_update_model_card(
        self, output_dir: str | os.PathLike[str], tags: Sequence[str] | None = None
    ) -> None:
        """Write the model card in a directory; of one that is there, only our part of its front matter."""
        about = adapters.card_of(self, next(iter(lifecycle.state_of(self).configs.values())))
        card.write_card(output_dir, dataclasses.replace(about, tags=tuple(tags or ())))


def model_class_for(config: PeftConfig, otherwise: type[PeftModel] = PeftModel) -> type[PeftModel]:
    """The wrapper class for a config's task, or `otherwise` without one."""
    return otherwise if config.task_type is None else TASK_MODELS[TaskType(config.task_type)]
