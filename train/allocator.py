"""Memory of tensors on a CPU, kept by the process from one step to the next."""

from __future__ import annotations

import ctypes
import sys

# glibc's malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
AT_ONCE = 64 * 2**20  # bytes that the heap grows by


def keep_memory() -> None:
    """Has glibc give no memory back: a large tensor's would else come anew from the kernel at each allocation, which
    zeroes it page by page (mallopt(3)). Its cost: the process stays as large as it has been. Elsewhere: nothing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_TOP_PAD, AT_ONCE)
