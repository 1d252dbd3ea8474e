"""Fixtures for tests of models: functions of `helpers/family_models.py`.

Nothing large is imported here, since the process that hands tests to the workers of xdist reads this file before it
starts them.
"""

import gc
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from tcopilot.data.batch import Batch

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from tests that need none: they are alike everywhere, and a process that used one cannot be forked."""
    if "not gpu" in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_finish() -> None:
    """One thread for each process, and no warnings of transformers among what tests read.

    The million objects that imports have made are taken from the garbage collector, which would look at them again
    and again, and would make every forked process copy the memory that holds them.
    """
    import torch
    from transformers import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    gc.collect()
    gc.freeze()


@pytest.fixture
def tiny_pilot() -> "Callable[..., PreTrainedModel]":
    """Build a tiny Pilot of a family."""
    from family_models import tiny_pilot

    return tiny_pilot


@pytest.fixture
def randomise() -> "Callable[..., nn.Module]":
    """Move every parameter of a Copilot, so that its corrections are not zero."""
    from family_models import perturb

    return perturb


@pytest.fixture
def prompts() -> "Callable[..., dict[str, torch.Tensor]]":
    """Make three prompts for a Pilot, of different lengths if asked."""
    from family_models import prompts

    return prompts


@pytest.fixture
def make_batch() -> "Callable[..., Batch]":
    """Make a batch of three rows for a Pilot."""
    from family_models import make_batch

    return make_batch
