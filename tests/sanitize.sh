#!/usr/bin/env bash
# The native core built with AddressSanitizer and UndefinedBehaviorSanitizer, and on it every table of
# kernels and the Python tests that run native code.
#     tests/sanitize.sh BUILD_DIRECTORY       needs cmake, ninja and nanobind
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p "$1"
build=$(cd "$1" && pwd)
python=$(command -v python3)

# The package in DIRECTORY/site, with its native core built with SANITIZERS.
build_with() {
  cmake -S . -B "$1" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DFLASHMOE_SANITIZE="$2" \
    -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O1 -g1" -DFLASHMOE_NATIVE_TESTS=ON \
    -DFLASHMOE_WERROR=ON -DPython_EXECUTABLE="$python" >"$1.log"
  cmake --build "$1" -j "$(nproc)"
  rm -rf "$1/site"
  mkdir "$1/site"
  cp -r src/flashmoe "$1/site/"
  rm -f "$1/site/flashmoe/"_native*.so
  cp "$1"/_native*.so "$1/site/flashmoe/"
}

build_with "$build" address,undefined
export UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$build/site
# What the interpreter leaves behind at exit is not ours to judge. GCC 13 aligns the stacks that a use
# after return is looked for on too little for AVX-512 (its bug 110027).
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0
"$build/kernels_test"
runtime=$(${CXX:-c++} -print-file-name=libasan.so):$(${CXX:-c++} -print-file-name=libubsan.so)
# Python loads C++ through the module only; before that nothing tells the sanitizer how it throws.
runtime=$runtime:$(${CXX:-c++} -print-file-name=libstdc++.so)
# Only Python's output is captured: a sanitizer's last words go straight to the terminal.
LD_PRELOAD=$runtime "$python" -m pytest --capture=sys \
  -k "not killed and not memory" tests/test_{ops,quantize,determinism,read_errors,state,interface,pack}.py
# Damaged inputs and faults, with every buffer of the engine as long as it was asked for.
LD_PRELOAD=${runtime//:/ } "$python" tests/campaign/run.py \
  --inputs 540 --faults 0 --interrupts 12 --kills 0

# Threads that generate, save and close one model. ThreadSanitizer wants addresses that are not too random.
build_with "$build-thread" thread
$python benchmarks/make_checkpoint.py "$build-thread/model" --preset tiny >/dev/null
LD_PRELOAD=$(${CXX:-c++} -print-file-name=libtsan.so) PYTHONPATH=$build-thread/site \
  TSAN_OPTIONS="ignore_noninstrumented_modules=1" setarch -R \
  "$python" tests/campaign/threads.py "$build-thread/model" 6
