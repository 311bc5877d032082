"""The files of a tokenizer in a Hugging Face folder: read as transformers reads them, and written
so that it reads the same ids from them."""

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import tokenizers
from etils import epath

from popi_jax import files
from popi_jax.data.tokenizer_classes import check_same_tokens, find_class
from popi_jax.errors import UserError

_SPECIAL = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# of the place and the program that wrote a folder
_OF_THE_WRITER = ("auto_map", "processor_class", "backend", "is_local", "local_files_only")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class Files(NamedTuple):
    """What the files of a tokenizer say."""

    tokenizer_json: str  # with the tokens that tokenizer_config.json adds
    settings: dict[str, Any]  # of tokenizer_config.json
    chat_template: str


def read(folder: str | os.PathLike[str]) -> Files:
    """Raises: UserError when a file is missing or broken, no chat template is found, or releases of
    transformers read different ids from the files."""
    root = epath.Path(folder)
    if not root.is_dir():
        fix = "give a Hugging Face folder with tokenizer.json"
        raise UserError(f"model.checkpoint: {root} is not a folder; {fix}")
    if not (root / "tokenizer.json").is_file():
        found = ", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing"
        told = f"not found (the folder holds {found}); slow tokenizers are not read"
        raise UserError(f"{root}/tokenizer.json: {told}")
    state = _read_json(root / "tokenizer.json")
    try:
        settings = _read_settings(root, state)
        _add_tokens(root, state, settings)
        text = json.dumps(state, ensure_ascii=False)
        if "eos_token" not in read_names(settings):
            settings["reply_end"] = _find_eos(root, text)
        if built := find_class(settings, _read_model_type(root)):
            check_same_tokens(root, state, *built)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
        told = f"the files of the tokenizer hold what they should not: {type(e).__name__} {e}"
        raise UserError(f"{root}: {told}") from e
    return Files(text, settings, _find_template(root, settings))


def write(
    folder: str | os.PathLike[str],
    tokenizer_json: str,
    settings: Mapping[str, Any],
    chat_template: str,
) -> None:
    """Writes the files, each of them whole."""
    config = {
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,  # what Hugging Face writes for "no limit"
        **{name: value for name, value in settings.items() if value not in ("", None)},
        **_name_extra(settings),
        # the class that transformers 4 and 5 have both, and that goes by tokenizer.json
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": chat_template,
    }
    for name in (*_OF_THE_WRITER, "extra_special_tokens"):
        config.pop(name, None)
    texts = {"tokenizer.json": tokenizer_json}
    for name, content in (
        ("tokenizer_config", config),
        ("special_tokens_map", read_names(settings)),
    ):
        texts[f"{name}.json"] = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    for name, text in texts.items():
        files.write_whole(epath.Path(folder) / name, text)


def open_backend(tokenizer_json: str, source: str) -> tokenizers.Tokenizer:
    """Raises: UserError when it is no tokenizer of the library."""
    try:
        backend = tokenizers.Tokenizer.from_str(tokenizer_json)
    except Exception as e:  # the library raises plain Exception for every defect of the file
        told = f"tokenizer.json is not a tokenizer of Hugging Face tokenizers: {e}"
        raise UserError(f"{source}: {told}") from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def read_names(settings: Mapping[str, Any]) -> dict[str, str]:
    """The names of the special tokens that the files have, as a chat template gets them."""
    found = {name: settings.get(name) for name in _SPECIAL}
    names = {k: str(v["content"] if isinstance(v, dict) else v or "") for k, v in found.items()}
    return {name: token for name, token in names.items() if token}


