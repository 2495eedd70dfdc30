"""Where glibc keeps the memory of CPU tensors that were freed."""

import ctypes
import platform
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST = 32 << 20  # what M_MMAP_THRESHOLD may be
KEPT = 1 << 30


def keep_freed_memory() -> None:
    """Freed blocks of up to 32 MiB stay with the process, as long as no more than 1 GiB of them lies at the end.

    Of itself glibc gives each block of 128 KiB or more back to the system at once, and gets it again with all its pages
    to be cleared. Only on Linux with glibc; what MALLOC_... variables of the environment say goes first.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    for option, value in (M_MMAP_THRESHOLD, LARGEST), (M_TRIM_THRESHOLD, KEPT):
        mallopt(option, value)
