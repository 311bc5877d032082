"""The files of a tokenizer in a Hugging Face folder: read as transformers reads them, and written
so that it reads the same ids from them."""

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import tokenizers
from etils import epath

from popi_jax import files
from popi_jax.errors import UserError

_SPECIAL = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
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
    settings = _read_json(root / "tokenizer_config.json")
    more = root / "special_tokens_map.json"  # the names, where tokenizer_config.json has none
    if more.is_file():
        settings = _read_json(more) | settings
    state = _read_json(root / "tokenizer.json")
    if "eos_token" not in read_names(settings):
        settings["eos_token"] = _find_eos(root, state)
    _check_prefix_space(root, state, settings)
    _check_llama_class(root, state, settings)
    _add_tokens(state, settings.get("added_tokens_decoder"))
    text = json.dumps(state, ensure_ascii=False)
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
        # the class that transformers 4 and 5 have both, and that goes by tokenizer.json
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": chat_template,
    }
    for name in ("auto_map", "processor_class", "backend", "is_local", "local_files_only"):
        config.pop(name, None)  # of the place and the program that wrote the folder
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


def _add_tokens(state: dict[str, Any], declared: Any) -> None:
    """The tokens that tokenizer_config.json declares beside those of tokenizer.json, and their
    flags, which transformers takes from there."""
    tokens = {int(token["id"]): token for token in state.get("added_tokens") or []}
    for number, token in (declared if isinstance(declared, dict) else {}).items():
        if isinstance(token, dict) and isinstance(token.get("content"), str):
            flags = {name: bool(token.get(name, False)) for name in _FLAGS}
            tokens[int(number)] = {"id": int(number), "content": token["content"], **flags}
    state["added_tokens"] = [tokens[number] for number in sorted(tokens)]


def _check_prefix_space(
    root: epath.Path, state: dict[str, Any], settings: Mapping[str, Any]
) -> None:
    """Raises: UserError where transformers 4 overrides what tokenizer.json says, and 5 does not."""
    name = "add_prefix_space"
    inside = (state.get("pre_tokenizer") or {}).get(name)
    outside = bool(settings.get(name, False))
    if inside is not None and bool(inside) != outside:
        raise UserError(
            f"{root}/tokenizer_config.json: {name} is {json.dumps(outside)}, in tokenizer.json "
            f"{json.dumps(bool(inside))}: transformers 4 and 5 read other tokens from them; set "
            f'"{name}": {json.dumps(bool(inside))} in tokenizer_config.json'
        )


def _check_llama_class(
    root: epath.Path, state: dict[str, Any], settings: Mapping[str, Any]
) -> None:
    """Raises: UserError where transformers 5 builds another tokenizer than tokenizer.json tells:
    its class of SentencePiece tokenizers goes by "legacy" alone."""
    name = str(settings.get("tokenizer_class", ""))
    pieces, text = state.get("pre_tokenizer") or {}, json.dumps(state.get("normalizer"))
    every = "Prepend" in text or pieces.get("prepend_scheme") == "always"
    if name not in ("LlamaTokenizer", "LlamaTokenizerFast"):
        return
    if every != bool(settings.get("legacy")) and (every or pieces.get("type") == "Metaspace"):
        before = "every part of a text" if every else "the first part of a text alone"
        raise UserError(
            f'{root}/tokenizer_config.json: with tokenizer_class "{name}" transformers 4 and 5 '
            f"read different tokens: tokenizer.json puts a space before {before}, and legacy is "
            f"{json.dumps(settings.get('legacy'))}; set tokenizer_class to "
            '"PreTrainedTokenizerFast", which goes by tokenizer.json'
        )


def _find_template(root: epath.Path, config: dict[str, Any]) -> str:
    if (root / "chat_template.jinja").is_file():
        return _read_text(root / "chat_template.jinja")
    template = config.get("chat_template")
    of_processor = root / "chat_template.json"  # of models of text and images
    if template is None and of_processor.is_file():
        template = _read_json(of_processor).get("chat_template")
    where = f"{root}/tokenizer_config.json"
    if isinstance(template, list):
        named = {str(t.get("name")): t.get("template") for t in template if isinstance(t, dict)}
        if "default" not in named:
            raise UserError(f'{where}: chat_template names {sorted(named)}, but not "default"')
        template = named["default"]
    if not isinstance(template, str):
        told = "no chat_template.jinja and no chat_template in tokenizer_config.json"
        raise UserError(f"{root}: {told}; use a chat model")
    return template


def _find_eos(root: epath.Path, state: dict[str, Any]) -> str:
    """The name of the end token that the files of the model tell, "" when they tell none."""
    for name in ("generation_config.json", "config.json"):
        ids = _read_json(root / name).get("eos_token_id") if (root / name).is_file() else None
        if ids is not None:
            found = ids[0] if isinstance(ids, list) else ids
            return open_backend(json.dumps(state), str(root)).id_to_token(found) or ""
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
