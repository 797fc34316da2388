"""The configurations beside a tokenizer that have a say in it, and which of them wins.

Knows the keys of tokenizer_config.json, special_tokens_map.json, added_tokens.json, config.json,
generation_config.json and the chat template's places; does not know the vocabulary itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from fiddler.converters.json_object import read_object
from fiddler.converters.tokenizer.added_token import AddedToken, added_tokens
from fiddler.errors import CheckpointError, quoted

__all__ = ["TokenizerSettings"]


class TokenizerSettings:
    """The configurations beside the tokenizer, each empty where its file is missing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        names = (
            "tokenizer_config",
            "special_tokens_map",
            "added_tokens",
            "config",
            "generation_config",
            "chat_template",
        )
        paths = {name: folder / f"{name}.json" for name in names}
        self._files = {
            name: read_object(path, "download it again") if path.is_file() else {} for name, path in paths.items()
        }

    def _wrong(self, file: str, key: str, value: object, must: str) -> CheckpointError:
        return CheckpointError(f"{self._folder / f'{file}.json'}: {key} is {quoted(value, 60)}; it must be {must}")

    def flag(self, key: str, default: bool) -> bool:
        value = self._files["tokenizer_config"].get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong("tokenizer_config", key, value, "true or false")
        return value

    def added(self, from_tokenizer_json: Iterable[AddedToken]) -> list[AddedToken]:
        """Added tokens of all files, one an id; raises CheckpointError where they disagree on its text."""
        where = str(self._folder / "tokenizer_config.json: added_tokens_decoder")
        plain = [{"id": index, "content": text} for text, index in self._files["added_tokens"].items()]
        named = self._special_texts()
        found: dict[int, AddedToken] = {}
        for token in (
            *added_tokens(plain, str(self._folder / "added_tokens.json")),
            *from_tokenizer_json,
            *added_tokens(self._files["tokenizer_config"].get("added_tokens_decoder"), where),
        ):
            known = found.get(token.id)
            if known is not None and known.text != token.text:
                raise CheckpointError(
                    f"{self._folder}: token {token.id} is {quoted(known.text, 60)} in one of its files and "
                    f"{quoted(token.text, 60)} in another; download them again"
                )
            special = token.special or (known is not None and known.special) or token.text in named
            # Some checkpoints leave tokens of their chat format unmarked; llama.cpp goes by the name, too.
            special = special or (token.text.startswith("<|") and token.text.endswith("|>"))
            found[token.id] = AddedToken(token.id, token.text, special)
        return list(found.values())

    def _special_texts(self) -> set[str]:
        found: set[str] = set()
        for file in ("tokenizer_config", "special_tokens_map"):
            for key, value in self._files[file].items():
                if key.endswith("_token") and (text := _text(value)) is not None:
                    found.add(text)
                elif key in ("additional_special_tokens", "extra_special_tokens"):
                    each = list(value.values()) if isinstance(value, dict) else value
                    each = each if isinstance(each, list) else []
                    found |= {text for one in each if (text := _text(one)) is not None}
        return found

    def special_id(self, name: str, names: Mapping[str, str], ids: Mapping[str, int], vocab_size: int) -> int | None:
        """The id of "bos", "eos", "unk" or "pad": by its text in the tokenizer's files, else the model's id."""
        key = f"{name}_token"
        for file in ("tokenizer_config", "special_tokens_map"):
            value = self._files[file].get(key)
            text = _text(value)
            if value is not None and text is None:
                raise self._wrong(file, key, value, "a token's text")
            if text is not None and text in ids:
                return ids[text]
        if name in names and names[name] in ids:
            return ids[names[name]]
        for file in ("config", "generation_config"):
            for index in self._ids(file, f"{key}_id", vocab_size, lenient=name == "pad"):
                return index
        return None

    def more_end_ids(self, eos_id: int, vocab_size: int) -> tuple[int, ...]:
        """At most two further tokens that `eos_token_id` of the model's configurations lists."""
        listed = [i for file in ("generation_config", "config") for i in self._ids(file, "eos_token_id", vocab_size)]
        return tuple(dict.fromkeys(index for index in listed if index != eos_id))[:2]

    def _ids(self, file: str, key: str, vocab_size: int, *, lenient: bool = False) -> list[int]:
        value = self._files[file].get(key)
        found: list[int] = []
        for index in value if isinstance(value, list) else [] if value is None else [value]:
            if isinstance(index, int) and not isinstance(index, bool) and 0 <= index < vocab_size:
                found.append(index)
            elif not lenient:  # an id of -1 is how some say that they have no padding
                raise self._wrong(file, key, value, f"the id of one of {vocab_size} tokens")
        return found

    def chat_templates(self) -> dict[str, str]:
        """Chat templates by name, the usual one as "default". Files of their own count before the configurations."""
        default = self._folder / "chat_template.jinja"
        more = sorted((self._folder / "additional_chat_templates").glob("*.jinja"))
        found = {path.stem: _read(path) for path in more} | ({"default": _read(default)} if default.is_file() else {})
        for file in ("chat_template", "tokenizer_config"):
            value = self._files[file].get("chat_template")
            if found or value is None:
                continue
            if isinstance(value, str):
                found = {"default": value}
            elif isinstance(value, list):
                for one in value:
                    name, text = (one.get("name"), one.get("template")) if isinstance(one, dict) else (None, None)
                    if not isinstance(name, str) or not isinstance(text, str):
                        raise self._wrong(file, "chat_template", value, "a list of objects with name and template")
                    found[name] = text
            else:
                raise self._wrong(file, "chat_template", value, "a string or a list")
        return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {quoted(str(error))}; download it again") from None


def _text(value: object) -> str | None:
    """A special token's text, which is written as a string or as an object with `content`."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None
