#!/usr/bin/env python3
"""make_model_fixtures - writes tests/fixtures/random-models: tiny models and their right answers.

Usage: make_model_fixtures.py OUT_DIR      needs torch and transformers (see README.md there)

The answers are the logits of Hugging Face transformers, float32, eager attention. Weights are drawn
so that mistakes show: attention is far from uniform, norm gains are not 1, position matters. The
script checks that by making the mistakes (wrong rope, flat gains) and refusing a model whose logits
do not move. It is not run by `make test`; its output is committed.
Read next: tests/test_reference_models.cpp, which compares tq with these files.
"""

import json
import math
import os
import shutil
import sys

import torch
import transformers
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

# <unk>, <s>, </s>, then single characters without merges: the smallest valid tokenizer.
CHARACTERS = "\u2581ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz.,!?'-:;"
SPECIAL = ["<unk>", "<s>", "</s>"]
VOCAB_SIZE = len(SPECIAL) + len(CHARACTERS)

# Long enough to pass original_max_position_embeddings of both scaled ropes.
LONG = 8400
SHORT = 40

COMMON = dict(vocab_size=VOCAB_SIZE, bos_token_id=1, eos_token_id=2, rms_norm_eps=1e-5,
              attention_bias=False, hidden_act="silu")

# `old_rope`: write config.json as transformers v4 did (rope_theta, rope_scaling); else as v5 does.
MODELS = {
    "llama-gqa-f32": dict(
        arch="llama", dtype="float32", tokens=SHORT, old_rope=True,
        note="GQA 4:2, head_dim 16 although dim / heads = 10, untied head",
        config=dict(hidden_size=40, intermediate_size=72, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                    tie_word_embeddings=False, max_position_embeddings=256,
                    rope_parameters=dict(rope_type="default", rope_theta=10000.0))),
    "llama-tied-bf16-sharded": dict(
        arch="llama", dtype="bfloat16", tokens=SHORT, old_rope=False, shards=2, drop_head_dim=True,
        note="one key head for all, head_dim not in config.json, tied head, two shards",
        config=dict(hidden_size=32, intermediate_size=72, num_hidden_layers=3,
                    num_attention_heads=4, num_key_value_heads=1, tie_word_embeddings=True,
                    max_position_embeddings=256,
                    rope_parameters=dict(rope_type="default", rope_theta=500000.0))),
    "llama3-rope-f16": dict(
        arch="llama", dtype="float16", tokens=LONG, old_rope=True,
        note="llama3 rope scaling with the constants of Llama 3.1, positions beyond 8192",
        config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                    num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                    tie_word_embeddings=True, max_position_embeddings=131072,
                    rope_parameters=dict(rope_type="llama3", rope_theta=500000.0, factor=8.0,
                                         low_freq_factor=1.0, high_freq_factor=4.0,
                                         original_max_position_embeddings=8192))),
    "qwen3-tied-bf16": dict(
        arch="qwen3", dtype="bfloat16", tokens=SHORT, old_rope=True,
        note="q/k norm with uneven gains, head_dim 24 although dim / heads = 10, tied head",
        config=dict(hidden_size=40, intermediate_size=96, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, head_dim=24,
                    tie_word_embeddings=True, max_position_embeddings=256,
                    rope_parameters=dict(rope_type="default", rope_theta=1000000.0))),
    "qwen3-yarn-f32": dict(
        arch="qwen3", dtype="float32", tokens=LONG, old_rope=False,
        note="yarn rope scaling, original length 4096, factor 4, untied head",
        config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                    num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                    tie_word_embeddings=False, max_position_embeddings=16384,
                    rope_parameters=dict(rope_type="yarn", rope_theta=1000000.0, factor=4.0,
                                         original_max_position_embeddings=4096))),
}


def build(spec):
    config_class, model_class = {"llama": (LlamaConfig, LlamaForCausalLM),
                                 "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[spec["arch"]]
    config = config_class(**COMMON, **spec["config"], attn_implementation="eager")
    return model_class(config).eval()


def randomize(model, generator):
    """Linears keep the scale of their input (times a gain), so that logits have a deviation of
    about 1; q and k are larger, so that attention is peaked."""
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "q_norm" in name or "k_norm" in name:
            weight.data = 1.5 + 0.5 * noise.clamp(-2, 2)
        elif "norm" in name:
            weight.data = 1.0 + 0.25 * noise.clamp(-2, 2)
        else:
            gain = 1.6 if "q_proj" in name or "k_proj" in name else 1.0
            weight.data = noise * gain / math.sqrt(weight.shape[1])


def logits_of(model, ids, rows):
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0, rows]


def with_changes(spec, state, config_changes=None, flat=None):
    """The same model with one mistake made on purpose."""
    changed = dict(spec, config=dict(spec["config"], **(config_changes or {})))
    model = build(changed)
    model.load_state_dict(
        {name: torch.ones_like(value) if flat and flat in name else value
         for name, value in state.items()})
    return model


