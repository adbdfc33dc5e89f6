#!/ usr / bin / env python3
"""Writes the seeds of tests/fuzz/corpus/ from the fixtures, with ./tq for the .tq files.

Run it from the root of the repository when a fixture or the format changes.
"""
import json
import os
import struct
import subprocess
import sys
import tempfile

FIXTURES = "tests/fixtures"
CORPUS = "tests/fuzz/corpus"
MODELS = ["llama-gqa-f32", "llama-tied-bf16-sharded", "llama3-rope-f16", "qwen3-tied-bf16",
          "qwen3-yarn-f32"]
PATTERNS = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"\p{N}{1,3}", r"[\u4e00-\u9fff]+", r"(?:a|b)*?c", r"\w+\W", r"[^\s]+\z", r"\p{Han}+|(?<=x)y",
    r" ?\p{L}+(?=\d)", r"(a+)+b", r"\h\x{41}\v[[:alpha:]]",
]


def read(path):
    with open(path, "rb") as file:
        return file.read()


def write(target, name, data):
    os.makedirs(f"{CORPUS}/{target}", exist_ok=True)
    with open(f"{CORPUS}/{target}/{name}", "wb") as file:
        file.write(data)


def safetensors(tensors, metadata=None):
    header, data = {}, b""
    if metadata:
        header["__metadata__"] = metadata
    for name, (dtype, shape, values) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape,
                        "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + data


def small_tokenizer(path, n):
    """The first n entries of a vocabulary with the merges among them, and all else as it is."""
    whole = json.loads(read(path))
    model = whole["model"]
    by_id = sorted(model["vocab"].items(), key=lambda item: item[1])
    model["vocab"] = dict(by_id[:n])
    parts = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    model["merges"] = [m for m, p in zip(model["merges"], parts)
                       if p[0] + p[1] in model["vocab"]]
    return json.dumps(whole, ensure_ascii=False).encode()


def main():
    tq = sys.argv[1] if len(sys.argv) > 1 else "./tq"
    for model in MODELS:
        write("config", model, read(f"{FIXTURES}/random-models/{model}/config.json"))
    for model in ("stories260k", "babyllama-tok105"):
        write("config", model, read(f"{FIXTURES}/{model}/config.json"))
        write("tokenizer", model, read(f"{FIXTURES}/{model}/tokenizer.json"))

    write("safetensors", "f32", safetensors({"a": ("F32", [2, 2], bytes(16)),
                                             "b": ("BF16", [3], bytes(6)),
                                             "c": ("I64", [], bytes(8))}, {"format": "pt"}))
    write("safetensors", "f16", safetensors({"x.weight": ("F16", [1, 4], bytes(8))}))
    write("safetensors", "index", b"i" + json.dumps(
        {"metadata": {"total_size": 16},
         "weight_map": {"a": "model-00001-of-00002.safetensors",
                        "b": "model-00002-of-00002.safetensors"}}).encode())

    for name in ("llama3", "qwen3", "smollm2"):
        write("tokenizer", name, small_tokenizer(f"{FIXTURES}/tokenizers/{name}.json", 330))
    features = json.loads(read(f"{FIXTURES}/tokenizers/features.json"))
    cases = features.get("cases") or features.get("tokenizers")
    cases = list(cases.items()) if isinstance(cases, dict) else list(enumerate(cases))
    for name, case in cases[::2]:
        case = case.get("tokenizer", case)
        text = case if isinstance(case, str) else json.dumps(case, ensure_ascii=False)
        if len(text) < 6000:
            write("tokenizer", f"feature-{name}".replace("/", "-"), text.encode())

    for i, text in enumerate(json.loads(read(f"{FIXTURES}/tokenizers/corpus.json"))["texts"][:60]):
        write("text", f"{i:02}", bytes([i % 5]) + text.encode()[:2000])

    with tempfile.TemporaryDirectory() as folder:
        for model, options in (("llama-gqa-f32", ["--method", "rtn", "--group", "32"]),
                               ("llama3-rope-f16", ["--method", "quarot", "--rounding", "rtn",
                                                    "--group", "32", "--kv-bits", "4"]),
                               ("llama-tied-bf16-sharded", ["--method", "svdquant", "--rounding",
                                                            "rtn", "--group", "32", "--rank", "4",
                                                            "--embed-bits", "8"]),
                               ("qwen3-tied-bf16", ["--method", "none"])):
            out = f"{folder}/{model}.tq"
            subprocess.run([tq, "quantize", f"{FIXTURES}/random-models/{model}", "-o", out, "-q",
                            *options], check=True)
            write("tq", model, read(out))

    chat = json.loads(read(f"{FIXTURES}/tokenizers/chat.json"))
    generation = b'{"eos_token_id":[1,2],"temperature":0.6,"top_k":20,"top_p":0.95,"do_sample":true}'
    for name, template in chat["templates"].items():
        config = json.dumps({"chat_template": template, "eos_token": "<|im_end|>"}).encode()
        write("templates", name, b"\0".join([config, b"", generation, b"Hi <|im_end|>"]))
        write("templates", name + "-file", b"\0".join([b"{}", template.encode(), b"{}", b"Hi"]))

    records = [
        {"query": "Question: What?\nAnswer:", "choices": ["a", "b"], "gold": 1},
        {"query": "Passage: x\nQuestion: y", "choices": ["no", "yes"], "gold": 0},
        {"query": "He fell, because", "choices": ["a", "b"], "gold": 0},
        {"context_options": ["a b", "a c"], "continuation": "d e", "gold": 1},
        {"activity_label": "x", "ctx_a": "a", "ctx_b": "b", "endings": ["[t] a", "b [s] c"],
         "label": 0, "ind": 1, "ctx": "a b", "split": "v", "split_type": "z", "source_id": "s"},
        {"context": "a b", "continuation": "c"},
        {"text": "calibration \u00e9\ud83d\ude00 text"},
    ]
    for i, record in enumerate(records):
        write("jsonl", str(i), (json.dumps(record) + "\n").encode() * 2)
    for i, pattern in enumerate(PATTERNS):
        write("regex", str(i), pattern.encode() + b"\0Hello world's 12345  x\n\n \xe4\xb8\xad")


if __name__ == "__main__":
    main()
