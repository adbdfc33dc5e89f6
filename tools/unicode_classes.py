#!/usr/bin/env python3
"""unicode_classes - asks the tokenizers library which code points its patterns match, and writes
tests/fixtures/tokenizers/unicode.json, with which the pre-tokenizer is compared.

    pip install tokenizers==0.23.3
    tools/unicode_classes.py > tests/fixtures/tokenizers/unicode.json

The library runs patterns with Oniguruma, tq with PCRE2; each brings its own Unicode tables."""
import json

import tokenizers
from tokenizers import Regex, pre_tokenizers

ALL = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
CLASSES = [r"\p{L}", r"\p{N}", r"\s", r"\p{M}", r"\p{P}", r"\p{Lu}", r"\p{Ll}", r"\d", r"\w"]
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# A code point in the place of each letter of a contraction.
FRAMES = ["'{}", "'{}e", "'r{}", "'v{}", "'{}l", "'l{}"]


def ranges(codes):
    out = []
    for code in codes:
        if out and (code == out[-1][1] + 1 or (code == 0xE000 and out[-1][1] == 0xD7FF)):
            out[-1][1] = code
        else:
            out.append([code, code])
    return out


def members(pattern):
    """Code points that match: those that a split which removes matches takes out of the text."""
    split = pre_tokenizers.Split(Regex(pattern), "removed")
    left = set()
    for _, (begin, end) in split.pre_tokenize_str("".join(map(chr, ALL))):
        left.update(range(begin, end))
    return [code for i, code in enumerate(ALL) if i not in left]


def contractions(frame):
    """Code points that make the whole of the framed text a contraction."""
    split = pre_tokenizers.Split(Regex(r"\A" + CONTRACTION + r"\z"), "removed")
    return [code for code in ALL if not split.pre_tokenize_str(frame.format(chr(code)))]


def main():
    lines = ['{"source": "tokenizers %s", "licence": "ranges of the Unicode Character Database, '
             'Unicode License v3",' % tokenizers.__version__, '"classes": {']
    rows = [json.dumps(c) + ": " + json.dumps(ranges(members(c)), separators=(",", ":")) for c in CLASSES]
    lines.append(",\n".join(rows) + '},\n"contractions": {')
    rows = [json.dumps(f) + ": " + json.dumps(contractions(f)) for f in FRAMES]
    print("\n".join(lines) + "\n" + ",\n".join(rows) + "}}")


if __name__ == "__main__":
    main()
