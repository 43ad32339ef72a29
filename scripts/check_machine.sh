#!/bin/sh
# What a fresh machine must have before parco can be installed: each absence is one line with its remedy, all of them at once.
python=${PYTHON:-python3}
compiler=${CXX:-c++}
missing=0
say() { echo "parco: $1" >&2; missing=1; }

if ! command -v "$python" >/dev/null 2>&1; then
  say "no $python: install Python 3.11 or newer (Debian: apt install python3 python3-venv python3-dev), or name one: make PYTHON=/path/to/python3.11"
elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  say "$python is $("$python" -c 'import platform; print(platform.python_version())'): install Python 3.11 or newer, or name one: make PYTHON=python3.11"
else
  "$python" -c 'import venv, ensurepip' 2>/dev/null ||
    say "$python lacks the venv module: install it (Debian: apt install python3-venv)"
  "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
    say "$python lacks its headers (Python.h): install them (Debian: apt install python3-dev)"
fi

flags='-std=c++17 -fopenmp -mavx512bf16 -mamx-tile -mamx-int8'
if ! command -v "$compiler" >/dev/null 2>&1; then
  say "no C++ compiler $compiler: install GCC 11 or newer (Debian: apt install g++), or name one: make CXX=g++-12"
else
  # shellcheck disable=SC2086  # the flags are several words
  echo '#include <optional>
#include <omp.h>
int main() { std::optional<int> n = omp_get_max_threads(); return *n < 1; }' |
    "$compiler" $flags -x c++ - -o /dev/null 2>/dev/null ||
    say "$compiler cannot compile C++17 with OpenMP and AMX ($flags): install GCC 11 or newer (Debian: apt install g++), or name one: make CXX=g++-12"
fi
case $(uname -m) in x86_64 | amd64) ;; *) say "this machine is $(uname -m): parco's kernels are written for x86-64 so far" ;; esac
exit $missing
