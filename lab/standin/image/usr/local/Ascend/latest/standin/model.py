"""The pretended model: deterministic tokens, KV bytes and output, equal on every instance."""

import hashlib
import re
import zlib
from array import array

BLOCK_SIZE = 128  # tokens per KV block
HEADS = 8  # KV heads; a token's bytes are those of its heads, one after the other
BYTES_PER_HEAD = 32
BYTES_PER_TOKEN = HEADS * BYTES_PER_HEAD
DRAWN = 4096  # tokens whose KV is drawn by a hash of the prompt
END_MARK = "<|endoftext|>"  # a prompt that ends so is answered by the end token at once
NUMBERS = 10_000  # 0 to 9999 have token ids of their own, in order; other pieces are hashed
_FIRST_NUMBER = 140_000  # the token id of 0; hashed pieces have ids below it
_END = _FIRST_NUMBER + NUMBERS
_ID_BYTES = 4  # head 0 of a token begins with its id
_WORDS = (
    "the a one some every small large quick slow bright calm open new old first last north south "
    "river model token cache prefill decode device rank link host table engine proxy answer "
    "moves holds reads writes finds gives takes keeps starts ends joins splits waits runs "
    "and or then while because where with without over under near"
).split()
_COMMA = len(_WORDS)  # as a token of an answer


def tokenize(text: str) -> list[int]:
    """Split a text into token ids: of words, numbers and punctuation marks."""
    body, ended, _ = text.partition(END_MARK) if text.endswith(END_MARK) else (text, "", "")
    ids = [_token_id(piece) for piece in _PIECES.findall(body)]
    return [*ids, _END] if ended else ids


def kv_of(prompt_ids: list[int]) -> bytes:
    """Compute the KV cache that a prefill of this prompt leaves behind.

    All of it follows from the whole prompt. In long ones, what is drawn comes again after every
    `DRAWN` tokens, all but the ids: to draw more would take longer than to hand it over.
    """
    count = len(prompt_ids)
    ids = array("I", (token & 0xFFFF_FFFF for token in prompt_ids)).tobytes()
    drawn = hashlib.shake_256(ids).digest(BYTES_PER_TOKEN * min(count, DRAWN))
    rounds, rest = divmod(count, DRAWN)
    kv = bytearray().join([*[drawn] * rounds, drawn[: BYTES_PER_TOKEN * rest]])
    for byte in range(_ID_BYTES):
        kv[byte::BYTES_PER_TOKEN] = ids[byte::_ID_BYTES]
    return bytes(kv)


def other_heads(kv: bytes) -> bytes:
    """Return what decode reads if its ranks are paired with the wrong ones of prefill: every byte
    is there, but each head gets its neighbour's."""
    return kv[BYTES_PER_HEAD:] + kv[:BYTES_PER_HEAD]


def block_count(tokens: int) -> int:
    """Count the KV blocks that so many tokens fill."""
    return -(-tokens // BLOCK_SIZE)


class Output:
    """What the model says after a prompt, computed from the prompt's KV alone."""

    def __init__(self, prompt_ids: list[int], kv: bytes, ignore_eos: bool) -> None:
        self._seed = hashlib.sha256(kv).digest()
        self._progression = _progression(kv)
        at_once = not ignore_eos and prompt_ids[-1:] == [_END]
        natural = 64 + int.from_bytes(self._seed[:2], "big") % 192
        self.length = 0 if at_once else (1 << 30 if ignore_eos else natural)  # tokens

    def token(self, position: int) -> int:
        """Return the token id at a position of the answer."""
        if self._progression:
            last, step = self._progression
            ordinal, is_comma = divmod(position, 2)
            number = last + step * (ordinal + 1)
            if 0 <= number < NUMBERS:
                return _COMMA if is_comma else _FIRST_NUMBER + number
        digest = hashlib.sha256(self._seed + position.to_bytes(4, "big")).digest()
        return int.from_bytes(digest[:4], "big") % len(_WORDS)

    def text(self, token: int) -> str:
        """Return a token's text."""
        if token == _COMMA:
            return ","
        return f" {token - _FIRST_NUMBER}" if token >= _FIRST_NUMBER else f" {_WORDS[token]}"


def _token_id(piece: str) -> int:
    if _NUMBER.fullmatch(piece):
        return _FIRST_NUMBER + int(piece)
    return zlib.crc32(piece.encode()) % _FIRST_NUMBER


def _progression(kv: bytes) -> tuple[int, int] | None:
    """Return (last number, step) if the prompt ends in at least three equally spaced numbers."""
    tail = [_id_in(kv, end) for end in range(len(kv), max(0, len(kv) - 6 * BYTES_PER_TOKEN),
                                             -BYTES_PER_TOKEN)]
    numbers: list[int] = []  # from the last one backwards
    comma = False
    for token in tail:
        if token == _COMMA_ID and not comma:
            comma = True
        elif _FIRST_NUMBER <= token < _END:
            numbers.append(token - _FIRST_NUMBER)
            comma = False
        else:
            break
    if len(numbers) < 3 or numbers[0] - numbers[1] != numbers[1] - numbers[2]:
        return None
    return numbers[0], numbers[0] - numbers[1]


def _id_in(kv: bytes, end: int) -> int:
    """Read the id of the token whose KV ends there, as its head 0 has it."""
    start = end - BYTES_PER_TOKEN
    return int.from_bytes(kv[start : start + _ID_BYTES], "little")


_PIECES = re.compile(r"\w+|[^\w\s]")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,3}")
_COMMA_ID = _token_id(",")
