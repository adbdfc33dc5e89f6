#!/usr/bin/env python3
"""results - the table of docs/results.md, made again from the models by one command.

Each row of ROWS is quantized, then evaluated on WikiText-2, and on its first windows compared with
its own folder (KL divergence, top-1 agreement). What came out is kept in docs/results.json; a run
whose commands and version of tq are found there, for the same text and as many windows, is not
repeated, so the script may be interrupted at any time. At the end the block between the two
`results:` marks of docs/results.md is written anew from all runs of this table that are there.
Delete docs/results.json to measure everything again. Standard library only.
"""

import argparse
import datetime
import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections import namedtuple

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
STORE = "docs/results.json"
DOCUMENT = "docs/results.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"

# quantize: arguments of `tq quantize` (None: the folder itself is evaluated); evaluate: arguments of
# `tq eval`; seeds: runs with --seed 0, 1, ..., reported as one row.
Row = namedtuple("Row", "name quantize evaluate seeds", defaults=("", 1))

ROWS = [
    Row("unquantized", None),
    Row("RTN W4A8", "--method rtn"),
    Row("RTN W4A4", "--method rtn --bits-a 4"),
    Row("GPTQ W4A4", "--method gptq --bits-a 4"),
    Row("GPTQ W4A4, activation order", "--method gptq --act-order --bits-a 4"),
    Row("QuaRot RTN W4A4", "--method quarot --rounding rtn --bits-a 4", seeds=3),
    Row("QuaRot W4A8", "--method quarot"),
    Row("QuaRot W4A4KV4", "--method quarot --bits-a 4", "--kv-bits 4"),
    Row("QuaRot W4A4", "--method quarot --bits-a 4", seeds=3),
    Row("QuaRot W3A3", "--method quarot --bits-w 3 --bits-a 3"),
    Row("QuaRot W4A4, activation order", "--method quarot --act-order --bits-a 4"),
    Row("SVDQuant r32 W4A4", "--method svdquant --rank 32 --bits-a 4"),
    Row("SVDQuant r32 W4A4, Hadamard", "--method svdquant --basis hadamard --rank 32 --bits-a 4"),
    Row("QuaRot W4A4, all codes, corrected",
        "--method quarot --rounding gptq-ls --act-codes all --bits-a 4"),
    Row("SpinQuant W4A4, symmetric codes, plain GPTQ",
        "--method spinquant --rounding gptq --act-codes symmetric --bits-a 4"),
    Row("SpinQuant W4A4", "--method spinquant --bits-a 4", seeds=3),
    Row("SpinQuant W4A4, loss of blocks", "--method spinquant --loss block --bits-a 4"),
    Row("SpinQuant W4A4, loss of predictions", "--method spinquant --loss kl --bits-a 4"),
    Row("SpinQuant W4A4, the paper's recipe",
        "--method spinquant --loss ce --steps 100 --act-codes asymmetric --group-a token "
        "--rounding gptq --bits-a 4"),
    Row("SpinQuant W4A4, 1000 steps", "--method spinquant --bits-a 4 --steps 1000"),
    Row("ReSpinQuant r0 W4A4", "--method respinquant --basis-rank 0 --bits-a 4"),
    Row("ReSpinQuant r8 W4A4", "--method respinquant --basis-rank 8 --bits-a 4"),
    Row("ReSpinQuant r32 W4A4", "--method respinquant --basis-rank 32 --bits-a 4"),
    Row("ReSpinQuant r32 W4A4, 1000 steps",
        "--method respinquant --basis-rank 32 --bits-a 4 --steps 1000"),
    Row("ReSpinQuant r128 W4A4", "--method respinquant --basis-rank 128 --bits-a 4"),
    Row("ReSpinQuant full W4A4", "--method respinquant --basis-rank full --bits-a 4"),
    Row("TwinQuant SVD r32 W4A4", "--method twinquant --split svd --rank 32 --bits-a 4"),
    Row("TwinQuant SVD r128 W4A4", "--method twinquant --split svd --rank 128 --bits-a 4"),
    Row("TwinQuant r32 W4A4KV4", "--method twinquant --rank 32 --bits-a 4", "--kv-bits 4"),
    Row("TwinQuant r32 W4A4", "--method twinquant --rank 32 --bits-a 4", seeds=3),
    Row("TwinQuant r32 W4A4, 1000 steps", "--method twinquant --rank 32 --bits-a 4 --steps 1000"),
    Row("TwinQuant r128 W4A4", "--method twinquant --rank 128 --bits-a 4", seeds=3),
    Row("TwinQuant r32 W4A4, inputs in groups of 32",
        "--method twinquant --rank 32 --bits-a 4 --group-a 32 --refine-steps 48"),
    Row("TwinQuant r32 W4A4, two-level scales",
        "--method twinquant --rank 32 --bits-a 4 --two-level"),
    Row("TwinQuant r32 W4A8", "--method twinquant --rank 32"),
    Row("TwinQuant r32 W4A8, two-level scales", "--method twinquant --rank 32 --two-level"),
    Row("TwinQuant r128 W4A8, 96 steps of refinement",
        "--method twinquant --rank 128 --refine-steps 96 --calib-samples 128"),
    Row("TwinQuant r32 W3A3", "--method twinquant --rank 32 --bits-w 3 --bits-a 3"),
]

