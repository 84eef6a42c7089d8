"""Compiles the kernels of metal/ for NVIDIA GPUs with NVRTC, which needs no GPU.

Each Metal kernel becomes a CUDA kernel of the same name and arguments: a struct in constant memory
is passed by value, a place in the grid comes from CUDA's own variables.
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

sys.path.insert(0, str(ROOT / "tests" / "metal"))
from shader_arguments import K  # noqa: E402

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
_THREADS = {
    "rms_norm": K["kNormThreads"],
    "combine": K["kCombineThreads"],
}


@functools.cache
def kernels() -> dict[str, tuple[Path, str]]:
    """File and argument list of each kernel."""
    macros: dict[str, str] = {}
    for path in [*SHADERS.glob("*.h"), *SHADERS.glob("*.metal")]:
        text = path.read_text().replace("\\\n", " ")
        macros.update(re.findall(r"#define (\w+_ARGUMENTS) (.*)", text))
    found = {}
    for path in sorted(SHADERS.glob("*.metal")):
        text = path.read_text()
        for macro, arguments in macros.items():
            text = re.sub(rf"(?<!define )\b{macro}\b", arguments.replace("\\", ""), text)
        for name, arguments in re.findall(r"kernel void (\w+)\((.*?)\)\s*\{", text, re.S):
            found[name] = path, arguments
    return found


@functools.cache
def buffers(kernel: str) -> list[tuple[int, bool]]:
    """The buffer indices of a kernel in the order of its arguments; whether it is a struct."""
    result = []
    for argument in kernels()[kernel][1].split(","):
        index = re.search(r"\[\[buffer\((\w+)\)\]\]", argument)
        if index:
            result.append((K[index[1]], "&" in argument))
    return result


def _entry(kernel: str) -> str:
    """A __global__ function that calls `kernel`."""
    parameters, values = [], []
    for argument in kernels()[kernel][1].split(","):
        kind, name, attribute = re.fullmatch(
            r"\s*(.+?)(\w+)\s*\[\[(\w+)(?:\(\w+\))?\]\]\s*", argument, re.S
        ).groups()
        if attribute != "buffer":
            values.append(_PLACES[attribute])
            continue
        by_value = kind.replace("&", "").replace("constant", "const __grid_constant__")
        parameters.append(f"{by_value if '&' in kind else kind} {name}")
        values.append(name)
    bounds = f"__launch_bounds__({_THREADS[kernel]}) " if kernel in _THREADS else ""
    signature = f"void {bounds}cuda_{kernel}({', '.join(parameters)})"
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
        _entry(name) for name, (path, _) in kernels().items() if path.name == file
    )
    options = (
        "-default-device",
        "-diag-suppress=1097",  # attributes that CUDA does not know
        "-D__METAL_VERSION__=240",
        "-DFUNCTION_CONSTANTS=" + ",".join(map(str, constants)),
        *(f"-I{path}" for path in INCLUDES),
    )
    return compile_source(source, architecture, options)
