"""Shared by all tests: tiny models, one thread, and no network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub reads it: a test that would download fails at once

from pathlib import Path

import pytest
import torch

from tiny import build_flux, build_sd

# Tiny tensors gain nothing from a second thread, and beside other work on the machine wait for it at every kernel.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _threads() -> None:
    # Again before each test: a run, or a command, sets a number of its own.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_sd_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusionPipeline folder (epsilon, SD 1.4's PNDM scheduler). Read-only: copy before changing it."""
    return build_sd(tmp_path_factory.mktemp("models") / "tiny-sd")


@pytest.fixture(scope="session")
def tiny_flux_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FluxPipeline folder (guidance embedding, dynamic shift, as dev). Read-only: copy before changing it."""
    return build_flux(tmp_path_factory.mktemp("models") / "tiny-flux")