# Windows of the comparison with the folder, which takes twice the time of a perplexity.
KL_WINDOWS = 12

# Methods and roundings that refuse a calibration text.
UNCALIBRATED = {"rtn", "svdquant"}

# wiki.test.raw as it was published; papers join its rows by two newlines.
RAW_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
TEXT_HELP = """WikiText-2 test split: wiki.test.raw, from wikitext-2-raw-v1.zip of Merity et al. (Hugging
Face data set Salesforce/wikitext, config wikitext-2-raw-v1; CC BY-SA), whose rows are joined by two
newlines as papers do. Any other file is taken as it is. Default: demo/wiki.test.raw"""

# One run: a row, a model and a seed; the arguments of both commands.
Run = namedtuple("Run", "row model seed quantize evaluate")


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[1] + " Paths are relative to the root of the tree.")
    parser.add_argument("--model", action="append", metavar="DIR",
                        help="Hugging Face folder; may be repeated. "
                             "Default: demo/SmolLM2-135M-Instruct, which make demo fetches")
    parser.add_argument("--text", default="demo/wiki.test.raw", help=TEXT_HELP)
    parser.add_argument("--only", default="", metavar="REGEX", help="run only rows whose name matches")
    parser.add_argument("--windows", type=int, default=0, help="first N windows of the text; 0 = all")
    parser.add_argument("--seeds", type=int, default=3, help="at most N of a row's seeds")
    parser.add_argument("--threads", type=int, default=0, help="0 = all cores; changes seconds only")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu",
                        help="where perplexities are computed; quantizing uses the CPU")
    parser.add_argument("--calib", help="calibration text, as tq quantize takes it")
    parser.add_argument("--tq", default="./tq", help="the program. Default: ./tq, which make builds")
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    args = parser.parse_args()
    args.model = args.model or ["demo/SmolLM2-135M-Instruct"]
    return args


def fail(sentence):
    sys.exit(f"results: {sentence}")


def model_name(folder):
    return os.path.basename(os.path.normpath(folder))


def plan(args):
    """All runs of the table, in its order."""
    for folder in args.model:
        for row in ROWS:
            for seed in range(min(row.seeds, args.seeds)):
                quantize = None
                if row.quantize is not None:
                    quantize = shlex.split(row.quantize) + (["--seed", str(seed)] if seed else [])
                    if args.calib and not UNCALIBRATED & set(quantize):
                        quantize += ["--calib", args.calib]
                yield Run(row, folder, seed, quantize, shlex.split(row.evaluate))


def commands(run):
    """The two commands as a reader would type them; None where there is nothing to quantize."""
    name = model_name(run.model)
    target = "M.tq" if run.quantize is not None else name
    quantize = None
    if run.quantize is not None:
        quantize = shlex.join(["tq", "quantize", name, "-o", "M.tq", *run.quantize])
    return [quantize, shlex.join(["tq", "eval", target, "--text", "TEXT", *run.evaluate])]


