"""What answers say of the KV behind them. Pure.

At temperature 0 the same prompt should get the same answer, whichever prefill made its KV. But
engines are not batch-invariant, and some are not even deterministic: so each prefill is compared
with itself first, and a difference that is there already says nothing.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """Two answers to one prompt that should be equal.

    `by_itself`: one and the same server gave both.
    """

    prompt: str
    one: str
    other: str
    of_one: str
    of_other: str

    @property
    def by_itself(self) -> bool:
        """Whether it means nothing: a server differs from itself as well."""
        return self.of_one == self.of_other

    def __str__(self) -> str:
        return (
            f"{self.one!r} with the KV of {self.of_one} and {self.other!r} with that of "
            f"{self.of_other} to {self.prompt!r}"
        )


def difference(prompt: str, answers: Mapping[str, Sequence[str]]) -> Difference | None:
    """Find the first difference among the answers to a prompt, by prefill; None if all are equal.

    A prefill that differs from itself is named before two that differ from each other.
    """
    for name, texts in answers.items():
        other = next((text for text in texts if text != texts[0]), None)
        if other is not None:
            return Difference(prompt, texts[0], other, name, name)
    firsts = [(name, texts[0]) for name, texts in answers.items() if texts]
    for name, text in firsts[1:]:
        if text != firsts[0][1]:
            return Difference(prompt, firsts[0][1], text, firsts[0][0], name)
    return None


def fits(pattern: str, text: str) -> bool:
    """Tell whether an answer has what a check expects."""
    return re.search(pattern, text) is not None


def strays(handed_over: Mapping[str, str], alone: Mapping[str, str]) -> bool:
    """Tell whether no answer by a prefill's KV is the one that decode gives without it.

    One prompt may well go another way, because the two compute in another order; that all of them
    do is what other KV looks like.

    Args:
        handed_over: by prompt, the answer by a prefill's KV.
        alone: by prompt, decode's own; only what it gave twice in the same way.
    """
    both = handed_over.keys() & alone.keys()
    return bool(both) and all(handed_over[prompt] != alone[prompt] for prompt in both)
