"""Memory-mapped arrays that keep no descriptor open, so that a run may have any number of datasets.

numpy.memmap keeps one for each array (before Python 3.13 its `mmap` always does), and a blend of 75 datasets had more
than the 1,024 that a process may usually have.
"""

import ctypes
import mmap
import os
import weakref

import numpy

_FAILED = ctypes.c_void_p(-1).value
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def map_array(path: str, dtype: numpy.dtype | type, shape: tuple[int, ...], offset: int = 0) -> numpy.ndarray:
    """An array of this shape, read-only, that begins `offset` bytes into the file. OSError where that cannot be read,
    ValueError where the file ends before the array does."""
    size = int(numpy.prod(shape)) * numpy.dtype(dtype).itemsize
    return _map_file(path)[offset : offset + size].view(dtype).reshape(shape)


def _map_file(path: str) -> numpy.ndarray:
    """[bytes], uint8: the whole file, unmapped when the last array on it has gone."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:  # which cannot be mapped
            return numpy.empty(0, dtype=numpy.uint8)
        address = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    content = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(content, _LIBC.munmap, address, size).atexit = False  # the process takes it along
    array = numpy.frombuffer(memoryview(content), dtype=numpy.uint8)
    array.flags.writeable = False
    return array