class Store:
    """What was measured so far, one flat record a run."""

    def __init__(self, version, text_sha256):
        self.version, self.text_sha256 = version, text_sha256
        self.records = self.read()

    @staticmethod
    def read():
        if not os.path.exists(STORE):
            return []
        with open(STORE, encoding="utf-8") as file:
            return json.load(file)

    def find(self, run, windows=1):
        """The record of this very run by this version of tq on this text, or None.
        windows: how many it must have; 0: all that the text has."""
        for record in self.records:
            if ([record["model"], record["version"], record["text_sha256"], record["commands"]]
                    == [model_name(run.model), self.version, self.text_sha256, commands(run)]
                    and (record["all_windows"] or 0 < windows <= record["windows"])):
                return record
        return None

    def add(self, run, record):
        old = self.find(run)
        self.records = [r for r in self.read() if r != old]  # others may have added meanwhile
        self.records.append(record)
        with open(STORE + ".tmp", "w", encoding="utf-8") as file:
            json.dump(self.records, file, indent=1)
            file.write("\n")
        os.replace(STORE + ".tmp", STORE)


class Quantized:
    """The file of the last run and its report: rows that differ in evaluation alone share it."""

    def __init__(self, args, folder):
        self.args, self.key, self.report = args, None, None
        self.path = os.path.join(folder, "model.tq")

    def make(self, run, threads):
        key = (run.model, run.quantize)
        if key != self.key:
            self.key = None
            report = self.path + ".report"
            call([self.args.tq, "quantize", run.model, "-o", self.path, "--force", "--quiet",
                  "--report", report, *run.quantize, *threads])
            with open(report, encoding="utf-8") as file:
                self.report = json.load(file)
            self.key = key
        return self.path, self.report


def call(command):
    """stdout of a command; raises CalledProcessError."""
    print("results: $", shlex.join(command), file=sys.stderr, flush=True)
    return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout


def measure(run, args, text, store, quantized):
    threads = ["--threads", str(args.threads)] if args.threads else []
    record = {"model": model_name(run.model), "row": run.row.name, "seed": run.seed,
              "commands": commands(run), "version": store.version}
    target = run.model
    if run.quantize is not None:
        target, report = quantized.make(run, threads)
        record |= {key: report[key] for key in ("bits_per_weight", "seconds", "peak_rss_bytes")}
    evaluate = [args.tq, "eval", target, "--text", text, "--json", "-q", "--device", args.device,
                *run.evaluate, *threads]
    windows = ["--windows", str(args.windows)] if args.windows else []
    evaluation = json.loads(call(evaluate + windows))
    record |= {key: evaluation[key]
               for key in ("text_sha256", "protocol", "ctx", "windows", "ppl", "stderr")}
    if run.quantize is not None:
        few = min(KL_WINDOWS, evaluation["windows"])
        kl = json.loads(call(evaluate + ["--windows", str(few), "--kl", run.model]))
        record |= {key: kl[key] for key in ("kl_mean", "top1_agreement")}
    on_gpu = ", evaluated on a GPU" if args.device == "cuda" else ""
    record |= {"all_windows": not args.windows, "date": datetime.date.today().isoformat(),
               "machine": machine() + on_gpu, "threads": args.threads or os.cpu_count()}
    store.add(run, record)


def machine():
    """The processor, for the line above the table."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return re.search(r"^model name\s*:\s*(.+)$", file.read(), re.M).group(1)
    except (OSError, AttributeError):
        return platform.processor() or platform.machine()


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def prepare_text(path, folder):
    """Path and digest of the text to evaluate: the rows of the raw file joined as papers do, any
    other file as it is. folder: where the former may be put."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        fail(f"{path}: {error.strerror}; --text: {' '.join(TEXT_HELP.split())}")
    if sha256(data) != RAW_SHA256:
        return path, sha256(data)
    rows = [b"" if line == b" " else line + b"\n" for line in data[:-1].split(b"\n")]
    target = os.path.join(folder, "wikitext-2-test.txt")
    data = b"\n\n".join(rows)
    with open(target, "wb") as file:
        file.write(data)
    return target, sha256(data)


