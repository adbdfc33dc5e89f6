#!/usr/bin/env python3
"""Makes every n-th allocation, write, fsync, rename, close, mmap, thread and open of tq fail once.

For every command below and every kind of call: counts the calls of a run in which nothing fails,
then lets each of them fail in a run of its own. Such a run either gives the very result, or ends
with exit code 4 or 5 (or that of the refusal it was to word anyway), exactly one line `tq: error:`, nothing on stdout, no temporary file, and the
file that was to be replaced as it was. `--every K` tries each K-th call only, beginning at a
different one for every command; `make test` does that, `make faults` tries all.
"""
import argparse
import concurrent.futures
import os
import shutil
import subprocess
import sys
import tempfile

# memory: an allocation fails and all after it do too.
KINDS = ["alloc", "memory", "write", "fsync", "rename", "close", "mmap", "thread", "open"]
TEXT = "abc abd bca cab " * 40
OLD = b"the old file"


class Case:
    """A command; OUT stands for the file that it writes."""

    def __init__(self, name, args, stdin=b"", resume=False, code=0):
        self.name, self.args, self.stdin = name, args, stdin
        self.resume, self.code = resume, code

    def writes(self):
        return "OUT" in self.args


def make_cases():
    calib = ["--calib", "TEXT", "--calib-samples", "4", "--calib-length", "16", "--threads", "2",
             "--force"]
    learned = ["quantize", "MODEL", "-o", "OUT", "--method", "twinquant", "--group", "32", "--rank",
               "8", "--steps", "2", "--refine-steps", "2", *calib]
    return [
        Case("rtn", ["quantize", "MODEL", "-o", "OUT", "--method", "rtn", "--force", "--group",
                     "32"]),
        Case("twinquant", learned),
        Case("resume", [*learned, "--resume"], resume=True),
        Case("run", ["run", "MODEL", "abc", "-n", "4", "--temp", "0", "--ignore-eos", "-q"]),
        Case("run-tq", ["run", "TQ", "-", "-n", "4", "--temp", "0", "--ignore-eos", "-q"],
             stdin=b"abc abd"),
        Case("eval", ["eval", "TQ", "--text", "TEXT", "--ctx", "16", "--json", "-q"]),
        Case("logits", ["logits", "TQ", "--ids", "1,2,3", "-o", "OUT"]),
        Case("tokenize", ["tokenize", "MODEL", "--file", "TEXT", "--json"]),
        Case("inspect", ["inspect", "TQ", "--json"]),
        Case("verify", ["verify", "TQ"]),
        # What fails while a refusal is worded.
        Case("usage", ["run", "MODEL", "x", "--tmep", "1"], code=2),
        Case("bad", ["logits", "TEXT", "--ids", "1,2,3", "-o", "OUT"], code=3),
        Case("absent", ["verify", "NOWHERE"], code=5),
    ]


