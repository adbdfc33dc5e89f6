#!/usr/bin/env python3
"""Makes tests/fixtures/tokenizers: small tokenizers, awkward texts, and the ids and texts that
Hugging Face's `tokenizers` and Jinja2 give for them. Not needed to build or test tq.

    make_tokenizer_fixtures.py DATA OUT --llama31 TEMPLATE

DATA holds tokenizers/{smollm2,qwen3,llama3}, stories260k, babyllama-tok105, smollm2 as the shared
test data does. The large tokenizers are cut down: same normalizer, pre-tokenizer, decoder, added
tokens and flags, but only the first merges. The Llama-3 one has SmolLM2's merges, so that none of
Meta's data is in the repository. Seeded: the same versions give the same files.

Needs: pip install tokenizers jinja2. Made with tokenizers 0.23.3, jinja2 3.1.6, Python 3.11 (whose
Unicode 14 limits the characters used: other versions classify newer ones differently).
"""

import argparse
import json
import random
import sys
import unicodedata
from pathlib import Path

import jinja2.sandbox
from tokenizers import Tokenizer

SEED = 20240607
N_MERGES = 1200
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# ---------------------------------------------------------------- texts

def by_category():
    """Assigned characters by general category, without surrogates and private use."""
    table = {}
    for code in range(0x110000):
        category = unicodedata.category(chr(code))
        if category not in ("Cs", "Co", "Cn"):
            table.setdefault(category, []).append(chr(code))
    return table


