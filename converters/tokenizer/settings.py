"""Reads tokenizer settings from the configuration files of a Hugging Face folder, by their precedence.

Knows the keys of tokenizer_config.json, special_tokens_map.json, added_tokens.json, config.json and
generation_config.json, and the files that may hold a chat template; does not know the vocabulary itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from fiddler.converters.json_object import read_object
from fiddler.converters.tokenizer.added_token import AddedToken, added_tokens
from fiddler.errors import CheckpointError, quoted
from fiddler.input_file import present, read_regular

__all__ = ["TokenizerSettings"]

_LARGEST_TEMPLATE = 4 << 20  # [bytes]; the longest in use take some kilobytes


class TokenizerSettings:
    """The configuration files beside the tokenizer; a missing file counts as empty."""

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
            name: read_object(path, "download it again") if present(path) else {} for name, path in paths.items()
        }

    def _error(self, file: str, key: str, value: object, expected: str) -> CheckpointError:
        return CheckpointError(f"{self._folder / f'{file}.json'}: {key} is {quoted(value, 60)}; it must be {expected}")

    def flag(self, key: str, default: bool) -> bool:
        value = self._files["tokenizer_config"].get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._error("tokenizer_config", key, value, "true or false")
        return value

    @property
    def legacy(self) -> bool | None:
        """`legacy` of tokenizer_config.json, None where it is absent; null is false, as in transformers."""
        config = self._files["tokenizer_config"]
        return self.flag("legacy", False) if "legacy" in config else None

    def added(self, from_tokenizer_json: Iterable[AddedToken]) -> list[AddedToken]:
        """Added tokens of all files, one per id; raises CheckpointError if they disagree on its text.

        The options of tokenizer.json take precedence, as in transformers.
        """
        where = str(self._folder / "tokenizer_config.json: added_tokens_decoder")
        entries = [{"id": index, "content": text} for text, index in self._files["added_tokens"].items()]
        special_texts = self._special_texts()
        by_id: dict[int, AddedToken] = {}
        for token in (
            *added_tokens(entries, str(self._folder / "added_tokens.json")),
            *added_tokens(self._files["tokenizer_config"].get("added_tokens_decoder"), where),
            *from_tokenizer_json,
        ):
            earlier = by_id.get(token.id)
            if earlier is not None and earlier.text != token.text:
                raise CheckpointError(
                    f"{self._folder}: token {token.id} is {quoted(earlier.text, 60)} in one of its files and "
                    f"{quoted(token.text, 60)} in another; download them again"
                )
            special = token.special or (earlier is not None and earlier.special) or token.text in special_texts
            # Some checkpoints do not mark the tokens of their chat format; llama.cpp recognises them by name, too.
            special = special or (token.text.startswith(("<|", "<｜")) and token.text.endswith(("|>", "｜>")))
            by_id[token.id] = AddedToken(token.id, token.text, special, token.options)
        return list(by_id.values())

    def _special_texts(self) -> set[str]:
        texts: set[str] = set()
        for file in ("tokenizer_config", "special_tokens_map"):
            for key, value in self._files[file].items():
                if key.endswith("_token") and (text := _text(value)) is not None:
                    texts.add(text)
                elif key in ("additional_special_tokens", "extra_special_tokens"):
                    entries = list(value.values()) if isinstance(value, dict) else value
                    entries = entries if isinstance(entries, list) else []
                    texts |= {text for entry in entries if (text := _text(entry)) is not None}
        return texts

    def special_id(self, name: str, names: Mapping[str, str], ids: Mapping[str, int], vocab_size: int) -> int | None:
        """The id of "bos", "eos", "unk" or "pad": by its text in the tokenizer's files, else from the model's files.

        `names`: the texts that the vocabulary's file gives these tokens; `ids`: text -> id of every token.
        """
        key = f"{name}_token"
        for file in ("tokenizer_config", "special_tokens_map"):
            value = self._files[file].get(key)
            text = _text(value)
            if value is not None and text is None:
                raise self._error(file, key, value, "a token's text")
            if text is not None and text in ids:
                return ids[text]
        if name in names and names[name] in ids:
            return ids[names[name]]
        for file in ("config", "generation_config"):
            for index in self._ids(file, f"{key}_id", vocab_size, lenient=name == "pad"):
                return index
        return None

    def more_end_ids(self, eos_id: int, vocab_size: int) -> tuple[int, ...]:
        """At most two more end tokens from `eos_token_id` in generation_config.json and config.json."""
        end_ids = [i for file in ("generation_config", "config") for i in self._ids(file, "eos_token_id", vocab_size)]
        return tuple(dict.fromkeys(index for index in end_ids if index != eos_id))[:2]

    def _ids(self, file: str, key: str, vocab_size: int, *, lenient: bool = False) -> list[int]:
        value = self._files[file].get(key)
        ids: list[int] = []
        for index in value if isinstance(value, list) else [] if value is None else [value]:
            if isinstance(index, int) and not isinstance(index, bool) and 0 <= index < vocab_size:
                ids.append(index)
            elif not lenient:  # some checkpoints without a padding token write -1
                raise self._error(file, key, value, f"the id of one of {vocab_size} tokens")
        return ids

    def chat_templates(self) -> dict[str, str]:
        """Chat templates by name, the usual one as "default"; `.jinja` files take precedence over configurations."""
        default = self._folder / "chat_template.jinja"
        more = sorted((self._folder / "additional_chat_templates").glob("*.jinja"))
        texts = {path.stem: _read(path) for path in more} | ({"default": _read(default)} if present(default) else {})
        for file in ("chat_template", "tokenizer_config"):
            value = self._files[file].get("chat_template")
            if texts or value is None:
                continue
            if isinstance(value, str):
                texts = {"default": value}
            elif isinstance(value, list):
                for entry in value:
                    name, text = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
                    if not isinstance(name, str) or not isinstance(text, str):
                        raise self._error(file, "chat_template", value, "a list of objects with name and template")
                    texts[name] = text
            else:
                raise self._error(file, "chat_template", value, "a string or a list")
        return texts


def _read(path: Path) -> str:
    try:
        return read_regular(path, _LARGEST_TEMPLATE).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else quoted(str(error))
        raise CheckpointError(f"{path}: cannot be read: {reason}; download it again") from None


def _text(value: object) -> str | None:
    """A special token's text, written as a string or as an object with `content`."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None
