"""Modules trained whole: a full copy per adapter, in the original's place while that adapter is active."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from peftlite.config import TaskType
from peftlite.core.hosts import Host, host_for
from peftlite.core.residency import near_copy
from peftlite.core.slots import ModuleSlot, Slot, View, is_floating
from peftlite.core.variant import Companion, Placement, Program, TunerSpec, Variant, register_companion

TASK_HEADS: dict[str, tuple[str, ...]] = {
    TaskType.SEQ_CLS.value: ("classifier", "score"),
    TaskType.TOKEN_CLS.value: ("classifier", "score"),
    TaskType.QUESTION_ANS.value: ("qa_outputs",),
}
"""Freshly initialised heads, which a task cannot do without training."""

NEVER_CALLED = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class ModulesToSave(Variant):
    """The module's own full copy in its place. The copy keeps the base module's dtype."""

    mergeable = False
    exclusive = True

    def check(self, host: Host, config: Any, path: str) -> str | None:
        if isinstance(host.layer, NEVER_CALLED):
            return f"a {type(host.layer).__name__} is not called itself: name what is in it"
        frozen = next((p for p in host.layer.parameters() if not is_floating(p)), None)
        packed = host_for(host.layer)
        if frozen is None and not (packed is not None and packed.packed):
            return None
        return "it is quantised, and numbers that are not floating-point cannot be trained"

    def init(self, host: Host, at: Placement) -> dict[str, Any]:
        copied = without_memory if at.device.type == "meta" else near_copy
        return {"modules_to_save": copied(host.layer)}

    def why_not_follow(self, host: Host, leader: Host, config: Any, paths: tuple[str, str]) -> str | None:
        return None

    def follow(self, host: Host, leader: View) -> dict[str, Any]:
        """A copy of the layer, but for the shared weight: that is the leader's copy's."""
        theirs: Host = leader.layer.host
        copied = getattr(leader.modules_to_save, theirs.param)
        module = copy.deepcopy(host.layer, {id(host.parameter): copied})
        return {"modules_to_save": module.to("meta") if copied.is_meta else module}

    def led(self, host: Host, leader: Host, suffix: str) -> tuple[str, bool] | None:
        return (leader.param, False) if suffix == host.param else None

    def size(self, host: Host, config: Any, path: str) -> tuple[int | None, int]:
        return None, sum(p.numel() for p in host.layer.parameters())

    def forward(self, a: View, call: Program, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.replacement(a)(x, *args, **kwargs)

    def bind(self, a: View, slow: Program) -> Program | None:
        return self.replacement(a)

    def replacement(self, a: View) -> nn.Module:
        module: nn.Module = a.modules_to_save
        return module


def without_memory(module: nn.Module) -> nn.Module:
    """A copy on the meta device; not made by way of a copy with memory, since heads can be large."""
    parameters = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in module.parameters()}
    buffers = {id(b): b.detach().to("meta") for b in module.buffers()}
    return copy.deepcopy(module, {**parameters, **buffers})


def saved_with(config: Any) -> tuple[str, ...]:
    """The modules that a config asks to be trained whole."""
    return tuple(getattr(config, "modules_to_save", None) or ())


def task_heads(config: Any) -> tuple[str, ...]:
    """The heads that come along with a config's task, where the model has them."""
    task = getattr(config, "task_type", None)
    return TASK_HEADS.get(getattr(task, "value", task) or "", ())


_VARIANT = ModulesToSave()

MODULES_TO_SAVE = register_companion(
    Companion(
        tuner=TunerSpec(
            peft_type="MODULES_TO_SAVE",
            slots=(Slot("modules_to_save", ModuleSlot, file_name=""),),
            variant_for=lambda config: _VARIANT,
            label=lambda host: "ModulesToSaveWrapper",
            base_slot="original_module",
            any_module=True,
        ),
        field="modules_to_save",
        targets=saved_with,
        optional=task_heads,
    )
)
