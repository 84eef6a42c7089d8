#!/usr/bin/env bash
# The native core built with AddressSanitizer and UndefinedBehaviorSanitizer, and on it every table of
# kernels and the Python tests that run native code.
#     tests/sanitize.sh BUILD_DIRECTORY       needs cmake, ninja and nanobind
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p "$1"
build=$(cd "$1" && pwd)
python=$(command -v python3)
cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DFLASHMOE_SANITIZE=address,undefined \
  -DFLASHMOE_NATIVE_TESTS=ON -DFLASHMOE_WERROR=ON -DPython_EXECUTABLE="$python" >"$build.log"
cmake --build "$build" -j 2
rm -rf "$build/site"
mkdir "$build/site"
cp -r src/flashmoe "$build/site/"
rm -f "$build/site/flashmoe/"_native*.so
cp "$build"/_native*.so "$build/site/flashmoe/"

export UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$build/site
"$build/kernels_test"
runtime=$(${CXX:-c++} -print-file-name=libasan.so):$(${CXX:-c++} -print-file-name=libubsan.so)
# Python loads C++ through the module only; before that nothing tells the sanitizer how it throws.
runtime=$runtime:$(${CXX:-c++} -print-file-name=libstdc++.so)
# What the interpreter leaves behind at exit is not ours to judge. Only Python's output is captured:
# a sanitizer's last words go straight to the terminal.
LD_PRELOAD=$runtime ASAN_OPTIONS=detect_leaks=0 "$python" -m pytest --capture=sys \
  -k "not killed and not memory" tests/test_{ops,quantize,determinism,read_errors,state,interface,pack}.py
# Damaged inputs and faults, with every buffer of the engine as long as it was asked for.
LD_PRELOAD=${runtime//:/ } ASAN_OPTIONS=detect_leaks=0 "$python" tests/campaign/run.py \
  --inputs 540 --faults 0 --interrupts 12 --kills 0