def make_corpus(rng):
    """About 1,300 short texts, each kind built to break a different shortcut."""
    table = by_category()
    categories = sorted(table)
    texts = ["", " ", "\n", "\0", "a\0b", "\ufeffbom", "\ufffd", "�\u0000 �"]

    def pick(category):
        return rng.choice(table[category])

    def some(letters, low, high):
        return "".join(rng.choice(letters) for _ in range(rng.randint(low, high)))

    # Every general category, alone and between letters, digits, spaces and apostrophes.
    for category in categories:
        for shape in ("{}", "a{}b", " {} {}", "1{}2", "'{}s", "x{}\n{}y"):
            texts.append(shape.format(*[pick(category)] * shape.count("{}")))
    # Soup of all categories.
    for _ in range(200):
        texts.append("".join(pick(rng.choice(categories)) for _ in range(rng.randint(2, 12))))
    # Combining marks in all orders on plain and composed letters (NFC reorders and composes).
    marks = [chr(c) for c in (0x300, 0x301, 0x302, 0x303, 0x308, 0x30A, 0x323, 0x327, 0x328, 0x338,
                              0x345, 0x5B0, 0x64B, 0x93C, 0xF71, 0xF74, 0x1DC0, 0x20D0, 0x3099)]
    bases = "aeoAEOncszuıIKÅéǖ\u212b\u2126\u1e69かハकxक\u09c7\u0d46"
    for _ in range(150):
        texts.append("".join(rng.choice(bases) + some(marks, 0, 4) for _ in range(rng.randint(1, 4))))
    # Hangul: jamo that compose, half-composed syllables, old jamo.
    jamo = [chr(c) for c in (0x1100, 0x1112, 0x1161, 0x1175, 0x11A8, 0x11C2, 0xAC00, 0xAC01, 0xD7A3,
                             0x1113, 0x1176, 0x11A7, 0x302E, 0x3131)]
    texts += [some(jamo, 1, 7) for _ in range(60)]
    # Canonical singletons, exclusions and compatibility characters (the latter stay in NFC).
    odd = "\u2000\u2001\u2126\u212a\u212b\u0340\u0341\u0343\u0374\u037e\u0387\u0958\u09dc\ufb1d\ufb2a" \
          "\ufb03ﬁ²½Ⅷ㎏ﷺ\uf900\ufa0e\U0002f800\U0001d15e\u0f73\u0344"
    texts += [some(odd + "ab ", 1, 6) for _ in range(60)]
    # Emoji with joiners, skin tones, flags, keycaps.
    emoji = ["👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪", "🇺🇸🇫", "1️⃣", "❤️", "🧑🏿‍🚀", "\u200d", "\ufe0f", "😀", "🫠"]
    texts += ["".join(rng.choice(emoji + [" ", "a", "\n"]) for _ in range(rng.randint(1, 6)))
              for _ in range(60)]
    # White space of every kind, in runs, before and after words and line breaks.
    spaces = [" ", "  ", "   ", "\t", "\n", "\r", "\r\n", "\n\n", "\u00a0", "\u3000", "\u2028", "\u2029",
              "\u0085", "\u1680", "\u2003", "\u202f", "\u205f", "\u180e", "\u200b", "\v", "\f", "\x1c", "\x1f"]
    for _ in range(220):
        texts.append("".join(rng.choice(spaces) if rng.random() < 0.65 else rng.choice(["a", "The", "9", "!", "é"])
                             for _ in range(rng.randint(1, 9))))
    # Contractions in all cases, also with U+017F and U+212A, which fold to s and k.
    endings = ["s", "t", "re", "ve", "m", "ll", "d", "S", "T", "RE", "Ve", "vE", "M", "Ll", "D", "ſ", "ſt",
               "K", "ß", "x", "lL", "l", "r"]
    for quote in ("'", "’", " '", "''"):
        texts += [rng.choice(["I", "don", "HE", "日", "7", ""]) + quote + e + rng.choice(["", " b", "x", "'s"])
                  for e in endings]
    # Digits of many scripts, in groups of 1 to 7.
    digits = table["Nd"] + table["Nl"] + table["No"]
    texts += [some(digits, 1, 7) for _ in range(60)]
    texts += [some("0123456789", 1, 12) + rng.choice(["", ".", " ", "e", "%"]) + some("0123456789", 0, 9)
              for _ in range(40)]
    # Added tokens of all families inside text, torn apart, doubled, in other letter case.
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "<tool_call>",
               "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<s>", "</s>", "<unk>", "<repo_name>",
               "<|im_start", "im_end|>", "<|IM_END|>", "<", "|>", "<|", "<<|im_end|>>", "</tool_call", "<empty_output>"]
    for _ in range(120):
        texts.append("".join(rng.choice(special + [" ", "\n", "a", "user", "é", "e\u0301"]) for _ in range(rng.randint(1, 6))))
    # What looks like byte fallback and like the alphabets of the vocabularies themselves.
    alphabets = ["<0x41>", "<0xE2>", "<0xZZ>", "<0x0A>", "▁", "▁the", "Ġ", "Ġthe", "Ċ", "Ã©", "ĉ", " ▁ ", "�"]
    texts += ["".join(rng.choice(alphabets + ["a", " "]) for _ in range(rng.randint(1, 5))) for _ in range(50)]
    # Code, prose and words that merge deeply.
    words = ("the of and to in Once upon a time there was little girl named Lily she wanted play with her "
             "internationalization strengths naïve Ångström Привет мир مرحبا 日本語 नमस्ते สวัสดี שלום "
             "def return self.x == != <= /* */ // {} [] ();").split()
    for _ in range(120):
        texts.append(rng.choice(["", " "]).join(
            rng.choice(words) + rng.choice([" ", " ", "", ", ", ".\n", "\n\n\t"]) for _ in range(rng.randint(1, 8))))
    # Long words: one letter, alternating, and a run of spaces.
    texts += ["a" * 300, "ab" * 150, "the" * 60, " " * 130 + "x", "\n" * 70, "é" * 90, "日" * 60, "🙂" * 30,
              "\u0301\u0323" * 40]
    unique = list(dict.fromkeys(texts))
    return unique


# ---------------------------------------------------------------- small tokenizers