def mistakes_of(spec, state):
    """Plausible wrong models; every one must give visibly other logits."""
    rope = spec["config"]["rope_parameters"]
    plain = dict(rope_type="default", rope_theta=rope["rope_theta"])
    yield "theta", with_changes(
        spec, state, dict(rope_parameters=dict(rope, rope_theta=rope["rope_theta"] * 1.05)))
    yield "norm gains", with_changes(spec, state, flat="input_layernorm")
    if rope["rope_type"] != "default":
        yield "no rope scaling", with_changes(spec, state, dict(rope_parameters=plain))
    if rope["rope_type"] == "yarn":
        yield "no attention factor", with_changes(
            spec, state, dict(rope_parameters=dict(rope, attention_factor=1.0)))
    if spec["arch"] == "qwen3":
        yield "q_norm gains", with_changes(spec, state, flat="q_norm")


def write_config(folder, model, spec):
    # Through JSON text and back: what transformers would write.
    config = json.loads(model.config.to_json_string(use_diff=False))
    keep = ("architectures", "model_type", "attention_bias", "mlp_bias", "hidden_act",
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps",
            "rope_parameters", "tie_word_embeddings", "use_sliding_window", "vocab_size",
            "bos_token_id", "eos_token_id")
    config = {key: config[key] for key in keep if key in config}
    config["architectures"] = [type(model).__name__]
    config["torch_dtype" if spec["old_rope"] else "dtype"] = spec["dtype"]
    if spec.get("drop_head_dim"):
        del config["head_dim"]
    if spec["old_rope"]:
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    write_json(f"{folder}/config.json", config)


def write_json(path, content):
    with open(path, "w", encoding="utf-8") as out:
        json.dump(content, out, ensure_ascii=False, indent=1)
        out.write("\n")


def write_tokenizer(folder):
    pieces = SPECIAL + list(CHARACTERS)
    write_json(f"{folder}/tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True} for i, token in enumerate(SPECIAL)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
            {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>",
                  "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
                  "byte_fallback": False, "ignore_merges": False,
                  "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": []},
    })


def write_weights(folder, state, n_shards):
    if n_shards == 1:
        save_file(state, f"{folder}/model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(state)
    per_shard = -(-len(names) // n_shards)
    weight_map = {}
    for shard in range(n_shards):
        file_name = f"model-{shard + 1:05}-of-{n_shards:05}.safetensors"
        part = {name: state[name] for name in names[shard * per_shard:(shard + 1) * per_shard]}
        save_file(part, f"{folder}/{file_name}", metadata={"format": "pt"})
        weight_map.update({name: file_name for name in part})
    total = sum(value.numel() * value.element_size() for value in state.values())
    write_json(f"{folder}/model.safetensors.index.json",
               {"metadata": {"total_size": total}, "weight_map": weight_map})


def make(name, spec, out_dir):
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    model = build(spec)
    randomize(model, generator)
    model.tie_weights()
    # Rounded to the stored type once, then evaluated in float32: what a reader of the file sees.
    stored = {key: value.detach().to(getattr(torch, spec["dtype"])).contiguous()
              for key, value in model.state_dict().items()
              if not (spec["config"]["tie_word_embeddings"] and key == "lm_head.weight")}
    model.load_state_dict({key: value.float() for key, value in stored.items()}, strict=False)
    model.tie_weights()
    ids = torch.randint(len(SPECIAL), VOCAB_SIZE, (spec["tokens"],), generator=generator).tolist()
    ids[0] = 1
    n = len(ids)
    rows = list(range(n)) if n <= SHORT else [0, 1, n // 2, n - 3, n - 2, n - 1]
    logits = logits_of(model, ids, rows)
    std = logits.std().item()

    print(f"{name}: std {std:.3f}", end="")
    for mistake, wrong in mistakes_of(spec, model.state_dict()):
        moved = (logits_of(wrong, ids, rows) - logits)[-3:].abs().max().item() / std
        print(f", {mistake} moves {moved:.3f}", end="")
        # tests allow 1e-4 of the deviation
        assert moved > 0.01, f"{name}: the mistake '{mistake}' would hardly show"
    print()

    folder = f"{out_dir}/{name}"
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    write_config(folder, model, spec)
    write_tokenizer(folder)
    write_weights(folder, stored, spec.get("shards", 1))
    with open(f"{folder}/expected.json", "w", encoding="utf-8") as out:
        # One row of logits a line; nine digits give a float32 back exactly.
        rows_text = ",\n".join(
            "[" + ",".join(f"{value:.9g}" for value in row.tolist()) + "]" for row in logits)
        out.write(f'{{"note": {json.dumps(spec["note"])},\n"ids": {json.dumps(ids)},\n'
                  f'"rows": {json.dumps(rows)},\n"logits_std": {std:.9g},\n'
                  f'"logits": [\n{rows_text}\n]}}\n')


def main(out_dir):
    torch.manual_seed(0)
    torch.set_num_threads(2)
    for name, spec in MODELS.items():
        make(name, spec, out_dir)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: make_model_fixtures.py OUT_DIR")
    main(sys.argv[1])
