#!/usr/bin/env python3
"""random_model - a Llama folder of a given shape with random weights, to measure time and memory.

Usage: random_model.py OUT_DIR [--shape llama3-8b] [--layers 1]

Weights are normal with a standard deviation of 1 / sqrt(columns), bf16; the tokenizer (and so the
vocabulary) is that of tests/fixtures/stories260k. What the model says is noise: cost is all that it
shows. Needs numpy.
"""

import argparse
import json
import os
import shutil
import struct

import numpy as np

# dim, hidden_dim, n_heads, n_kv_heads, head_dim
SHAPES = {
    "llama3-8b": (4096, 14336, 32, 8, 128),
    "llama3.2-1b": (2048, 8192, 32, 8, 64),
    "smollm2-135m": (576, 1536, 9, 3, 64),
}
FIXTURE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../tests/fixtures/stories260k")


def tensor_shapes(dim, hidden, q_dim, kv_dim, layers, vocab):
    """name -> shape, as a Hugging Face folder has them."""
    shapes = {"model.embed_tokens.weight": (vocab, dim), "model.norm.weight": (dim,)}
    for layer in range(layers):
        linears = {
            "self_attn.q_proj": (q_dim, dim), "self_attn.k_proj": (kv_dim, dim),
            "self_attn.v_proj": (kv_dim, dim), "self_attn.o_proj": (dim, q_dim),
            "mlp.gate_proj": (hidden, dim), "mlp.up_proj": (hidden, dim),
            "mlp.down_proj": (dim, hidden), "input_layernorm": (dim,),
            "post_attention_layernorm": (dim,),
        }
        for name, shape in linears.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    return shapes


def bf16_bytes(shape, rng):
    values = np.ones(shape, np.float32) if len(shape) == 1 else \
        rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[1]))
    return (values.view(np.uint32) >> 16).astype("<u2").tobytes()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[2])
    parser.add_argument("out")
    parser.add_argument("--shape", choices=SHAPES, default="llama3-8b")
    parser.add_argument("--layers", type=int, default=1)
    args = parser.parse_args()
    dim, hidden, n_heads, n_kv_heads, head_dim = SHAPES[args.shape]
    with open(os.path.join(FIXTURE, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    config.update(hidden_size=dim, intermediate_size=hidden, num_hidden_layers=args.layers,
                  num_attention_heads=n_heads, num_key_value_heads=n_kv_heads, head_dim=head_dim,
                  torch_dtype="bfloat16")
    os.makedirs(args.out, exist_ok=True)
    with open(os.path.join(args.out, "config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(os.path.join(FIXTURE, name), args.out)

    shapes = tensor_shapes(dim, hidden, n_heads * head_dim, n_kv_heads * head_dim, args.layers,
                           config["vocab_size"])
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(0)
    with open(os.path.join(args.out, "model.safetensors"), "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            file.write(bf16_bytes(shape, rng))


if __name__ == "__main__":
    main()