def cut(tokenizer, n_merges, extra=()):
    """The same tokenizer with the first n merges; ids renumbered without gaps."""
    model = tokenizer["model"]
    added = [t["content"] for t in tokenizer["added_tokens"]]
    pair = lambda m: tuple(m.split(" ")) if isinstance(m, str) else tuple(m)
    keep = {t for t in model["vocab"] if len(t) == 1}
    merges = []
    for merge in model["merges"]:
        left, right = pair(merge)
        if len(merges) < n_merges and left in keep and right in keep:
            merges.append(merge)
            keep.add(left + right)
    old = sorted(keep | {t for t in added if t in model["vocab"]}, key=model["vocab"].get) + list(extra)
    model["vocab"] = {t: i for i, t in enumerate(old)}
    model["merges"] = merges
    following = len(old)
    for token in tokenizer["added_tokens"]:
        if token["content"] in model["vocab"]:
            token["id"] = model["vocab"][token["content"]]
        else:
            token["id"] = following
            following += 1
    return tokenizer


def added_token(id, content, special=True, **flags):
    base = dict(id=id, content=content, single_word=False, lstrip=False, rstrip=False, normalized=False,
                special=special)
    return {**base, **flags}


def llama3_style(smollm2):
    """Llama-3's pipeline around SmolLM2's merges."""
    model = smollm2["model"]
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    model["vocab"] = {t: i for t, i in model["vocab"].items()}
    smollm2["added_tokens"] = [added_token(0, n) for n in names]
    byte_level = lambda prefix, trim, regex: {"type": "ByteLevel", "add_prefix_space": prefix,
                                              "trim_offsets": trim, "use_regex": regex}
    smollm2["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False},
        byte_level(False, True, False)]}
    # Whole words that no merge reaches: only ignore_merges finds them.
    extra = ["Ġunreachable", "aaaaaa", "ĠLily", "åħ¬åı¸"]
    cut(smollm2, N_MERGES, extra)
    model["ignore_merges"] = True
    bos = smollm2["added_tokens"][0]
    piece = lambda name: {"SpecialToken": {"id": name, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    smollm2["post_processor"] = {"type": "Sequence", "processors": [
        byte_level(True, False, True),
        {"type": "TemplateProcessing", "single": [piece(bos["content"]), text],
         "pair": [piece(bos["content"]), text, {"Sequence": {"id": "B", "type_id": 1}}],
         "special_tokens": {bos["content"]: {"id": bos["content"], "ids": [bos["id"]],
                                             "tokens": [bos["content"]]}}}]}
    smollm2["decoder"] = byte_level(True, True, True)
    return smollm2


def feature_tokenizers():
    """Tiny tokenizers, one for each feature that the large ones do not use."""
    letters = list("abcdefghijklmnopqrstuvwxyz THE.,-_'!0123456789é▁<>|") + ["\n"]

    def make(**parts):
        vocab = {"<unk>": 0}
        for token in letters + parts.pop("vocab", []):
            vocab.setdefault(token, len(vocab))
        merges = parts.pop("merges", [])
        for left, right in merges:
            vocab.setdefault(left + right, len(vocab))
        model = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                 "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                 "vocab": vocab, "merges": [list(m) for m in merges], **parts.pop("model", {})}
        tokens = [added_token(0, "<unk>")]
        following = len(vocab)
        for content, flags in parts.pop("added", []):
            tokens.append(added_token(vocab.get(content, following), content, **flags))
            following += content not in vocab
        whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": tokens, "normalizer": None,
                 "pre_tokenizer": None, "post_processor": None, "decoder": None, "model": model}
        whole.update(parts)
        return whole

    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("a", "n"), ("▁", "a"), ("▁", "the"), ("e", "r"), (" ", "a"),
              ("o", "o"), ("oo", "oo"), ("l", "l")]
    split = lambda pattern, behavior, invert=False: {
        "type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert}
    meta = lambda scheme, cut=True: {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": cut}
    letters_of_bytes = {"vocab": [chr(c) for c in list(range(0x21, 0x7f)) + list(range(0xa1, 0xad)) +
                                  list(range(0xae, 0x144))]}
    cases = {"plain": make(merges=merges), "fuse_unk": make(merges=merges, model={"fuse_unk": True})}
    cases["no_unk"] = make(merges=merges, model={"unk_token": None})
    cases["partial_byte_fallback"] = make(
        merges=merges, vocab=["<0xC3>", "<0xA4>", "<0xB6>"], model={"byte_fallback": True, "fuse_unk": True})
    for behavior in ("Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"):
        for invert in (False, True):
            cases[f"split_{behavior}_{invert}"] = make(
                merges=merges, pre_tokenizer=split({"Regex": r"[\s.]|in"}, behavior, invert))
    cases["split_string"] = make(merges=merges, pre_tokenizer=split({"String": "."}, "Isolated"))
    cases["split_empty_match"] = make(merges=merges, pre_tokenizer=split({"Regex": "h*"}, "Isolated"))
    cases["split_lookbehind"] = make(merges=merges, pre_tokenizer=split({"Regex": r"(?<=t)h|\w+(?=\.)|^a|e$"}, "Isolated"))
    cases["split_word_class"] = make(merges=merges, pre_tokenizer=split({"Regex": r"[\w']+|\W|\d"}, "Contiguous"))
    cases["split_script"] = make(merges=merges, pre_tokenizer=split({"Regex": r"\p{Han}+|\p{Latin}+|\u3042|\x41"}, "Isolated"))
    for whole in (True, False):
        cases[f"digits_{whole}"] = make(merges=merges, pre_tokenizer={"type": "Digits", "individual_digits": whole})
    for scheme in ("always", "first", "never"):
        for cut_words in (True, False):
            cases[f"metaspace_{scheme}_{cut_words}"] = make(
                merges=merges, pre_tokenizer=meta(scheme, cut_words), decoder=meta(scheme, cut_words),
                added=[("<|x|>", {})])
    cases["prefix_space"] = make(
        **letters_of_bytes, merges=[("Ġ", "a"), ("t", "h")], added=[("<|x|>", {})],
        pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True})
    replace = lambda pattern, content: {"type": "Replace", "pattern": pattern, "content": content}
    cases["replace_regex"] = make(merges=merges, normalizer={"type": "Sequence", "normalizers": [
        {"type": "NFC"}, replace({"Regex": r"\s{2,}"}, " "), replace({"String": "b"}, "th"), {"type": "Prepend", "prepend": "▁"}]})
    flags = [("<|x|>", {}), ("<|xy|>", {}), ("hello", {"special": False, "single_word": True}),
             ("lll", {"special": False, "lstrip": True}), ("rrr", {"special": False, "rstrip": True}),
             ("bbb", {"special": False, "lstrip": True, "rstrip": True, "single_word": True}),
             ("the", {"special": False, "normalized": True}), ("a b", {"special": False}),
             ("<|xy|>z", {"special": False}), ("ell", {"special": False})]
    cases["added_flags"] = make(merges=merges, added=flags)
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace({"String": " "}, "▁")]}
    cases["added_normalized"] = make(merges=merges, normalizer=prepend, added=flags)
    cases["metaspace_first_added"] = make(merges=merges, pre_tokenizer=meta("first"), added=flags)
    return cases


