"""A module around a model with adapters: calls pass through, the lifecycle of its adapters are methods."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from peftlite.config import PeftConfig, PeftType
from peftlite.core import leaving, lifecycle
from peftlite.core.call import Call
from peftlite.core.merging import Undo
from peftlite.core.transaction import keep, keep_all
from peftlite.core.tree import Shell, base_model_of, find_state
from peftlite.errors import ConfigError, StateError
from peftlite.registry import later

if TYPE_CHECKING:
    from peftlite import convert
else:
    convert = later("peftlite.convert")


class Wrapper(Shell):
    """A module around another one: calls and attributes pass through, the lifecycle of its adapters are methods."""

    inside: ClassVar[str]
    """The name under which the wrapped module is registered."""

    def inner(self) -> nn.Module:
        module: Any = self._modules[self.inside]
        return module  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == self.inside or self.inside not in self.__dict__.get("_modules", ()):
                raise
            return getattr(self.inner(), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner()(*args, **kwargs)

    # ---- what there is
    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The config of each adapter."""
        state = find_state(self)
        return {} if state is None else state.configs

    @property
    def active_adapters(self) -> list[str]:
        """The names of the adapters in use."""
        state = find_state(self)
        return [] if state is None else list(state.active)

    # ---- which are in use
    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Use these adapters, and no others, from now on; see `peftlite.set_adapter`."""
        lifecycle.set_adapter(self, adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Whether these adapters may train: their parameters require gradients while they are active."""
        lifecycle.set_requires_grad(self, adapter_names, requires_grad)

    def enable_adapter_layers(self) -> None:
        """Switch the adapters on again."""
        lifecycle.enable_adapters(self)

    def disable_adapter_layers(self) -> None:
        """Switch all adapters off until `enable_adapter_layers`."""
        lifecycle.disable_adapters(self)

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Calls inside the `with` block run on the base model; afterwards everything is as it was."""
        return lifecycle.disable_adapter(self)

    def use_adapter(self, *adapter_names: str) -> AbstractContextManager[Call]:
        """Calls that this thread makes inside the `with` block use these adapters; nothing is written to the model."""
        return lifecycle.use_adapter(self, *adapter_names)

    def scale_adapter(self, adapter_name: str, factor: float) -> None:
        """Multiply one adapter's scaling by `factor` on every layer."""
        lifecycle.scale_adapter(self, adapter_name, factor)

    # ---- merging and leaving
    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False, *, undo: Undo = "device"
    ) -> None:
        """Merge adapters (default: the active ones) into the base weights; see `peftlite.merge_adapter`."""
        lifecycle.merge_adapter(self, adapter_names, safe_merge, undo=undo)

    def unmerge_adapter(self, adapter_names: Sequence[str] | None = None) -> None:
        """Take adapters (default: all) out of the base weights again, bit for bit."""
        lifecycle.unmerge_adapter(self, adapter_names)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        *,
        dequantize: bool = False,
        undo: Undo = None,
    ) -> nn.Module:
        """Merge adapters (default: the active ones) for good and give back the base model, without adapter layers.

        With `dequantize`, quantised layers become dense ones; see `peftlite.merge_and_unload`.
        """
        return leaving.merge_and_unload(self, progressbar, safe_merge, adapter_names, dequantize=dequantize, undo=undo)

    def unload(self) -> nn.Module:
        """Give back the base model as it was, without adapter layers."""
        return leaving.unload(self)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from every layer; see `peftlite.delete_adapter`."""
        leaving.delete_adapter(self, adapter_name)

    # ---- becoming LoRA
    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `peftlite.convert_to_lora` can make a LoRA of an adapter.

        Raises: AdapterNameError, NoAdapterError.
        """
        return convert.supports_lora_conversion(self, adapter_name)


def check_bare(model: nn.Module) -> None:
    """Refuse to wrap what is wrapped, or has adapters.

    Raises: StateError.
    """
    if isinstance(model, Shell):
        raise StateError(
            f"`{type(model).__name__}` is a wrapper already: call its `add_adapter` (or `load_adapter`) for another "
            "adapter, or wrap the base model that its `unload` gives. Nothing was changed."
        )
    state = find_state(model)
    if state is not None:
        names = ", ".join(f"`{name}`" for name in state.configs)
        raise StateError(
            f"{type(base_model_of(model)).__name__} has adapters already ({names}): call `peftlite.wrap(model)` for a "
            "wrapper around it, and `add_adapter` or `load_adapter` on that for another adapter. Nothing was changed."
        )


def is_checkpointing(model: nn.Module) -> bool:
    """Whether a model of transformers recomputes activations; it asks all of its modules."""
    checkpointing = getattr(model, "is_activation_checkpointing", None)  # in older versions `is_gradient_checkpointing`
    return bool(getattr(model, "is_gradient_checkpointing", False) if checkpointing is None else checkpointing)


def require_gradients_of_inputs(model: nn.Module) -> None:
    """Have the embeddings' output require gradients: under gradient checkpointing, no layer would get any otherwise."""
    keep(model.__dict__, "_require_grads_hook", "_require_grads_hooks")
    for module in model.modules():
        keep_all(module._forward_hooks)
    if (enable := getattr(model, "enable_input_require_grads", None)) is not None:
        enable()
    elif (embeddings := getattr(model, "get_input_embeddings", None)) is not None:
        embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))


def check_kind(wrapper: Wrapper, kind: PeftType, given: object) -> None:
    """Refuse adapters of another kind than a wrapper's.

    Raises: ConfigError.
    """
    found = str(getattr(given, "value", given))
    if found != kind.value:
        raise ConfigError(
            f"`peft_type={found!r}`: a {type(wrapper).__name__} whose adapters are of the kind `{kind.value}` takes no "
            "other. Nothing was changed."
        )
