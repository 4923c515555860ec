"""The contract's rows as a page of the documentation: `python -m tests.contract.render > docs/supported.md`."""

from __future__ import annotations

from tests.contract.rows import DTYPES, KINDS, TUNERS, UNMERGEABLE, UNSUPPORTED

HEAD = f"""# What is supported

Every cell below is tested against the same laws ({", ".join(DTYPES)}; quantised layers in the dtypes that they compute
in): a fresh adapter is the identity, the merged weight gives the same outputs, unmerging gives every bit back, disabled
equals the base model, files round-trip in both shapes, gradients reach the active adapter only, failed calls change
nothing, copies, pickles, threads, gradient checkpointing and `torch.compile` work.

`yes`: all of it. `no merge`: the effect cannot be written into the base layer, and merging is refused by name. `-`: the
plan refuses the combination by name.
"""


def page() -> str:
    """The whole page."""
    lines = [HEAD, f"| | {' | '.join(KINDS)} |", f"|---|{'---|' * len(KINDS)}"]
    lines += [f"| {tuner} | {' | '.join(cell(tuner, kind) for kind in KINDS)} |" for tuner in TUNERS]
    return "\n".join(lines) + "\n"


def cell(tuner: str, kind: str) -> str:
    if (tuner, kind) in UNSUPPORTED:
        return "-"
    return "no merge" if (tuner, kind) in UNMERGEABLE else "yes"


if __name__ == "__main__":
    print(page(), end="")