def feature_texts(rng, corpus):
    texts = ["", "the other thing", " the  thin.", "in.in .", "..", "hthhh", "a ththe", "12 345a6", "oooooooo", "  a",
             "<|x|> a", "a<|x|>a<|x|><|x|>", "<|xy|>z<|xy|>", "hello helloa xhello hello, _hello hello1 éhello hello",
             " \t lll  a", "a \u3000lll", "rrr \n a", "rrr lll", "lll rrr  lll", " bbb bbbx xbbb  bbb ",
             "the <|x|> the", "a b a b", "thea b", "äöü", "äxäöyö", "日本ä日", "日本 あ AT漢字A", "don't _x9-a",
             "a▁b ▁ ▁▁", "b  b\t\tb", "e\u0301 e", "ünï", "a\nbe$\nae", "hellohello", "lll<|x|>rrr  <|x|>"]
    pieces = ["the", " ", "  ", "a", "lll", "rrr", "bbb", "hello", "<|x|>", "<|xy|>", "z", ".", "in", "oo", "é", "1",
              "22", "▁", "\n", "日", "ä", "th", "a b", "_", "\u00a0"]
    texts += ["".join(rng.choice(pieces) for _ in range(rng.randint(1, 8))) for _ in range(90)]
    return list(dict.fromkeys(texts)) + rng.sample([t for t in corpus if len(t) < 60], 40)


