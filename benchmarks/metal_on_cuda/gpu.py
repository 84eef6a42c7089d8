"""An NVIDIA GPU that runs plans of Metal kernels, through CUDA's driver library alone."""

import ctypes
import functools
import os
import statistics
from typing import Any

import numpy as np
import nvrtc

Array = np.ndarray[Any, Any]
_ATTRIBUTES = {"major": 75, "minor": 76}

# Four 16-byte loads of a thread in flight, a block's neighbours side by side.
_COPY = """
extern "C" __global__ void copy(uint4* to, const uint4* from, unsigned long count) {
  const unsigned long stride = gridDim.x * 1024ul;
  for (unsigned long at = blockIdx.x * 1024ul + threadIdx.x; at < count; at += stride) {
    uint4 part[4];
    for (int i = 0; i < 4; ++i) if (at + 256 * i < count) part[i] = from[at + 256 * i];
    for (int i = 0; i < 4; ++i) if (at + 256 * i < count) to[at + 256 * i] = part[i];
  }
}
"""


class CudaError(RuntimeError):
    pass


class Gpu:
    """The first GPU: a Device of tests/metal/gpu_plans.py."""

    def __init__(self) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._call("cuInit", 0)
        device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        self.stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(self.stream), 1)
        name = ctypes.create_string_buffer(100)
        self._call("cuDeviceGetName", name, 100, device)
        self.name = name.value.decode()
        version = {}
        for key, attribute in _ATTRIBUTES.items():
            value = ctypes.c_int()
            self._call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
            version[key] = value.value
        self._architecture = f"sm_{version['major']}{version['minor']}"

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(code, ctypes.byref(text))
            raise CudaError(f"{name}: {(text.value or b'unknown error').decode()} ({code})")

    # ---- memory -------------------------------------------------------------------------------

    def allocate(self, size: int) -> int:
        """Device memory, not cleared."""
        pointer = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(size, 16)))
        return pointer.value

    def upload(self, address: int, array: Array) -> None:
        """With FLASHMOE_INITCHECK, an array of NaNs that may be written is left without content, so
        that compute-sanitizer's initcheck sees who reads it.
        """
        output = array.dtype == np.float32 and array.flags.writeable
        empty = "FLASHMOE_INITCHECK" in os.environ and output
        if array.nbytes and not (empty and np.isnan(array).all()):
            data = np.ascontiguousarray(array)
            self._call(
                "cuMemcpyHtoD_v2",
                ctypes.c_uint64(address),
                data.ctypes.data_as(ctypes.c_void_p),
                ctypes.c_size_t(data.nbytes),
            )
            # The call may return before the bytes are there, and the stream does not wait for it.
            self._call("cuCtxSynchronize")

    def download(self, address: int, array: Array) -> None:
        self._call(
            "cuMemcpyDtoH_v2",
            array.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_uint64(address),
            ctypes.c_size_t(array.nbytes),
        )

    def free(self, pointer: int) -> None:
        self._call("cuMemFree_v2", ctypes.c_uint64(pointer))

    def copy(self, to: int, source: int, size: int) -> None:
        """Device to device, in the stream, by a kernel; `size` is rounded down to 16 bytes."""
        values = [ctypes.c_uint64(to), ctypes.c_uint64(source), ctypes.c_uint64(size // 16)]
        addresses = (ctypes.c_void_p * 3)(*(ctypes.addressof(v) for v in values))
        blocks = min(1 << 16, size // 16 // 1024 + 1)
        function = self._load(nvrtc.compile_source(_COPY, self._architecture), "copy")
        self._call(
            "cuLaunchKernel", function, blocks, 1, 1, 256, 1, 1, 0, self.stream, addresses, None
        )

    # ---- kernels ------------------------------------------------------------------------------

    @functools.cache  # noqa: B019  (there is one Gpu, for the life of the program)
    def _function(self, kernel: str, constants: tuple[int, ...]) -> ctypes.c_void_p:
        file = nvrtc.kernels()[kernel][0].name
        image = nvrtc.compile_kernels(file, constants, self._architecture)
        return self._load(image, f"cuda_{kernel}")

    @functools.cache  # noqa: B019
    def _load(self, image: bytes, name: str) -> ctypes.c_void_p:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), image)
        self._call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
        return function

    def launch(self, plan: Any, seed: int = 0) -> None:
        """Queues a plan; `seed` means nothing."""
        del seed
        function = self._function(plan.kernel, tuple(plan.constants))
        arguments = ctypes.create_string_buffer(plan.arguments, len(plan.arguments))
        addresses = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        self._call(
            "cuLaunchKernel",
            function,
            *plan.grid,
            plan.threads,
            1,
            1,
            0,
            self.stream,
            addresses,
            None,
        )

    def synchronize(self) -> None:
        self._call("cuStreamSynchronize", self.stream)

    # ---- time ---------------------------------------------------------------------------------

    def seconds(self, work: Any, repeats: int = 7) -> float:
        """The median time of work(), which queues in the stream, replayed as one graph."""
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        work()  # compiles what is new, which capturing does not allow
        self.synchronize()
        self._call("cuStreamBeginCapture_v2", self.stream, 2)
        work()
        self._call("cuStreamEndCapture", self.stream, ctypes.byref(graph))
        self._call(
            "cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_uint64(0)
        )
        begin, end = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuEventCreate", ctypes.byref(begin), 0)
        self._call("cuEventCreate", ctypes.byref(end), 0)
        times = []
        for _ in range(repeats + 2):
            self._call("cuEventRecord", begin, self.stream)
            self._call("cuGraphLaunch", executable, self.stream)
            self._call("cuEventRecord", end, self.stream)
            self.synchronize()
            elapsed = ctypes.c_float()
            self._call("cuEventElapsedTime", ctypes.byref(elapsed), begin, end)
            times.append(elapsed.value * 1e-3)
        self._call("cuGraphExecDestroy", executable)
        self._call("cuGraphDestroy", graph)
        return statistics.median(times[2:])
