"""Memory that is free goes back to the system, on a CPU and not at every step."""

import pytest
import torch

from models import memory


@pytest.fixture
def trims(monkeypatch):
    calls = []
    monkeypatch.setattr(memory, "give_back_free_memory", lambda: calls.append(1))
    return calls


def test_now_and_then_on_a_cpu(trims, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(memory.time, "monotonic", lambda: now[0])
    free_memory = memory.FreeMemory(torch.device("cpu"))
    for _ in range(10):
        now[0] += 0.35 * memory.TRIM_SECONDS
        free_memory.give_back()
    assert len(trims) == 3


def test_never_on_a_gpu(trims, monkeypatch):
    monkeypatch.setattr(memory, "TRIM_SECONDS", -1)
    memory.FreeMemory(torch.device("meta")).give_back()
    assert not trims
    memory.FreeMemory(torch.device("cpu")).give_back()
    assert trims