def spread(values, digits):
    """One value, or the mean of several with their extremes."""
    mean = f"{sum(values) / len(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table_line(row, records):
    """One Markdown row from the records of its seeds."""
    first = records[0]
    quantize, evaluate = first["commands"]
    command = f"`{quantize}`" if quantize else f"`{evaluate}`"
    if quantize and row.evaluate:
        command += f", eval `{row.evaluate}`"
    if len(records) > 1:
        command += f", {len(records)} seeds"
    column = lambda key, factor=1: [factor * record[key] for record in records]
    error = max(record["ppl"] * record["stderr"] for record in records)
    bits, reported = "as stored", ["", "", "", ""]
    if quantize:
        bits = f"{max(column('bits_per_weight')):.4f}"
        longest = max(records, key=lambda record: record["seconds"])
        threads = f" ({longest['threads']})" if longest["threads"] else ""
        reported = [spread(column("kl_mean"), 4), spread(column("top1_agreement", 100), 2),
                    f"{longest['seconds']:.0f}{threads}",
                    f"{max(column('peak_rss_bytes', 1e-6)):.0f}"]
    return "| " + " | ".join([first["model"], row.name, bits, spread(column("ppl"), 3), f"{error:.2f}",
                              str(min(column("windows"))), *reported, command]) + " |"


def render(runs, store):
    """The block of the document: one line for each row that was measured."""
    lines, shown, groups = [], [], {}
    for run in runs:
        groups.setdefault((run.model, run.row), []).append(store.find(run))
    for (_, row), records in groups.items():
        records = [record for record in records if record]
        if records:
            lines.append(table_line(row, records))
            shown += records
    if not lines:
        fail(f"nothing to write: no run of this table is in {STORE}")
    machines = sorted({record["machine"] for record in shown})
    dates = sorted({record["date"] for record in shown})
    period = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    caption = (f"{store.version}, {period}, {'; '.join(machines)}. Text sha256 "
               f"{store.text_sha256[:12]}..., windows of {shown[0]['ctx']} tokens: "
               f"{shown[0]['protocol']}. KL and top-1 agreement with the folder: first "
               f"{KL_WINDOWS} windows.")
    head = ["model", "row", "bits per weight of linears", "perplexity", "+-", "windows", "KL mean", "top-1 %",
            "quantizing, s (threads)", "peak MB", "command"]
    return "\n".join([BEGIN, caption, "", "| " + " | ".join(head) + " |",
                      "|" + "---|" * len(head), *lines, END])


def rewrite(block, first=BEGIN, last=END):
    """Puts the block in the place of the one between these marks of the document."""
    with open(DOCUMENT, encoding="utf-8") as file:
        text = file.read()
    begin, end = text.find(first), text.find(last)
    if begin < 0 or end < begin:
        fail(f"{DOCUMENT} has no {first} ... {last}")
    with open(DOCUMENT + ".tmp", "w", encoding="utf-8") as file:
        file.write(text[:begin] + block + text[end + len(last):])
    os.replace(DOCUMENT + ".tmp", DOCUMENT)


def main():
    args = parse_arguments()
    os.chdir(ROOT)
    if args.list:
        for row in ROWS:
            how = "the folder itself" if row.quantize is None else row.quantize
            tail = (f"  eval {row.evaluate}" if row.evaluate else "") + \
                (f"  {row.seeds} seeds" if row.seeds > 1 else "")
            print(f"{row.name:24} {how}{tail}")
        return 0
    try:
        version = subprocess.run([args.tq, "--version"], check=True, capture_output=True,
                                 text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        fail(f"cannot run {args.tq}: {error}; build it with make, or name it with --tq")
    runs, failed = list(plan(args)), set()
    with tempfile.TemporaryDirectory(prefix="tq-results-") as scratch:
        text, text_sha256 = prepare_text(args.text, scratch)
        store, quantized = Store(version, text_sha256), Quantized(args, scratch)
        for run in runs:
            if not re.search(args.only, run.row.name) or run.row.name in failed:
                continue
            if store.find(run, args.windows):
                continue
            try:
                measure(run, args, text, store, quantized)
            except subprocess.CalledProcessError:
                failed.add(run.row.name)  # tq has said why
    rewrite(render(runs, store))
    if failed:
        fail("left out, because tq refused: " + ", ".join(sorted(failed)))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
