#!/usr/bin/env bash
# The source distribution holds what it should, builds with the user's flags and without isolation,
# and runs; an editable install finds its kernels. Nothing of the repository is in reach.
#     tests/sdist.sh SDIST NEW_DIRECTORY       fetches scikit-build-core, nanobind and dependencies
set -euo pipefail
sdist=$(realpath "$1")
mkdir -p "$2/empty"
work=$(realpath "$2")
fail() { echo "$sdist: $1" >&2; exit 1; }

tar xzf "$sdist" -C "$work"
source=$(echo "$work"/flashmoe-*)
for file in LICENSE README.md metal/common.h tests/conftest.py src/flashmoe/demo_model/config.json; do
  [ -f "$source/$file" ] || fail "no $file"
done
extra=$(cd "$source" && find . -path ./docs/performance -o -path './docs/*.json' \
  -o -path './docs/*.svg' -o -name '*.so' -o -path ./build)
[ -z "$extra" ] || fail "holds $extra"

python3 -m venv "$work/venv"
. "$work/venv/bin/activate"
cd "$work/empty"
pip install -q scikit-build-core nanobind cmake ninja
CXXFLAGS=-fno-plt pip install -q --no-build-isolation --config-settings build-dir="$work/build" \
  --config-settings cmake.define.CMAKE_EXPORT_COMPILE_COMMANDS=ON "$sdist"
commands=$work/build/compile_commands.json
! grep -q 'march=native' "$commands" || fail "it is built for this processor alone"
python - "$commands" <<'EOF'
import json, sys
ours = [c["command"] for c in json.load(open(sys.argv[1])) if "flashmoe_native" in c["file"]]
assert ours and all("-fno-plt" in command for command in ours), "CXXFLAGS are not honoured"
EOF
flashmoe demo

# With the simulated GPU's host code where there is a compiler for it: as on macOS, kernels are
# installed.
metal=OFF
[ -z "$(command -v clang++-19)" ] || [ ! -f /usr/include/GNUstep/Foundation/Foundation.h ] || metal=ON
pip install -q --no-build-isolation --no-deps --config-settings build-dir="$work/editable" \
  --config-settings cmake.build-type=Debug --config-settings cmake.define.FLASHMOE_METAL_SIMULATOR=$metal -e "$source"
METAL=$metal python - <<'EOF'
import os, pathlib
import flashmoe
from flashmoe.generate.engine import kernel_sources
assert "site-packages" not in flashmoe.__file__, flashmoe.__file__
expected = os.environ["METAL"] == "ON"
assert (pathlib.Path(kernel_sources()) / "common.h").is_file() == expected, kernel_sources()
EOF
flashmoe demo >"$work/editable.txt"
