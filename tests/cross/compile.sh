#!/usr/bin/env bash
# The Python module compiled and linked for arm64, on Linux and on macOS, by zig: the same CMake
# build, warnings included, with this machine's Python headers. Nothing is run (test_neon.py does).
#     tests/cross/compile.sh BUILD_DIRECTORY TARGET     needs cmake, ninja, nanobind and ziglang
set -euo pipefail
cd "$(dirname "$0")/../.."
mkdir -p "$1"
build=$(cd "$1" && pwd)
python=$(command -v python3)

# The headers, with pyconfig.h (which Debian keeps elsewhere) less what it asks of this system's libc.
# All these systems have 64-bit pointers and longs.
rm -rf "$build/include"
"$python" - "$build/include" <<'EOF'
import pathlib, re, shutil, sys, sysconfig
include = shutil.copytree(sysconfig.get_path("include"), pathlib.Path(sys.argv[1]))
text = pathlib.Path(sysconfig.get_config_h_filename()).read_text()
(include / "pyconfig.h").write_text(re.sub(r"#define _(POSIX_C|XOPEN|GNU)_SOURCE.*", "", text))
EOF

# CMake wants each tool to be one program.
tool() {
  printf '#!/usr/bin/env bash\n%s\n' "$2" >"$build/$1"
  chmod +x "$build/$1"
}
tool ar "exec $python -m ziglang ar \"\$@\""
tool ranlib "exec $python -m ziglang ranlib \"\$@\""

# compile TARGET [CMake options]
compile() {
  local target=$1
  # For macOS zig has neither Apple's frameworks (their headers are in tests/metal, and symbols may
  # stay undefined, as Python's do) nor a linker that reads nanobind's list of Python's symbols or
  # makes a bundle; a dynamic library tests the same.
  tool "$target-c++" "set -- \"\${@/#-Wl,@*darwin-ld-cpython.sym/-Wl,-undefined,dynamic_lookup}\"
set -- \"\${@/#-bundle/-shared}\"
for word; do
  shift
  case \$previous\$word in
    -framework*) ;;
    *) set -- \"\$@\" \"\$word\" ;;
  esac
  previous=; [ \"\$word\" = -framework ] && previous=-framework
done
exec $python -m ziglang c++ -target $target \"\$@\""
  cmake -S . -B "$build/$target" -G Ninja -DCMAKE_BUILD_TYPE=Release -DFLASHMOE_WERROR=ON \
    -DCMAKE_CXX_COMPILER="$build/$target-c++" -DCMAKE_OBJCXX_COMPILER="$build/$target-c++" \
    -DCMAKE_AR="$build/ar" -DCMAKE_RANLIB="$build/ranlib" -DPython_EXECUTABLE="$python" \
    -DPython_INCLUDE_DIR="$build/include" "${@:2}" >"$build/$target.log"
  cmake --build "$build/$target" -j 2
}

case $2 in
  aarch64-linux-gnu)
    compile "$2" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 ;;
  aarch64-macos) # CMake asks for a tool that only an installation would use
    compile "$2" -DCMAKE_SYSTEM_NAME=Darwin -DCMAKE_SYSTEM_PROCESSOR=arm64 \
      -DCMAKE_INSTALL_NAME_TOOL="$(command -v true)" \
      -DCMAKE_OBJCXX_FLAGS="-I$PWD/tests/metal/include -isystem $PWD/tests/metal/include/macos" ;;
  *) echo "$2 is not aarch64-linux-gnu or aarch64-macos" >&2; exit 2 ;;
esac
