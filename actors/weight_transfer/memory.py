"""How an engine on a CPU gets memory: from what it freed before, not from the system again and again."""

from __future__ import annotations

import ctypes

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let this process's allocator keep what is freed, for the next to ask. Returns whether it listens.

    A reload allocates and frees every layer's weights twice, once as they come and once packed for the kernels. By
    itself glibc gives large pieces back at once, and the system hands out the same pages again, cleared and one fault
    each, which takes longer than copying and packing. What is kept is at most what was once in use at a time.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library than glibc has no such function
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST))
