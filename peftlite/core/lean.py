"""Adapters' small modules, without the dicts for hooks until someone asks for them.

A model with a thousand adapters has hundreds of thousands of small modules. Of each, torch makes a dozen empty dicts at
once, of 1.7 KiB together: several times what a factor of low rank takes, and most of the time of making one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final

from torch import Tensor, nn
from torch.nn.modules import module as torch_module


class _Changes:
    """When, last, any lean module got what its calls look at: a dict for hooks, or a `forward` of its own."""

    def __init__(self) -> None:
        self.mark: list[object] = []  # another one each time; a list, which torch.compile can make


class _Late:
    """An attribute that is made when it is first read, and is an instance's own from then on."""

    def __init__(self, name: str, make: Callable[[], Any]) -> None:
        self.name = name
        self.make = make

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Any:
        if module is None:
            return self
        made = module.__dict__.setdefault(self.name, self.make())  # two threads may ask at once
        if self.name in _LOOKED_AT:
            _changes.mark = []
        return made


class Lean(nn.Module):
    """An `nn.Module` like any other, with fewer dicts at first."""

    def __init__(self) -> None:
        self.__dict__.update(_AT_ONCE, _parameters={}, _buffers={}, _modules={})

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "training" and isinstance(value, bool):  # the mode, also where an adapter has this name
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)
            if name in _LOOKED_AT:
                _changes.mark = []

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


_changes: Final = _Changes()
_FRESH: Final = vars(nn.Module())
_OF_CALLS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LOOKED_AT: Final = (*_OF_CALLS, "forward")
_OF_ALL_MODULES: Final = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)
_HELD: Final = ("_parameters", "_buffers", "_modules")
_AT_ONCE: Final = {k: v for k, v in _FRESH.items() if not isinstance(v, (dict, set))}
for _name, _value in _FRESH.items():
    if isinstance(_value, (OrderedDict, set)) and _name not in _HELD:
        setattr(Lean, _name, _Late(_name, type(_value)))


class Linear(Lean, nn.Linear):
    """An `nn.Linear` around existing tensors. weight: (out, in)."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        Lean.__init__(self)
        out, into = weight.shape
        self.__dict__.update(in_features=into, out_features=out)
        self._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        self._parameters["bias"] = None if bias is None else nn.Parameter(bias, requires_grad=False)


class Dropout(Lean, nn.Dropout):
    """An `nn.Dropout`."""

    def __init__(self, p: float) -> None:
        Lean.__init__(self)
        self.__dict__.update(p=p, inplace=False)


class Identity(Lean, nn.Identity):
    """An `nn.Identity`."""


Seen = tuple[list[object], tuple[dict[int, Any], ...], tuple[dict[str, Any], ...]]
"""When, the dicts for hooks that there are, the attributes of modules that have or may get a `forward` of their own."""

_NEVER: Final[Seen] = [], (), ()


class Parts:
    """Modules whose formula may be used in place of calling them, as long as nobody has put anything in the way.

    Lean modules say when there is something new to look at, so that a thousand of them take no longer than one.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self.modules = modules
        self.own = tuple([module.__dict__ for module in modules])
        self.seen: Seen = _NEVER

    def look(self) -> Seen:
        """What calls of the modules would look at."""
        mark = _changes.mark  # before looking: another thread may change something meanwhile
        lean = [module.__dict__ for module in self.modules if isinstance(module, Lean)]
        others = [module.__dict__ for module in self.modules if not isinstance(module, Lean)]
        hooks = [own[kind] for own in (*others, *lean) for kind in _OF_CALLS if kind in own]
        patched = [own for own in lean if "forward" in own]
        return mark, (*hooks, *_OF_ALL_MODULES), (*others, *patched)

    def touched(self, compiling: bool = False) -> bool:
        """Whether hooks are registered, on a module or on all, or a `forward` is patched onto one."""
        if compiling:  # what is kept would be guarded; of what is looked up in modules, torch.compile guards nothing
            _, hooks, _ = self.look()
            patched = self.own  # but `forward` in these, as torch does
        else:
            mark, hooks, patched = self.seen  # at once: threads share this object
            if mark is not _changes.mark:
                self.seen = _, hooks, patched = self.look()
        if any(hooks):
            return True
        for own in patched:  # noqa: SIM110  (half the time of `any`)
            if "forward" in own:
                return True
        return False


LINEARS: Final = (Linear, nn.Linear)
DROPOUTS: Final = (Dropout, nn.Dropout)
IDENTITIES: Final = (Identity, nn.Identity)


def dropout(p: float) -> nn.Module:
    """What drops inputs with this probability."""
    return Dropout(p) if p else Identity()
