#!/usr/bin/env python3
"""assemble_qwen3_smol - SmolLM2 folder + delta folder -> a small Qwen3 model for tests.

Usage: assemble_qwen3_smol.py BASE_DIR DELTA_DIR OUT_DIR

BASE_DIR is what gguf_to_hf.py wrote. DELTA_DIR holds delta.safetensors (new q_proj, k_proj, q_norm
and k_norm of every layer, the values themselves), config.json and generation_config.json. Bytes
are copied as they are; the tokenizer is the base's. Standard library only.
"""

import json
import os
import shutil
import struct
import sys


def read_safetensors(path):
    """name -> (dtype, shape, bytes)"""
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        data = file.read()
    header.pop("__metadata__", None)
    return {name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])])
            for name, entry in header.items()}


def write_safetensors(path, tensors):
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(tensors):
        dtype, shape, data = tensors[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.writelines(tensors[name][2] for name in sorted(tensors))


def main(base, delta, out_dir):
    tensors = read_safetensors(f"{base}/model.safetensors")
    tensors.update(read_safetensors(f"{delta}/delta.safetensors"))
    os.makedirs(out_dir)
    write_safetensors(f"{out_dir}/model.safetensors", tensors)
    for folder, names in ((delta, ("config.json", "generation_config.json")),
                          (base, ("tokenizer.json", "tokenizer_config.json"))):
        for name in names:
            shutil.copyfile(f"{folder}/{name}", f"{out_dir}/{name}")
    print(f"{out_dir}: {len(tensors)} tensors")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: assemble_qwen3_smol.py BASE_DIR DELTA_DIR OUT_DIR")
    main(*sys.argv[1:])
