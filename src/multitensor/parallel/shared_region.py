"""Memory that several processes map, with no name that could be left behind (never imports torch).

The engine makes a region with memfd_create; ranks get the file descriptor, inherited or over a Unix socket. When the
last process that holds it is gone, however it went, the kernel frees it.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os

LINE = 128  # bytes: a cache line and its prefetched neighbour, so that two ranks' flags never share one


class SharedRegion:
    """A mapped memfd. `map` serves as a buffer; `address` is where it begins in this process."""

    def __init__(self, fd: int) -> None:
        """Takes over `fd`, which must be a memfd of a size above zero."""
        self.fd = fd
        self.size = os.fstat(fd).st_size
        self.map = mmap.mmap(fd, self.size)
        # The ctypes object must not outlive this line: while it does, the map cannot be closed.
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self._views: list[memoryview] = []

    @classmethod
    def create(cls, name: str, size: int) -> SharedRegion:
        """`size` bytes of zeros; pages that nobody touches take no memory. `name` only shows up in /proc/PID/maps."""
        fd = os.memfd_create(f"multitensor-{name}", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        return cls(fd)

    def view(self, offset: int, nbytes: int, kind: str) -> memoryview:
        """A view of items of struct format `kind` ("I" uint32, "Q" uint64, "B" bytes) over [offset, offset + nbytes).
        Reading or writing one aligned item is a single load or store."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise ValueError(f"[{offset}, {offset + nbytes}) is outside a shared region of {self.size} bytes")
        whole = memoryview(self.map)
        part = whole[offset : offset + nbytes]
        view = part.cast(kind)  # type: ignore[call-overload]
        self._views += [view, part, whole]
        return view

    def close(self) -> None:
        """Unmaps and closes; safe to call twice. Views become unusable. If torch still looks into the memory the map
        stays until the process ends, the descriptor does not."""
        for view in self._views:
            view.release()
        self._views.clear()
        with contextlib.suppress(BufferError):
            self.map.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
