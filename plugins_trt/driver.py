"""Launch a kernel of a PTX file through the CUDA driver: nothing but Python's standard library and the driver.

This file also stands beside the plugins that tokcc writes, where it is imported by those that run in Python.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

__all__ = ["DriverError", "Kernel", "libcuda"]


class DriverError(RuntimeError):
    """A call of the CUDA driver failed."""


def libcuda() -> Any:
    """Return the driver's library.

    Raises:
        DriverError: There is none.
    """
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DriverError(f"no CUDA driver: {error}") from error
    return library


class Kernel:
    """A kernel, loaded on its first launch in a context.

    Args:
        ptx: The text.
        name: The kernel's name in it.
        library: The driver; None for the one that is installed.
    """

    def __init__(self, ptx: bytes, name: str, library: Any = None) -> None:
        self.ptx = ptx
        self.name = name
        self._library = library
        self._loaded: dict[int, ctypes.c_void_p] = {}

    def launch(
        self,
        grid: Sequence[int],
        threads: int,
        shared: int,
        stream: int,
        inputs: Sequence[int],
        sizes: Sequence[int],
        outputs: Sequence[int],
    ) -> None:
        """Launch with the arguments of a plugin: pointers in, 32-bit sizes, pointers out. An empty grid does nothing.

        Args:
            grid: Blocks on x, y and z.
            threads: Threads of a block.
            shared: Bytes of shared memory of a block.
            stream: The stream's handle.
            inputs: Addresses.
            sizes: Numbers.
            outputs: Addresses.

        Raises:
            DriverError: The driver refuses.
        """
        if 0 in grid:
            return
        values = [
            *(ctypes.c_uint64(pointer) for pointer in inputs),
            *(ctypes.c_int32(size) for size in sizes),
            *(ctypes.c_uint64(pointer) for pointer in outputs),
        ]
        arguments = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        function = self._function()
        self._call(
            "cuLaunchKernel",
            function,
            *(ctypes.c_uint(n) for n in (*grid, threads, 1, 1, shared)),
            ctypes.c_void_p(stream),
            arguments,
            None,
        )

    def _function(self) -> ctypes.c_void_p:
        context = ctypes.c_void_p()
        self._call("cuCtxGetCurrent", ctypes.byref(context))
        if context.value is None:
            raise DriverError(f"{self.name}: no CUDA context is current")
        if context.value not in self._loaded:
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            self._call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(self.ptx))
            self._call("cuModuleGetFunction", ctypes.byref(function), module, ctypes.c_char_p(self.name.encode()))
            self._loaded[context.value] = function
        return self._loaded[context.value]

    def _call(self, name: str, *arguments: Any) -> None:
        if self._library is None:
            self._library = libcuda()
        code = getattr(self._library, name)(*arguments)
        if code:
            raise DriverError(f"{self.name}: {name} failed with CUDA error {code}")