def _read_settings(root: epath.Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """Those of tokenizer_config.json, with the names of special tokens of the other files."""
    path = root / "tokenizer_config.json"
    settings = _read_json(path) if path.is_file() else {}
    more = root / "special_tokens_map.json"  # as transformers: an older way to name them
    if more.is_file() and "added_tokens_decoder" not in settings:
        settings |= _read_json(more)
    if settings.get("split_special_tokens"):
        raise UserError(f"{path}: split_special_tokens is true, supported is false")
    if found := find_class(settings, _read_model_type(root)):
        vocab = state.get("model", {}).get("vocab", {})
        known = {*(vocab if isinstance(vocab, dict) else (piece for piece, _ in vocab))}
        known |= {token["content"] for token in state.get("added_tokens") or []}
        names = {name: token for name, token in found[1].names.items() if token in known}
        settings = names | settings
    inside = (state.get("pre_tokenizer") or {}).get("add_prefix_space")
    if (state.get("pre_tokenizer") or {}).get("type") == "ByteLevel":
        if settings.get("tokenizer_class") == "TokenizersBackend":  # transformers 4 has none
            settings["add_prefix_space"] = inside
        _check_prefix_space(path, bool(inside), bool(settings.get("add_prefix_space", False)))
    return settings


def _read_model_type(root: epath.Path) -> str:
    path = root / "config.json"
    return str(_read_json(path).get("model_type", "")) if path.is_file() else ""


def _check_prefix_space(path: epath.Path, inside: bool, outside: bool) -> None:
    """Raises: UserError where transformers 4 overrides what tokenizer.json says, and 5 does not."""
    if inside != outside:
        name, told = "add_prefix_space", json.dumps(inside)
        raise UserError(
            f"{path}: {name} is {json.dumps(outside)}, in tokenizer.json {told}: transformers 4 "
            f'and 5 read other tokens from them; set "{name}": {told} in tokenizer_config.json'
        )


def _add_tokens(root: epath.Path, state: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Adds the tokens that other files declare beside those of tokenizer.json, behind them, and
    takes the flags of tokenizer_config.json, as transformers does."""
    tokens = {token["content"]: dict(token) for token in state.get("added_tokens") or []}
    vocab = state.get("model", {}).get("vocab", {})
    pieces = vocab if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}

    def add(content: str, flags: Mapping[str, Any]) -> None:
        last = max([len(pieces) - 1, *(token["id"] for token in tokens.values())])
        number = tokens.get(content, {}).get("id", pieces.get(content, last + 1))
        kept = {name: bool(flags.get(name, False)) for name in _FLAGS}
        tokens[content] = {"id": number, "content": content, **kept}

    declared = settings.get("added_tokens_decoder") or {}
    for _, token in sorted(declared.items(), key=lambda item: int(item[0])):
        add(token["content"], token)
    names = [name for name in read_names(settings).values() if name in pieces]
    for name in (*names, *_name_extra(settings).get("additional_special_tokens", [])):
        if name not in tokens:
            add(name, {"special": True})
    older = root / "added_tokens.json"
    for name in _read_json(older) if older.is_file() else {}:
        if name not in tokens:
            add(name, {})
    state["added_tokens"] = list(tokens.values())


def _name_extra(settings: Mapping[str, Any]) -> dict[str, list[str]]:
    """The special tokens without a role of their own, under the name that transformers 4 and 5
    both read."""
    found: list[str] = []
    for field in ("additional_special_tokens", "extra_special_tokens"):
        value = settings.get(field) or []
        for token in value.values() if isinstance(value, dict) else value:
            found.append(str(token["content"] if isinstance(token, dict) else token))
    return {"additional_special_tokens": list(dict.fromkeys(found))} if found else {}


def _find_template(root: epath.Path, config: dict[str, Any]) -> str:
    if (root / "chat_template.jinja").is_file():
        return _read_text(root / "chat_template.jinja")
    template = config.get("chat_template")
    of_processor = root / "chat_template.json"  # of models of text and images
    if template is None and of_processor.is_file():
        template = _read_json(of_processor).get("chat_template")
    where = f"{root}/tokenizer_config.json"
    if isinstance(template, list | dict):
        listed = template if isinstance(template, list) else []
        named = {str(t.get("name")): t.get("template") for t in listed if isinstance(t, dict)}
        named = template if isinstance(template, dict) else named
        if "default" not in named:
            raise UserError(f'{where}: chat_template names {sorted(named)}, but not "default"')
        template = named["default"]
    if not isinstance(template, str):
        told = "no chat_template.jinja and no chat_template in tokenizer_config.json"
        raise UserError(f"{root}: {told}; use a chat model")
    return template


def _find_eos(root: epath.Path, tokenizer_json: str) -> str:
    """The name of the end token that the files of the model tell, "" when they tell none."""
    for name in ("generation_config.json", "config.json"):
        ids = _read_json(root / name).get("eos_token_id") if (root / name).is_file() else None
        if ids not in (None, []):
            opened = open_backend(tokenizer_json, str(root))
            return opened.id_to_token(ids[0] if isinstance(ids, list) else ids) or ""
    return ""


def _read_text(path: epath.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not readable: {e}") from None


def _read_json(path: epath.Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except ValueError as e:
        raise UserError(f"{path}: not valid JSON: {e}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must be a JSON object, found {type(value).__name__}")
    return value
