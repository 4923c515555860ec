"""The contract's rows as a page of the documentation: `python -m tests.contract.render > docs/supported.md`."""

from __future__ import annotations

from tests.contract.rows import DTYPES, KINDS, TUNERS, UNMERGEABLE, UNSUPPORTED

HEAD = f"""# What is supported

Every cell below is tested against the same laws. In {", ".join(DTYPES)}, on quantised layers too: a fresh adapter is
the identity, the merged weight gives the same outputs (within the dtype's rounding of float64 truth), unmerging gives
every bit back, disabled equals the base model, gradients reach the active adapter only. In one of these dtypes per
cell, in turn: files round-trip in both shapes, failed calls change nothing, copies, pickles, threads, hooks, gradient
checkpointing and `torch.compile` work.

`yes`: all of it. `no merge`: the effect cannot be written into the base layer, and merging is refused by name. `-`: the
plan refuses the combination by name.

`conv1d` is the layer of transformers, `conv1d-torch` that of torch; `attention` is `nn.MultiheadAttention`, `parameter`
a bare matrix and `experts` a stack of them, both adapted by `target_parameters`.

Three forms of LoRA are not here, since these laws are about single layers that keep their weight:
`alora_invocation_tokens` and `arrow_config` look at whole calls and at other adapters, and `"loftq"` rounds the base
layer. They have tests of their own, and so has LayerNorm tuning, which puts a copy in the place of any module.
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
