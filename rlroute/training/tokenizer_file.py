"""Tokenizer files of Hugging Face's ``tokenizers``, read as data: checked here before the library's native code sees
them.

Byte-level BPE alone is taken, and nothing in it that draws at random or changes text. What a file says of truncation,
padding and what is put around a text is left out: a corpus is encoded whole.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from rlroute.errors import DataError
from rlroute.foreign import read_bytes, why

MAX_BYTES = 2**26
MAX_TOKENS = 2**20
MAX_PATTERN = 2**12
"""Bytes of a file, entries of a vocabulary and characters of a pattern: several times what published ones have."""
_MAX_DEPTH = 4  # of a sequence of pre-tokenizers: each level is a call of native code

_FLAG, _TEXT = bool, str
_BEHAVIOURS = ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
_PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "ByteLevel": {"add_prefix_space": _FLAG, "trim_offsets": _FLAG, "use_regex": _FLAG},
    "Digits": {"individual_digits": _FLAG},
    "Punctuation": {"behavior": _BEHAVIOURS},
    "Split": {"pattern": dict, "behavior": _BEHAVIOURS, "invert": _FLAG},
    "Sequence": {"pretokenizers": list},
}
_ADDED = {
    "id": int,
    "content": _TEXT,
    "single_word": _FLAG,
    "lstrip": _FLAG,
    "rstrip": _FLAG,
    "normalized": _FLAG,
    "special": _FLAG,
}


class TokenizerData(NamedTuple):
    """What a tokenizer file says.

    Attributes:
        text: JSON for the library: the file's own, without what does not apply.
        bytes_V: the bytes of text that each id stands for; none for special tokens, and for ids that nothing has.
        added: the added tokens' contents, by id.
        exact: whether it leaves every text as it is; else it may, and the texts must be compared.
    """

    text: str
    bytes_V: list[bytes]
    added: dict[int, str]
    exact: bool


@cache
def byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for (GPT-2,
    github.com/openai/gpt-2/blob/master/src/encoder.py).
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def read_tokenizer(path: str | Path) -> tuple[TokenizerData, bytes]:
    """Return what a tokenizer file says, and its bytes.

    Raises:
        DataError: it is no file that can be read, or says anything but a byte-level BPE that keeps texts as they are.
    """
    where = f"tokenizer {str(path)!r}"
    raw = _bytes(Path(path), where)
    try:
        said = json.loads(raw)
        json.dumps(said, ensure_ascii=False).encode()  # what is no Unicode shall not come to native code
    except (ValueError, RecursionError) as error:
        _refuse(where, f"cannot be read: {str(error) or 'too deep'}", "a tokenizers JSON file")
    _is(where, "the file", said, dict)
    model, added = _model(where, said.get("model")), _added(where, said.get("added_tokens") or [])
    normalizer = _normalizer(where, said.get("normalizer"))
    pre_tokenizer = _pre_tokenizer(where, said.get("pre_tokenizer"))
    exact = normalizer is None and not ({"add_prefix_space", "Removed"} & set(_changes(pre_tokenizer)))
    parts = {"added_tokens": added, "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "model": model}
    unused = {"version": "1.0", "truncation": None, "padding": None, "post_processor": None, "decoder": None}
    contents = {token["id"]: token["content"] for token in added}
    return TokenizerData(json.dumps(unused | parts), _bytes_V(model["vocab"], added), contents, exact), raw


def _bytes(path: Path, where: str) -> bytes:
    try:
        return read_bytes(path, MAX_BYTES, follow=True)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        _refuse(where, f"cannot be read: {why(error)}", "a tokenizers JSON file")


def _model(where: str, model: Any) -> dict[str, Any]:
    _is(where, "model", model, dict)
    if model.get("type", "BPE") != "BPE":
        _refuse(where, f"has a model of type {model['type']!r}", "byte-level BPE alone")
    for name in ("dropout", "alpha", "nbest_size"):
        if model.get(name):
            _refuse(where, f"draws at random: {name} = {model[name]!r}", f"{name} null")
    for name in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            _refuse(where, f"is not byte-level: {name} = {model[name]!r}", "byte-level BPE alone")
    _is(where, "model.ignore_merges", model.get("ignore_merges") or False, bool)
    vocab = _vocab(where, model.get("vocab"))
    merges = _merges(where, model.get("merges"), vocab)
    return {"type": "BPE", "ignore_merges": bool(model.get("ignore_merges")), "vocab": vocab, "merges": merges}


def _vocab(where: str, vocab: Any) -> dict[str, int]:
    _is(where, "model.vocab", vocab, dict)
    for token, index in vocab.items():
        _is_id(where, token, index)
    if len(set(vocab.values())) < len(vocab):
        _refuse(where, "gives two tokens of its vocabulary one id", "an id for each")
    missing = sorted(byte for char, byte in byte_alphabet().items() if char not in vocab)
    if missing:
        _refuse(where, f"is not byte-level: byte {missing[0]} has no token", "a vocabulary with all 256 bytes")
    return dict(vocab)


def _merges(where: str, merges: Any, vocab: dict[str, int]) -> list[list[str]]:
    _is(where, "model.merges", merges, list)
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    for merge, pair in zip(merges, pairs, strict=True):
        two = isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
        if not two or not all(token in vocab for token in (*pair, "".join(pair))):
            _refuse(where, f"has the merge {merge!r:.80}", "two tokens of the vocabulary that make a third")
    return pairs


def _added(where: str, added: Any) -> list[dict[str, Any]]:
    _is(where, "added_tokens", added, list)
    for token in added:
        _fields(where, "added_tokens", token, _ADDED)
        _is_id(where, token["content"], token["id"])
        if not token["content"]:
            _refuse(where, "has an empty added token", "tokens of some text")
    return list(added)


def _normalizer(where: str, normalizer: Any) -> dict[str, str] | None:
    if normalizer is None or (isinstance(normalizer, dict) and normalizer.get("normalizers") == []):
        return None
    if normalizer == {"type": "NFC"}:  # Qwen's; leaves most texts as they are, and is compared with each
        return {"type": "NFC"}
    kind = normalizer.get("type") if isinstance(normalizer, dict) else normalizer
    _refuse(where, f"changes text: normalizer {kind!r:.80}", "no normalizer, or NFC where it changes nothing")


def _pre_tokenizer(where: str, said: Any, depth: int = 0) -> dict[str, Any]:
    _is(where, "pre_tokenizer", said, dict)
    kind = said.get("type")
    if not isinstance(kind, str) or kind not in _PRE_TOKENIZERS or depth > _MAX_DEPTH:
        _refuse(where, f"has pre_tokenizer {kind!r:.80} at depth {depth}", f"{', '.join(_PRE_TOKENIZERS)}")
    fields = {name: value for name, value in said.items() if name != "type"}
    _fields(where, kind, fields, _PRE_TOKENIZERS[kind])
    if kind == "Split":
        _pattern(where, said["pattern"])
    if kind == "Sequence":
        parts = [_pre_tokenizer(where, part, depth + 1) for part in said["pretokenizers"]]
        fields = {"pretokenizers": parts}
    if depth == 0 and "ByteLevel" not in _kinds(said):
        _refuse(where, f"is not byte-level: pre_tokenizer {kind!r}", "a byte-level one ('ByteLevel')")
    return {"type": kind} | fields


def _pattern(where: str, pattern: dict[str, Any]) -> None:
    (kind, text), *more = pattern.items() or [("", None)]
    if more or kind not in ("Regex", "String") or not isinstance(text, str) or not 0 < len(text) <= MAX_PATTERN:
        _refuse(where, f"has the pattern {pattern!r:.80}", f"Regex or String of 1 to {MAX_PATTERN} characters")


def _kinds(said: dict[str, Any]) -> list[str]:
    return [said["type"], *(kind for part in said.get("pretokenizers", ()) for kind in _kinds(part))]


def _changes(said: dict[str, Any]) -> list[str]:
    """Return what a pre-tokenizer says that changes text: a prefix, or the removal of what it splits at."""
    here = ["add_prefix_space"] if said.get("add_prefix_space") else []
    here += [said["behavior"]] if said.get("behavior") == "Removed" else []
    return here + [change for part in said.get("pretokenizers", ()) for change in _changes(part)]


def _fields(where: str, what: str, said: Any, legal: dict[str, Any]) -> None:
    """Refuse a mapping that lacks one of the fields, or has others, or a value of another type."""
    _is(where, what, said, dict)
    if said.keys() - legal.keys():
        _refuse(where, f"has {what}.{min(said.keys() - legal.keys()):.80}", f"of {what} {', '.join(legal)}")
    for name, kind in legal.items():
        if isinstance(kind, tuple):
            if said.get(name) not in kind:
                _refuse(where, f"has {what}.{name} = {said.get(name)!r:.80}", ", ".join(kind))
        elif name in said or kind is not bool:
            _is(where, f"{what}.{name}", said.get(name), kind)


def _is(where: str, what: str, value: Any, kind: type) -> None:
    if type(value) is not kind:
        _refuse(where, f"has {what} = {value!r:.80}", f"{kind.__name__} there")


def _is_id(where: str, token: str, index: Any) -> None:
    if type(index) is not int or not 0 <= index < MAX_TOKENS:
        _refuse(where, f"gives token {token!r:.80} the id {index!r:.80}", f"0 to {MAX_TOKENS - 1}")


def _bytes_V(vocab: dict[str, int], added: list[dict[str, Any]]) -> list[bytes]:
    bytes_V = [b""] * (1 + max([*vocab.values(), *(token["id"] for token in added)]))
    alphabet = byte_alphabet()
    for token, index in vocab.items():
        if all(char in alphabet for char in token):
            bytes_V[index] = bytes(alphabet[char] for char in token)
    for said in added:
        bytes_V[said["id"]] = b"" if said["special"] else said["content"].encode()
    return bytes_V


def _refuse(where: str, found: str, legal: str) -> NoReturn:
    raise DataError(f"{where} {found}; legal is {legal}")
