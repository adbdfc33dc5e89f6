#!/usr/bin/env python3
"""cuda_table - the table of products in docs/results.md, from what bench_cuda --json measured.

Usage: cuda_table.py docs/results-cuda.json
"""

import json
import os
import sys

import results

BEGIN, END = "<!-- bench-cuda:begin -->", "<!-- bench-cuda:end -->"
SHOWN = [1, 16, 256, 1024, 2048, 4096]


def cell(record):
    """Time, speed, and how often it fits in the time of cuBLASLt's bf16."""
    if not record:
        return ""
    ratio = record["cublaslt_bf16_us"] / record["us"]
    limit = (f"{100 * record['bandwidth_share']:.0f} %" if record["m"] <= 16
             else f"{record.get('tops', record.get('tflops')):.0f}")
    return f"{record['us']:.1f} us, {limit}, {ratio:.2f} x"


def render(report):
    products = [r for r in report["kernels"] if r["kernel"] == "packed"]
    lines = [BEGIN, f"{report['gpu']}, read bandwidth {report['read_bandwidth'] / 1e12:.2f} TB/s."]
    for two_level, title in ((False, "Ordinary scales:"), (True, "Two-level scales:")):
        chosen = [r for r in products if r.get("two_level", False) == two_level]
        if chosen:
            lines += ["", title, ""] + table(chosen)
    dense = [r for r in report["kernels"] if r["kernel"] == "dense"]
    if dense:
        lines += ["", "Weights that meet f32 inputs:", ""] + dense_table(dense)
    return "\n".join(lines + [END])


def dense_table(products):
    of = {(r["matrix"], r["m"], r["storage"], r["portable"]): r for r in products}
    lines = ["| matrix | m | cuBLASLt, inputs rounded to bf16, us | bf16 | f16 | 8 bits "
             "| bf16, by mma.sync |", "|---|---|---|---|---|---|---|"]
    for matrix, m in dict.fromkeys((r["matrix"], r["m"]) for r in products):
        cells = [matrix, str(m), f"{of[matrix, m, 'bf16', False]['cublaslt_bf16_us']:.1f}"]
        cells += [cell(of.get((matrix, m, *which))) for which in
                  (("bf16", False), ("f16", False), ("q8", False), ("bf16", True))]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def table(products):
    of = {(r["matrix"], r["m"], r["group"], r["rank"]): r for r in products}
    lines = ["| matrix | m | cuBLASLt bf16, fp8, int8, us | group 64 | group 64, rank 128 "
             "| group 128 | group 128, rank 128 |", "|---|---|---|---|---|---|---|"]
    for matrix in dict.fromkeys(r["matrix"] for r in products):
        for m in SHOWN:
            record = of.get((matrix, m, 64, 0))
            if not record:
                continue
            peers = [record[f"cublaslt_{kind}_us"] for kind in ("bf16", "fp8", "int8")]
            cells = [matrix, str(m), ", ".join(f"{us:.1f}" if us else "-" for us in peers)]
            cells += [cell(of.get((matrix, m, group, rank)))
                      for group in (64, 128) for rank in (0, 128)]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def main():
    if len(sys.argv) != 2:
        sys.exit("cuda_table: give the file that bench_cuda --json wrote")
    with open(sys.argv[1], encoding="utf-8") as file:
        report = json.load(file)
    os.chdir(results.ROOT)
    results.rewrite(render(report), BEGIN, END)


if __name__ == "__main__":
    main()
