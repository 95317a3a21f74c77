"""A trial of somebody else's tokenizer in a process of its own, with limits: some rules never end, or fill a machine.

A tokenizer's rules are regular expressions and replacements that its file brings along, and run in Rust, where nothing
of this process can interrupt them. Here they read texts that are long in the ways in which such rules go wrong, and put
them together again, and every token.
`python core_training/models/tokenizer_trial.py SECONDS BYTES` is that process; it imports nothing of the project.
"""

from __future__ import annotations

import hashlib
import resource
import subprocess
import sys

_SECONDS = 10
"""Of a processor; honest ones take one or two."""
_PATIENCE = 120.0
_MEMORY = 4 * 2**30
_LENGTH = 4000

_passed: set[bytes] = set()
"""The digests of those that this process has tried out."""


class TrialError(RuntimeError):
    """What the tokenizer did."""


def is_panic(error: BaseException) -> bool:
    """Whether Rust gave up, as where a rule has gone back and forth ten million times: no Exception of Python's."""
    return type(error).__name__ == "PanicException"


def try_out(document: bytes) -> None:
    """Have a tokenizer (the content of a `tokenizer.json`) read such texts and put them together again, once a process.

    Raises TrialError where it does not get through them.
    """
    digest = hashlib.sha256(document).digest()
    if digest in _passed:
        return
    command = [sys.executable, "-I", __file__, str(_SECONDS), str(_MEMORY)]
    try:
        done = subprocess.run(command, input=document, capture_output=True, timeout=_PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        raise TrialError(f"it does not read {_LENGTH} characters in {_PATIENCE:g} s") from None
    if done.returncode != 0:
        raise TrialError(
            f"it does not read {_LENGTH} characters alike within {_SECONDS} s and {_MEMORY >> 30} GiB; its rules "
            "(normalizer, pre_tokenizer, decoder) go back and forth without an end, or unfold"
        )
    _passed.add(digest)


def texts() -> list[str]:
    """Texts that are long in one way each: one character, two in turns, words, lines."""
    alike = [letter * _LENGTH + "\0" for letter in (*map(chr, range(32, 127)), "\n", "\t", "é", "中", "\u0301", "😀")]
    in_turns = [
        pair * (_LENGTH // 2) + "\0" for pair in ("a ", "a1", "aA", "a.", " \n", "1.", "'s", "\r\n", "ab", "xy")
    ]
    return [*alike, *in_turns, "word " * (_LENGTH // 5), "".join(map(chr, range(32, 0x3000)))]


def main() -> None:
    """Read them all under limits; whatever goes wrong ends the process with another status than 0."""
    seconds, memory = int(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_buffer(sys.stdin.buffer.read())
    for text in texts():
        tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False)
    for number in tokenizer.get_vocab().values():
        tokenizer.decode([number], skip_special_tokens=False)


if __name__ == "__main__":
    main()
