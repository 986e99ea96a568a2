"""The pretended model: deterministic tokens, KV bytes and output, equal on every instance."""

import hashlib
import re
import zlib

BLOCK_SIZE = 128  # tokens per KV block
BYTES_PER_TOKEN = 256
END_MARK = "<|endoftext|>"  # a prompt that ends so is answered by the end token at once
_VOCABULARY = 150_000
_WORDS = (
    "the a one some every small large quick slow bright calm open new old first last north south "
    "river model token cache prefill decode device rank link host table engine proxy answer "
    "moves holds reads writes finds gives takes keeps starts ends joins splits waits runs "
    "and or then while because where with without over under near"
).split()


def tokenize(text: str) -> list[int]:
    """Token ids of a text: words and punctuation marks."""
    body, ended, _ = text.partition(END_MARK) if text.endswith(END_MARK) else (text, "", "")
    ids = [zlib.crc32(piece.encode()) % _VOCABULARY for piece in _PIECES.findall(body)]
    return [*ids, _VOCABULARY] if ended else ids


def kv_of(prompt_ids: list[int]) -> bytes:
    """The KV cache a prefill of this prompt leaves behind."""
    seed = ",".join(map(str, prompt_ids)).encode()
    return hashlib.shake_256(seed).digest(BYTES_PER_TOKEN * len(prompt_ids))


def block_count(tokens: int) -> int:
    """KV blocks that many tokens fill."""
    return -(-tokens // BLOCK_SIZE)


class Output:
    """What the model says after a prompt, computed from the prompt's KV alone."""

    def __init__(self, prompt_ids: list[int], kv: bytes, ignore_eos: bool) -> None:
        self._seed = hashlib.sha256(kv).digest()
        at_once = not ignore_eos and prompt_ids[-1:] == [_VOCABULARY]
        natural = 64 + int.from_bytes(self._seed[:2], "big") % 192
        self.length = 0 if at_once else (1 << 30 if ignore_eos else natural)  # tokens

    def token(self, position: int) -> int:
        """Token id at a position of the answer."""
        digest = hashlib.sha256(self._seed + position.to_bytes(4, "big")).digest()
        return int.from_bytes(digest[:4], "big") % len(_WORDS)

    def text(self, token: int) -> str:
        """A token's text."""
        return " " + _WORDS[token]


_PIECES = re.compile(r"\w+|[^\w\s]")
