#!/usr/bin/env python3
"""Kills `tq quantize` again and again and continues with --resume: the bytes must be those of a run
that was never disturbed.

The moments are spread evenly over the time that an undisturbed run takes, so that every stage is
hit: reading, sampling, learning, rounding, refining, writing. After the last kill the run is left
to end. Nothing but the output may stay.
"""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time

TEXT = "abc abd bca cab dda bad cad acb " * 300


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tq", required=True)
    parser.add_argument("--fixtures", required=True)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--kills-a-run", type=int, default=4, help="before it is left to end")
    options = parser.parse_args()
    root = tempfile.mkdtemp(prefix="tq-kill-")
    text = os.path.join(root, "text.txt")
    with open(text, "w") as file:
        file.write(TEXT)
    model = os.path.join(options.fixtures, "random-models", "llama-gqa-f32")
    args = [options.tq, "quantize", model, "--method", "twinquant", "--group", "32", "--rank", "8",
            "--steps", "80", "--refine-steps", "40", "--calib", text, "--calib-samples", "48",
            "--calib-length", "32", "--threads", "1", "-q"]
    whole = os.path.join(root, "whole.tq")
    start = time.monotonic()
    subprocess.run([*args, "-o", whole], check=True)
    seconds = time.monotonic() - start
    with open(whole, "rb") as file:
        expected = file.read()

    n_kills = n_wrong = n_run = 0
    while n_kills < options.kills:
        folder = os.path.join(root, f"run{n_run}")
        n_run += 1
        os.mkdir(folder)
        command = [*args, "-o", os.path.join(folder, "out.tq"), "--resume"]
        for _ in range(options.kills_a_run):
            if n_kills >= options.kills:
                break
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            # The golden ratio spreads any number of moments evenly.
            time.sleep((n_kills * 0.6180339887) % 1 * seconds)
            process.kill()
            n_kills += 1
            if process.wait() == 0:
                break
        out = os.path.join(folder, "out.tq")
        done = None
        if not os.path.exists(out):
            done = subprocess.run(command, stderr=subprocess.PIPE)
        with open(out, "rb") if os.path.exists(out) else open(os.devnull, "rb") as file:
            same = file.read() == expected
        names = os.listdir(folder)
        # A kill between the last rename and the removal of OUTPUT.resume leaves that folder.
        if not same or (done and names != ["out.tq"]) or any(".tmp-" in name for name in names
                                                             if done):
            n_wrong += 1
            print(f"run {n_run}: same bytes: {same}, files: {names}, "
                  f"{done.stderr.decode() if done else ''}")
        shutil.rmtree(folder)
    shutil.rmtree(root)
    print(f"{n_kills} kills in {n_run} runs of {seconds:.1f} s, {n_wrong} wrong")
    sys.exit(n_wrong > 0)


if __name__ == "__main__":
    main()
