#!/usr/bin/env bash
# The tests that need neither transformers nor mlx, on a native core that is built with
# AddressSanitizer and UndefinedBehaviorSanitizer.
#     tests/sanitize.sh BUILD_DIRECTORY [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
build=$1
shift
python=$(command -v python3)
cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DFLASHMOE_SANITIZE=ON \
  -DPython_EXECUTABLE="$python" >"$build.log"
cmake --build "$build" -j 2
mkdir -p "$build/site"
cp -r src/flashmoe "$build/site/"
cp "$build"/_native*.so "$build/site/flashmoe/"
runtime=$(${CXX:-c++} -print-file-name=libasan.so):$(${CXX:-c++} -print-file-name=libubsan.so):$(${CXX:-c++} -print-file-name=libstdc++.so)
# Python itself leaks at exit, on purpose; what the interpreter leaves behind is not ours to judge.
LD_PRELOAD=$runtime ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  PYTHONPATH=$build/site "$python" -m pytest -m "not reference" "$@"
