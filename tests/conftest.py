"""One thread, fixed seeds, no network; a fixture for each tiny model."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub when it is imported: set before anything below
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import random
from typing import Any

import pytest
import torch
from hypothesis import settings

from tests.models import tiny

torch.set_num_threads(1)
settings.register_profile("repeatable", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers for a test, whichever tests ran before it."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def llama() -> Any:
    return tiny("llama")


@pytest.fixture
def gpt2() -> Any:
    return tiny("gpt2")


@pytest.fixture
def bert() -> Any:
    return tiny("bert")


@pytest.fixture
def t5() -> Any:
    return tiny("t5")


@pytest.fixture
def opt() -> Any:
    return tiny("opt")
