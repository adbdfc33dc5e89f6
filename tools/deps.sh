#!/usr/bin/env bash
# deps - installs the Debian packages that building, testing and the demo need. Quick and silent
# when all are there. On a system without apt-get it names them and leaves the rest to you: CMake
# says which one is missing.
set -euo pipefail

packages=(
  g++ make cmake ninja-build pkg-config ccache git      # toolchain
  nlohmann-json3-dev libpcre2-dev libutf8proc-dev       # model and tokenizer files
  libeigen3-dev libcli11-dev libedit-dev                # calibration, command line, chat
  libxxhash-dev libssl-dev                              # checksums
  libgtest-dev libbenchmark-dev                         # tests, micro-benchmarks
  clang-format python3 python3-venv ca-certificates     # checks, demo
)

# `make fuzz`, which nothing else needs.
[[ ${1:-} == fuzz ]] && packages+=(clang libclang-rt-14-dev llvm)

if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
  echo "deps: no apt-get here; install the equivalents of: ${packages[*]}" >&2
  exit 0
fi

missing=()
for package in "${packages[@]}"; do
  status=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)
  [[ $status == installed ]] || missing+=("$package")
done
[[ ${#missing[@]} -eq 0 ]] && exit 0

as_root=()
if [[ $(id -u) -ne 0 ]]; then
  if ! command -v sudo >/dev/null; then
    echo "deps: not root and no sudo; ask an administrator for: ${missing[*]}" >&2
    exit 1
  fi
  as_root=(sudo)
fi

echo "deps: installing ${missing[*]}" >&2
# The package lists of a fresh machine are empty or old; refresh them first.
"${as_root[@]}" apt-get update -qq >/dev/null
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
  apt-get install -y -qq --no-install-recommends -o Dpkg::Use-Pty=0 "${missing[@]}" >/dev/null
