#!/usr/bin/env bash
# run - every fuzz target for SECONDS each, from the seeds in corpus/; what it finds new stays in
# build/fuzz/corpus/, what crashes in build/fuzz/crashes/. Fails if there is such an input.
#
#   tests/fuzz/run.sh BUILD_FOLDER SECONDS [TARGET ...]
set -uo pipefail

build=$1 seconds=$2
shift 2
here=$(cd "$(dirname "$0")" && pwd)
targets=("$@")
if [[ ${#targets[@]} -eq 0 ]]; then
  for source in "$here"/fuzz_*.cpp; do
    name=$(basename "$source" .cpp)
    targets+=("${name#fuzz_}")
  done
fi

failed=()
for target in "${targets[@]}"; do
  found=$build/corpus/$target crashes=$build/crashes/$target
  mkdir -p "$found" "$crashes"
  # 1 GB in all: AddressSanitizer's own memory is several times what the target asks for.
  "$build/fuzz_$target" "$found" "$here/corpus/$target" -max_total_time="$seconds" \
    -rss_limit_mb=1024 -malloc_limit_mb=256 -timeout=20 -artifact_prefix="$crashes/" \
    -max_len=65536 -print_final_stats=1 -verbosity=0 >"$crashes/log" 2>&1 || failed+=("$target")
  runs=$(sed -n 's/stat::number_of_executed_units: *//p' "$crashes/log")
  echo "fuzz_$target: ${runs:-?} runs"
done
[[ ${#failed[@]} -eq 0 ]] && exit 0
echo "failed: ${failed[*]}; see $build/crashes/TARGET" >&2
exit 1