# ---------------------------------------------------------------- chats

def render(template, messages, **values):
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = lambda text: (_ for _ in ()).throw(ValueError(text))
    return environment.from_string(template).render(
        messages=messages, add_generation_prompt=True, **values)


def dialogues():
    system = {"role": "system", "content": "You are terse."}
    user = lambda text: {"role": "user", "content": text}
    answer = lambda text: {"role": "assistant", "content": text}
    thoughts = "<think>\nFirst, 2+2.\n\nThen more.\n</think>\n\nFour."
    return [
        [user("What is 2+2?")],
        [system, user("What is 2+2?")],
        [user("Hi"), answer("Hello!"), user("And?")],
        [system, user(" padded \n"), answer("\n\n x \t"), user("\u00a0\u3000y\u2003\x1c")],
        [user("Hi"), answer(thoughts), user("And 3+3?")],
        [user("Hi"), answer(thoughts)],
        [user("Hi"), answer("no thoughts")],
        [user("Hi"), answer(thoughts), user("<tool_response>\n4\n</tool_response>")],
        [user("Hi"), answer(thoughts), answer("second"), user("<tool_response>4</tool_response>"), answer("Done")],
        [user("Hi"), answer("a</think>b<think>c</think>\n\nd"), user("x")],
        [user("Hi"), answer("</think>\n\n"), user("x"), answer("<think>\n\n</think>\n\n")],
        [user("Hi"), answer("<think>only open"), user("x")],
        [user("one"), system, user("two")],
        [system, system, user("two")],
        [user("<tool_response>a</tool_response>")],
        [user(""), answer(""), user("")],
        [user("\n\nleading lines"), answer("\nx\n"), user("日本語 e\u0301 🙂")],
    ]


def make_chats(data, llama31):
    config = lambda path: json.loads((data / path / "tokenizer_config.json").read_text())["chat_template"]
    templates = {"chatml-smollm2": config("smollm2"), "qwen3": config("tokenizers/qwen3"),
                 "llama-3.0": config("tokenizers/llama3")}
    if llama31:
        templates["llama-3.1"] = llama31.read_text()
    chats = []
    for kind, template in templates.items():
        for think in (True, False) if kind == "qwen3" else (True,):
            for messages in dialogues():
                values = {} if think else {"enable_thinking": False}
                chats.append({"kind": kind, "think": think, "messages": messages,
                              "text": render(template, messages, bos_token="<|begin_of_text|>", **values)})
    # Only the two templates under the Apache licence are kept as texts; Llama's stay out of the
    # repository.
    return {"templates": {k: templates[k] for k in ("chatml-smollm2", "qwen3")}, "chats": chats}


# ---------------------------------------------------------------- output

