"""Reads a byte-level BPE `tokenizer.json`, as GPT-2's, Llama 3's, Qwen's and DeepSeek's, into `Pieces` with merges.

GGUF names the pre-tokenizer instead of describing it. llama.cpp's converter recognises it by a hash of the ids that it
gives a certain text; here its expressions are looked up. Knows what the file may hold beside tokens and merges, and
that `fiddler.text.bpe` gives the same ids; not the other files of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from fiddler.converters.tokenizer.pieces import Piece, Pieces
from fiddler.converters.tokenizer.steps import steps_of
from fiddler.errors import CheckpointError, quoted
from fiddler.text.bpe_letters import LETTERS, missing_letters
from fiddler.text.byte_level_keys import ByteLevelKeys
from fiddler.text.pre_tokenizers import DIGITS, GPT2, name_of
from fiddler.text.sentencepiece_model import TokenType
from fiddler.text.vocabulary import LARGEST_VOCABULARY

__all__ = ["byte_level_pieces", "is_byte_level"]

_Refused = Callable[[str], CheckpointError]
_BREAKS = str.maketrans({"\r": r"\r", "\n": r"\n"})  # some files hold the characters themselves
_POST_PROCESSORS = ("ByteLevel", "TemplateProcessing")  # a type in the file may be no text: no set


def is_byte_level(root: Mapping[str, object]) -> bool:
    """Whether bytes are letters in this `tokenizer.json`: then no "▁" stands for a space."""
    steps = steps_of(root.get("pre_tokenizer"), "pretokenizers") + steps_of(root.get("decoder"), "decoders")
    return any(step.get("type") == "ByteLevel" for step in steps)


def byte_level_pieces(
    root: Mapping[str, object], model: Mapping[str, object], vocab: Mapping[str, int], source: str
) -> Pieces:
    """The tokens of a file that `is_byte_level`, its merges and the name of its pre-tokenizer.

    Raises CheckpointError, which names the part, where some text would get other ids.
    """

    def refused(reason: str) -> CheckpointError:
        return CheckpointError(f"{source}: {reason}, which byte-level BPE in a GGUF cannot follow")

    if model.get("type", "BPE") != "BPE":
        raise refused(f"its model is {quoted(model.get('type'), 40)}, not BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise refused(f"model.{key} is {quoted(model[key], 40)}")
    normalizers = [step.get("type") for step in steps_of(root.get("normalizer"), "normalizers")]
    if normalizers not in ([], ["NFC"]):
        raise refused(f"its normalizer is {' + '.join(quoted(name, 40) for name in normalizers)}")
    decoders = [step.get("type") for step in steps_of(root.get("decoder"), "decoders")]
    if decoders != ["ByteLevel"]:
        raise refused(f"its decoder is {' + '.join(quoted(name, 40) for name in decoders) or 'missing'}")
    for step in steps_of(root.get("post_processor"), "processors"):
        if step.get("type") not in _POST_PROCESSORS:
            raise refused(f"its post-processor is {quoted(step.get('type'), 40)}")
    ignore_merges = model.get("ignore_merges") is True
    steps = tuple(_expressions(steps_of(root.get("pre_tokenizer"), "pretokenizers"), refused))
    pre = name_of(steps, ignore_merges)
    if pre is None:
        raise refused(f"its pre-tokenizer splits at {quoted(' then '.join(steps), 300)}")
    if missing := missing_letters(vocab):
        raise refused(f"its vocabulary lacks {len(missing)} of the 256 bytes, {missing[0]:#04x} among them")
    keys = ByteLevelKeys(pre, _merges(model.get("merges"), vocab, source), ignore_merges, normalizers == ["NFC"])
    unknown = model.get("unk_token")
    return Pieces(
        source=source,
        by_id={index: Piece(text, 0.0, TokenType.NORMAL) for text, index in vocab.items()},
        names={"unk": unknown} if isinstance(unknown, str) else {},
        add_space_prefix=False,
        byte_level=keys,
    )


def _expressions(steps: list[dict[str, object]], refused: _Refused) -> Iterator[str]:
    """The pre-tokenizer's expressions in order; its last step must be `ByteLevel`."""
    for position, step in enumerate(steps):
        kind, last = step.get("type"), position == len(steps) - 1
        if (kind == "ByteLevel") != last:
            raise refused(f"its pre-tokenizer is {' + '.join(quoted(one.get('type'), 40) for one in steps)}")
        if kind == "ByteLevel":
            if step.get("add_prefix_space", True):
                raise refused("its pre-tokenizer sets add_prefix_space")
            if step.get("use_regex", True):
                yield GPT2
        elif kind == "Digits":
            yield DIGITS if step.get("individual_digits") is True else r"\p{N}+"
        elif kind == "Split":
            yield _split(step, refused)
        else:
            raise refused(f"its pre-tokenizer has the step {quoted(kind, 40)}")


def _split(step: dict[str, object], refused: _Refused) -> str:
    pattern = step.get("pattern")
    expression = pattern.get("Regex") if isinstance(pattern, dict) else None
    if not isinstance(expression, str):
        raise refused(f"its pre-tokenizer splits at {quoted(pattern, 100)}")
    behaviour = (step.get("behavior"), step.get("invert"))
    # Where an expression matches every character, what it leaves over is nothing.
    total = behaviour == ("Removed", True) and expression.endswith(r"|\s+(?!\S)|\s+")
    if behaviour != ("Isolated", False) and not total:
        raise refused(f"its pre-tokenizer's Split is {quoted(behaviour[0], 40)}, invert {quoted(behaviour[1], 40)}")
    return expression.translate(_BREAKS)


def _merges(value: object, vocab: Mapping[str, int], source: str) -> list[str]:
    """The merges as GGUF writes them, by rank: of a pair that is listed twice the last one, as in the library.

    Those with a character that no byte is written as never apply and are left out: GGUF could not hold a space in one.
    """
    if not isinstance(value, list):
        raise CheckpointError(f"{source}: model.merges is {quoted(value, 40)}; it must be a list")
    if len(value) > LARGEST_VOCABULARY:
        raise CheckpointError(f"{source}: it has {len(value)} merges; at most {LARGEST_VOCABULARY} convert")
    letters = frozenset(LETTERS)
    merges: dict[str, None] = {}
    for rank, merge in enumerate(value):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise CheckpointError(f"{source}: merge {rank} is {quoted(merge, 60)}; it must be two tokens")
        left, right = pair
        for text in (left, right, left + right):
            if text not in vocab:
                raise CheckpointError(f"{source}: merge {rank} needs {quoted(text, 60)}, which is no token")
        if letters.issuperset(left + right):
            written = f"{left} {right}"
            merges.pop(written, None)
            merges[written] = None
    return list(merges)
