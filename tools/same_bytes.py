#!/usr/bin/env python3
"""same_bytes - do two builds of tq make the same files and the same logits?

    tools/same_bytes.py OLD_TQ NEW_TQ [MODEL_FOLDER ...]

For a change that must not change results: every method (few steps) on every folder, by both programs,
on the CPU; the .tq files and the logits of the new one's file are compared byte by byte. Without
folders: the story model of tests/fixtures. Ends with exit 1 if something differs."""

import os
import subprocess
import sys
import tempfile

FEW = ["--calib-samples", "4", "--calib-length", "64"]
LEARN = ["--steps", "4"]
REFINE = ["--refine-steps", "3"]
RUNS = [
    ["--method", "none"],
    ["--method", "rtn", "--embed-bits", "8", "--head-bits", "8"],
    ["--method", "rtn", "--two-level", "--bits-a", "4"],
    ["--method", "gptq", *FEW],
    ["--method", "gptq", "--act-order", "--bits-a", "4", *FEW],
    ["--method", "quarot", *FEW],
    ["--method", "quarot", "--rounding", "gptq-ls", "--act-codes", "asymmetric", "--bits-a", "4", *FEW],
    ["--method", "svdquant"],
    ["--method", "spinquant", *FEW, *LEARN],
    ["--method", "spinquant", "--loss", "kl", *FEW, *LEARN],
    ["--method", "respinquant", *FEW, *LEARN],
    ["--method", "respinquant", "--basis-rank", "8", "--loss", "block", *FEW, *LEARN],
    ["--method", "twinquant", *FEW, *LEARN, *REFINE],
    ["--method", "twinquant", "--bits-a", "4", "--kv-bits", "4", "--two-level", *FEW, *LEARN, *REFINE],
]
IDS = ",".join(str(i * 7 % 90 + 1) for i in range(60))


def made(program, arguments, output):
    """Bytes that `program` writes, or its error line."""
    done = subprocess.run([program, *arguments, "-o", output], capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip().split("\n")[-1]
    with open(output, "rb") as file:
        return file.read()


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    old, new = sys.argv[1:3]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    folders = sys.argv[3:] or [os.path.join(root, "tests/fixtures/stories260k")]
    n_differ = 0
    with tempfile.TemporaryDirectory() as scratch:
        for folder in folders:
            for options in RUNS:
                files = [os.path.join(scratch, name) for name in ("old.tq", "new.tq")]
                results = [made(program, ["quantize", folder, "--force", "-q", *options], file)
                           for program, file in zip((old, new), files)]
                same = results[0] == results[1]
                words = "same bytes" if same else "DIFFERENT FILES"
                if isinstance(results[1], str):
                    words += f" ({results[1]})"
                elif same:
                    logits = [made(program, ["logits", files[1], "--ids", IDS, "--device", "cpu"],
                                   os.path.join(scratch, "logits.npy")) for program in (old, new)]
                    same = logits[0] == logits[1]
                    words += ", same logits" if same else ", DIFFERENT LOGITS"
                n_differ += not same
                print(f"{words}: {os.path.basename(folder)} {' '.join(options)}", flush=True)
    sys.exit(1 if n_differ else 0)


if __name__ == "__main__":
    main()