class Tester:
    def __init__(self, options):
        self.tq, self.preload = options.tq, options.preload
        self.root = tempfile.mkdtemp(prefix="tq-faults-")
        self.model = os.path.join(options.fixtures, "random-models", "llama-gqa-f32")
        self.text = os.path.join(self.root, "text.txt")
        with open(self.text, "w") as file:
            file.write(TEXT)
        self.file = os.path.join(self.root, "model.tq")
        subprocess.run([self.tq, "quantize", self.model, "-o", self.file, "--method", "rtn", "-q",
                        "--group", "32"], check=True)
        self.unfinished = {}

    def run(self, case, folder, environment=None):
        out = os.path.join(folder, "out")
        os.mkdir(folder)
        if case.writes():
            with open(out, "wb") as file:
                file.write(OLD)
        if case.resume:
            shutil.copytree(self.prepared, out + ".resume")
        words = {"MODEL": self.model, "TQ": self.file, "TEXT": self.text, "OUT": out,
                 "NOWHERE": os.path.join(folder, "nothing.tq")}
        args = [words.get(arg, arg) for arg in case.args]
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **(environment or {})}
        if environment is not None:
            env["LD_PRELOAD"] = self.preload
        done = subprocess.run([self.tq, *args], input=case.stdin, env=env, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=120)
        written = b""
        if case.writes():
            with open(out, "rb") as file:
                written = file.read()
        left = sorted(os.listdir(folder))
        if os.path.isdir(out + ".resume"):
            left += os.listdir(out + ".resume")
        shutil.rmtree(folder)
        return done, written, left

    def prepare_resume(self, case):
        """The folder of a run that was interrupted after its first layer."""
        folder = os.path.join(self.root, "prepare")
        os.mkdir(folder)
        self.prepared = os.path.join(folder, "out.resume")
        words = {"MODEL": self.model, "TEXT": self.text, "OUT": os.path.join(folder, "out")}
        args = [words.get(arg, arg) for arg in case.args]
        process = subprocess.Popen([self.tq, *args], stderr=subprocess.PIPE)
        for line in process.stderr:
            if b"layer 1/" in line:
                process.kill()
                break
        process.stderr.close()
        process.wait()

    def wrong(self, case, expected, result):
        """What is wrong with a run in which something failed; None if nothing is."""
        done, written, left = result
        lines = done.stderr.decode(errors="replace").split("\n")
        errors = [line for line in lines if line.startswith("tq: error:")]
        if any(".tmp-" in name for name in left):
            return f"temporary files: {left}"
        if done.returncode == 0:
            if case.code != 0:
                return "exit 0"
            if normalised(done.stdout) != normalised(expected[0].stdout):
                return "exit 0, other output"
            if written != expected[1]:
                return "exit 0, another file"
            return "exit 0 and an error line" if errors else None
        if done.returncode not in (4, 5, case.code):
            return f"exit {done.returncode}: {done.stderr[-300:]}"
        if len(errors) != 1 or lines[-2] != errors[0]:
            return f"exit {done.returncode}, {len(errors)} error lines: {done.stderr[-300:]}"
        if done.stdout and case.name not in ("run", "run-tq"):  # they write as they go
            return f"exit {done.returncode} and output {done.stdout[:60]}"
        if case.writes() and written not in (OLD, expected[1]):
            return "the old file is gone"
        return None


def normalised(text):
    """Output without the figures that differ from run to run."""
    return b",".join(part for part in text.split(b",") if b"tok_per_s" not in part)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tq", required=True)
    parser.add_argument("--library", dest="preload", required=True, help="libfaults.so")
    parser.add_argument("--fixtures", required=True)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--most", type=int, default=0, help="runs for a command and kind, 0 = all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--only", help="name of a command")
    parser.add_argument("--kinds", default=",".join(KINDS))
    options = parser.parse_args()
    tester = Tester(options)
    n_runs = n_wrong = 0
    offset = 0
    for case in make_cases():
        if options.only and case.name != options.only:
            continue
        if case.resume:
            tester.prepare_resume(case)
        expected = tester.run(case, os.path.join(tester.root, "plain"))
        if expected[0].returncode != case.code:
            sys.exit(f"{case.name}: fails without a fault: {expected[0].stderr}")
        for name in options.kinds.split(","):
            kind, lasting = ("alloc", True) if name == "memory" else (name, False)
            count = os.path.join(tester.root, "count")
            tester.run(case, os.path.join(tester.root, "counted"),
                       {"TQ_FAULT_KIND": kind, "TQ_FAULT_COUNT": count})
            with open(count) as file:
                n_calls = int(file.read())
            offset += 1
            step = options.every
            if options.most:
                step = max(step, -(-n_calls // options.most))
            calls = range(1 + offset % step, n_calls + 1, step)

            def one(n, kind=kind, lasting=lasting, case=case, expected=expected):
                folder = os.path.join(tester.root, f"{kind}-{n}")
                environment = {"TQ_FAULT_KIND": kind, "TQ_FAULT_FIRST": str(n)}
                if lasting:
                    environment["TQ_FAULT_LAST"] = str(10 ** 12)
                try:
                    result = tester.run(case, folder, environment)
                except subprocess.TimeoutExpired:
                    return n, "it hangs"
                return n, tester.wrong(case, expected, result)

            with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
                failures = [(n, why) for n, why in pool.map(one, calls) if why]
            n_runs += len(calls)
            n_wrong += len(failures)
            print(f"{case.name:10} {name:7} {n_calls:6} calls, {len(calls):6} runs, "
                  f"{len(failures)} wrong", flush=True)
            for n, why in failures[:20]:
                print(f"    call {n}: {why}", flush=True)
    shutil.rmtree(tester.root)
    print(f"{n_runs} faults, {n_wrong} wrong")
    sys.exit(n_wrong > 0)


if __name__ == "__main__":
    main()
