"""Whether somebody else wrote to tensors that adapters are merged into.

Merging itself writes through `.data`, which torch does not count; `load_state_dict`, optimizers and whatever else
writes to a parameter are counted, in `_version`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from peftlite.core.hosts import Dense, Host

Stamp = Mapping[str, tuple[int, int]]
"""Name of a parameter -> which object it is, and how often it was written to."""


def stamp(host: Host) -> Stamp | None:
    """What the host's parameters are now; None for packed ones, which are replaced and never written into."""
    if host.packed:
        return None
    found = {name: getattr(host.layer, name) for name in host.written}
    return {n: (id(p), p._version) for n, p in found.items() if isinstance(p, Tensor) and not p.is_inference()}


def written_since(before: Stamp, now: Stamp | None) -> bool:
    """Whether a parameter that still is the same object was written to."""
    both = before.keys() & (now or {}).keys()
    return now is not None and any(before[n][0] == now[n][0] and before[n][1] != now[n][1] for n in both)


def holds(present: Dense, merged: Dense) -> bool:
    """Whether a layer's weight and bias are what merging gives, rounded to its dtype."""
    pairs = ((present.weight, merged.weight), (present.bias, merged.bias))
    return all(ours is None or wanted is None or torch.equal(ours, wanted.to(ours.dtype)) for ours, wanted in pairs)


@torch.no_grad()
def differ(ours: Tensor, theirs: object) -> bool:
    """Whether loading `theirs` into `ours` would change it, so far as there are numbers to compare."""
    if not isinstance(theirs, Tensor) or ours.is_meta or theirs.is_meta or ours.shape != theirs.shape:
        return False
    return not torch.equal(ours, theirs.to(ours))
