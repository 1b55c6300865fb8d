"""How much memory this process takes, of the GPU or else of main memory."""

import ctypes
import gc
import resource
import sys
import threading
import time

import psutil
import torch

TRIM_SECONDS = 30


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def give_back_free_memory() -> None:
    """Gives main memory that is free but kept back to the system, where the C library can (glibc)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


class FreeMemory:
    """Gives it back now and then.

    Micro-batches of ever other sizes leave gaps in the heap: after some hundred steps on a CPU, several times what a
    step needs. It takes a tenth of a second.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_cpu, self._last = device.type == "cpu", time.monotonic()

    def give_back(self) -> None:
        """Does so on a CPU, if it was not done in the last TRIM_SECONDS."""
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
