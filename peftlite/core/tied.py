"""The side of an adapter layer that knows of other layers on the same weight.

Of an adapter that is theirs together (`ensure_weight_tying`), one layer, the leader, has the tensors; the others
follow: their tensors are the leader's, as seen from their side of the weight. It is merged once, by the leader, and the
others take over the weight that it was merged into, which so stays one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from peftlite.core.hosts import Saved
from peftlite.core.merging import MergingLayer
from peftlite.core.residency import is_away, near
from peftlite.core.transaction import drop, put


class TiedLayer(MergingLayer):
    """An adapter layer whose adapters may be those of another layer."""

    leaders: dict[str, Any]
    """Adapter -> the layer that has its tensors, of adapters that are another layer's."""
    followers: dict[str, list[Any]]
    """Adapter -> the other layers that it is on, of adapters whose tensors are here."""

    @contextmanager
    def here(self) -> Iterator[None]:
        with ExitStack() as stack:
            for leader in set(self.leaders.values()):
                stack.enter_context(near(leader))
            stack.enter_context(near(self))
            yield

    def leader_of(self, names: Sequence[str]) -> TiedLayer | None:
        """The layer whose weight is what merging exactly these adapters would give here; None if there is none."""
        leader: TiedLayer | None = self.leaders.get(names[0]) if names else None
        same = leader is not None and all(self.leaders.get(name) is leader for name in names)
        if not same or leader is None or is_away(leader.get_base_layer()):
            return None
        return leader if leader.merged_adapters == list(names) else None

    def _save(self, names: Sequence[str], away: bool) -> Saved:
        if self.leader_of(names) is not None:  # no copy: the leader has one
            return Saved(self.host.parameter, self.host.bias, shared=True)
        return super()._save(names, away)

    def _write_merged(self, names: list[str]) -> None:
        saved = self._saved
        leader = self.leader_of(names) if self._more(names) else None
        if leader is not None:
            setattr(self.host.layer, self.host.param, leader.host.parameter)
            self.__dict__.update(merged_adapters=names, merge_error=None)
            return
        if self._more(names) and saved.shared and (self.leaders or self.followers):  # others may have the present one
            self.host.put_copies(saved)
        super()._write_merged(names)

    def untie(self, name: str) -> None:
        """Forget that an adapter, which is being removed, is shared with other layers."""
        leader = self.leaders.get(name)
        drop(self.leaders, name)
        if leader is not None and self in leader.followers.get(name, ()):
            put(leader.followers, name, [one for one in leader.followers[name] if one is not self])
        drop(self.followers, name)