def fnv(numbers):
    """FNV-1a over numbers, as tests/test_tokenizer.cpp computes it."""
    value = 0xCBF29CE484222325
    for number in numbers:
        value = ((value ^ (number & 0xFFFFFFFF)) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value


def text_hash(text):
    return fnv(text.encode())


def hash_of_all(id_lists):
    return f"{fnv(n for ids in id_lists for n in [len(ids), *ids]):016x}"


def encode_all(tokenizer, texts):
    return [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]


def decodings(rng, tokenizer, n, declared):
    """Random id sequences and their text. Left out: broken UTF-8 in byte fallback (decode.h), and
    "normalized" added tokens that this version of the library prints in their normalized form."""
    result = []
    size = tokenizer.get_vocab_size()
    odd = {t["id"] for t in declared["added_tokens"] if tokenizer.id_to_token(t["id"]) != t["content"]}
    has_fallback = tokenizer.token_to_id("<0x41>") is not None
    while len(result) < n:
        ids = [rng.randrange(size) for _ in range(rng.randint(0, 12))]
        skip = rng.random() < 0.5
        text = tokenizer.decode(ids, skip_special_tokens=skip)
        if not (has_fallback and "\ufffd" in text) and not odd & set(ids):
            result.append([ids, skip, text])
    return result


def write(path, value):
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    path.write_text(text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029").replace("\u0085", "\\u0085") + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--llama31", type=Path, help="chat_template text of Llama-3.1 or 3.2 Instruct")
    args = parser.parse_args()
    rng = random.Random(SEED)
    corpus = make_corpus(rng)
    load = lambda path: json.loads((args.data / path / "tokenizer.json").read_text())

    small = {"smollm2": cut(load("tokenizers/smollm2"), N_MERGES), "qwen3": cut(load("tokenizers/qwen3"), N_MERGES),
             "llama3": llama3_style(load("tokenizers/smollm2"))}
    result = {"texts": corpus, "ids": {}, "decode": {}, "full": {}}
    whole = {name: load(name) for name in ("stories260k", "babyllama-tok105")}
    for name, value in {**small, **whole}.items():
        tokenizer = Tokenizer.from_str(json.dumps(value))
        result["ids"][name] = encode_all(tokenizer, corpus)
        result["decode"][name] = decodings(rng, tokenizer, 120, value)
    for name, value in small.items():
        write(args.out / f"{name}.json", value)
    for name in ("tokenizers/smollm2", "tokenizers/qwen3", "tokenizers/llama3", "stories260k", "babyllama-tok105"):
        tokenizer = Tokenizer.from_file(str(args.data / name / "tokenizer.json"))
        result["full"][name] = hash_of_all(encode_all(tokenizer, corpus))
    write(args.out / "corpus.json", result)

    features = {"texts": feature_texts(rng, corpus), "tokenizers": []}
    for name, value in feature_tokenizers().items():
        tokenizer = Tokenizer.from_str(json.dumps(value))
        features["tokenizers"].append({
            "name": name, "tokenizer": value, "ids": encode_all(tokenizer, features["texts"]),
            "decode": decodings(rng, tokenizer, 20, value)})
        expected = [t["id"] for t in value["added_tokens"]]
        if expected != [tokenizer.token_to_id(t["content"]) for t in value["added_tokens"]]:
            sys.exit(f"{name}: ids of added tokens differ")
    write(args.out / "features.json", features)

    chats = make_chats(args.data, args.llama31)
    for chat in chats["chats"]:
        name = {"chatml-smollm2": "smollm2", "qwen3": "qwen3"}.get(chat["kind"], "llama3")
        tokenizer = Tokenizer.from_str(json.dumps(small[name]))
        chat["ids"] = tokenizer.encode(chat["text"], add_special_tokens=False).ids
    write(args.out / "chat.json", chats)
    for kind, template in chats["templates"].items():
        print(f"fingerprint {kind}: 0x{text_hash(template):016X}")
    print(f"{len(corpus)} texts, {len(features['tokenizers'])} feature tokenizers, {len(chats['chats'])} chats")


if __name__ == "__main__":
    main()
