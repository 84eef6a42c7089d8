"""Compiles the kernels of metal/ for NVIDIA GPUs with NVRTC, which needs no GPU.

Each Metal kernel becomes a CUDA kernel of the same name, whose argument is the kernel's struct by
value; a place in the grid comes from CUDA's own variables.
"""

import ctypes
import functools
import re
import site
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SHADERS = ROOT / "metal"
INCLUDES = [Path(__file__).parent, SHADERS, ROOT / "tests" / "metal" / "executor" / "include"]

_PLACES = {
    "threadgroup_position_in_grid": "uint3{blockIdx.x, blockIdx.y, blockIdx.z}",
    "thread_position_in_grid": (
        "uint3{blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y, blockIdx.z}"
    ),
    "thread_index_in_threadgroup": "threadIdx.x",
    # The shuffle tells the compiler that all lanes of a warp have the same.
    "simdgroup_index_in_threadgroup": "__shfl_sync(0xffffffffu, threadIdx.x / 32, 0)",
    "thread_index_in_simdgroup": "threadIdx.x % 32",
}
_BOUNDED = ("rms_norm", "combine")  # whose threads need the compiler to save registers


@functools.cache
def kernels() -> dict[str, tuple[Path, str, str]]:
    """File, threads of a threadgroup and argument list of each kernel."""
    found = {}
    for path in sorted(SHADERS.glob("*.metal")):
        pattern = r"KERNEL\((\w+), (\w+)\)\((.*?)\)\s*\{"
        for name, threads, arguments in re.findall(pattern, path.read_text(), re.S):
            found[name] = path, threads, arguments
    return found


def _entry(kernel: str) -> str:
    """A __global__ function that calls `kernel`."""
    _, threads, arguments = kernels()[kernel]
    struct, *places = arguments.split(",")
    kind = re.search(r"constant (\w+)&", struct)[1]
    values = ["args"] + [_PLACES[re.search(r"\[\[(\w+)\]\]", place)[1]] for place in places]
    bounds = f"__launch_bounds__({threads}) " if kernel in _BOUNDED else ""
    signature = f"void {bounds}cuda_{kernel}(const __grid_constant__ {kind} args)"
    return f'extern "C" __global__ {signature} {{ {kernel}({", ".join(values)}); }}\n'


@functools.cache
def library() -> ctypes.CDLL:
    folders = [Path(p) for p in [*site.getsitepackages(), *sys.path] if p]
    places = [f / "nvidia" for f in folders] + [Path("/usr/local/cuda/lib64")]
    for folder in places:
        found = sorted(folder.glob("**/libnvrtc.so.1[0-9]*")) if folder.is_dir() else []
        if found:
            return ctypes.CDLL(str(found[0]))
    raise ImportError("no libnvrtc: pip install nvidia-cuda-nvrtc")


@functools.cache
def compile_source(source: str, architecture: str, options: tuple[str, ...] = ()) -> bytes:
    """The cubin of CUDA source text. Raises RuntimeError with the compiler's log."""
    nvrtc = library()
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"source.cu", 0, None, None)
    every = [f"--gpu-architecture={architecture}", "--std=c++17", "-lineinfo", *options]
    array = (ctypes.c_char_p * len(every))(*(option.encode() for option in every))
    failed = nvrtc.nvrtcCompileProgram(program, len(every), array)

    def get(what: str) -> bytes:
        size = ctypes.c_size_t()
        getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{what}")(program, text)
        return text.raw

    try:
        if failed:
            raise RuntimeError(get("ProgramLog").rstrip(b"\0").decode())
        return get("CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


@functools.cache
def compile_kernels(file: str, constants: tuple[int, ...], architecture: str = "sm_90") -> bytes:
    """The cubin of a file of metal/, its kernels specialised. Raises RuntimeError."""
    source = f'#include "{file}"\n' + "".join(
        _entry(name) for name, (path, *_) in kernels().items() if path.name == file
    )
    options = (
        "-default-device",
        "-diag-suppress=1097",  # attributes that CUDA does not know
        "-D__METAL_VERSION__=300",
        "-DFUNCTION_CONSTANTS=" + ",".join(map(str, constants)),
        *(f"-I{path}" for path in INCLUDES),
    )
    return compile_source(source, architecture, options)
