"""Programs written for `peft`, on the libraries above it, as they are: each runs under the stand-in."""

from __future__ import annotations

import pytest

from tests.ecosystem.programs import flow, needs_libraries


@pytest.mark.parametrize("name", ["accelerated", "adapter_directories"])
def test_a_flow_runs(name: str) -> None:
    flow(name)


@needs_libraries
@pytest.mark.parametrize("name", ["trl_sft", "trl_preferences", "sentence_transformer", "diffusion"])
def test_a_flow_with_datasets_runs(name: str) -> None:
    flow(name)
