"""Fixtures that all tests share."""

import logging

import pytest
import torch

from tests.support.ranks import RankPool


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors gain nothing from threads, and results should not depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def quiet_lightning():
    """Every Trainer announces its devices."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


@pytest.fixture
def differentiations(monkeypatch):
    """One entry for every call of ``torch.autograd.grad`` with respect to several tensors, such as parameters."""
    calls = []
    original = torch.autograd.grad

    def counted(*args, **kwargs):
        if not isinstance(args[1], torch.Tensor):
            calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    return calls


@pytest.fixture(scope="session")
def ranks():
    """Two processes that train together."""
    pool = RankPool()
    yield pool
    pool.close()
