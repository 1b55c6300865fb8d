"""How much memory a model takes, and how much there is: of the GPU, or on a CPU main memory."""

import ctypes
import gc
import resource
import sys
import threading
import time

import psutil
import torch

from utils import InputError

TRIM_SECONDS = 30
BYTES_LOADED, BYTES_TRAINED = 4, 16  # a parameter takes: its weight; beside it the gradient and Adam's two moments


def check_memory(what: str, device: torch.device, loaded: int = 0, trained: int = 0) -> None:
    """Raises InputError if this many parameters alone, before anything is computed, take more memory than is free."""
    needed, free = BYTES_LOADED * loaded + BYTES_TRAINED * trained, available_memory(device)
    if needed > free:
        raise InputError(
            f"{what}: {needed / 1e9:,.1f} GB of memory are needed, but {free / 1e9:,.1f} are free on the "
            f"{'CPU' if device.type == 'cpu' else 'GPU'}; choose a smaller model."
        )


def default_tokens_per_micro_batch(device: torch.device) -> int:
    """On a GPU one token for each 4 MiB of its memory: several times what a BERT-base and its student need."""
    if device.type == "cpu":
        return 1024
    return min(torch.cuda.get_device_properties(device).total_memory >> 22, 32768)


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def give_back_free_memory() -> None:
    """Gives main memory that is free but kept back to the system, where the C library can (glibc)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


class FreeMemory:
    """Gives free main memory back now and then.

    Micro-batches of changing sizes leave gaps in the heap: after some hundred steps on a CPU, several times what a
    step needs. It takes a tenth of a second.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_cpu, self._last = device.type == "cpu", time.monotonic()

    def give_back(self) -> None:
        """On a CPU, unless it did so within the last TRIM_SECONDS."""
        if self.on_cpu and time.monotonic() - self._last > TRIM_SECONDS:
            give_back_free_memory()
            self._last = time.monotonic()


def available_memory(device: torch.device) -> int:
    """Bytes that could still be taken."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for reuse
        return free + kept
    return psutil.virtual_memory().available


class PeakAbove(threading.Thread):
    """The peak within a `with` block above what was held before it: `bytes`, known afterwards.

    Main memory is looked at every 2 ms from a thread; a GPU's allocator keeps the figure itself.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(daemon=True)
        self.device, self.process, self.ended = device, psutil.Process(), threading.Event()

    def __enter__(self) -> "PeakAbove":
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
            return self
        give_back_free_memory()  # what is free but kept would hide what the block takes
        self.before = self.peak = self.process.memory_info().rss
        self.start()
        return self

    def run(self) -> None:
        while not self.ended.wait(0.002):
            self.peak = max(self.peak, self.process.memory_info().rss)

    def __exit__(self, *_) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.before
            return
        self.ended.set()
        self.join()
        self.bytes = self.peak - self.before
