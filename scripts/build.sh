#!/bin/sh
# build.sh BUILD PYTHON: compiles parco._C in BUILD, incrementally, and puts it and its stub beside the Python sources.
# Called by `make build`, under a lock.
set -eu
build=$1
python=$2
suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
cmake -S . -B "$build" -G Ninja -DPython_EXECUTABLE="$(realpath -s "$python")" >"$build/configure.log" 2>&1 || {
  cat "$build/configure.log" >&2
  exit 1
}
cmake --build "$build" --target _C
if ! cmp -s "$build/_C$suffix" "src/parco/_C$suffix"; then
  (cd "$build" && "$(realpath -s "$OLDPWD/$python")" -m nanobind.stubgen --quiet --module _C --output-file _C.pyi)
  cmp -s "$build/_C.pyi" src/parco/_C.pyi || cp "$build/_C.pyi" src/parco/_C.pyi
  cp "$build/_C$suffix" "src/parco/.new$suffix"
  mv "src/parco/.new$suffix" "src/parco/_C$suffix" # a rename: a process that has the old one loaded keeps it
fi
