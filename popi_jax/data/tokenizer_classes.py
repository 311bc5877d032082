"""What the classes of transformers make of the files of a tokenizer: names of special tokens that
no file tells, and, of transformers 5, parts that they build anew instead of reading them."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import tokenizers
from etils import epath

from popi_jax.errors import UserError

_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BPE = {"continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False}
_PIECES = {"fuse_unk": True, "byte_fallback": True}
_NFC = {"type": "NFC"}
_END_OF_TEXT = "<|endoftext|>"
# compared where a class builds parts anew; {} is a control token
_PROBES = (
    "{}user\nShort, warm answers.\n\n12 345 + 6 ÷ 2{}model\nok",
    " two  spaces\n   and indents\n\n\n{} e\u0301 ﬁ DON'T don't x_y café — 蜂蜜 🐝\t:\n{}end",
    "def f(x):\n    return {{'a': 1}}  # 1234567",
)


class Class(NamedTuple):
    """A class of transformers 5; None: the part is that of tokenizer.json."""

    names: dict[str, str]  # of special tokens, where the files have no such key
    normalizer: dict[str, Any] | None
    pre_tokenizer: dict[str, Any]
    model: dict[str, Any]  # fields of the model


def _byte_level(space: bool, *, use_regex: bool = True) -> dict[str, Any]:
    flags = {"add_prefix_space": space, "trim_offsets": True, "use_regex": use_regex}
    return {"type": "ByteLevel", **flags}


def _split(pattern: dict[str, str], behavior: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": False}


def find_class(settings: Mapping[str, Any], model_type: str) -> tuple[str, Class] | None:
    """The class that transformers 5 takes, where it builds parts anew. model_type: of config.json,
    "" where there is none."""
    by_model = {"qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer", "gemma2": "GemmaTokenizer"}
    by_model |= dict.fromkeys(("gemma3", "gemma3_text"), "GemmaTokenizer")
    name = str(settings.get("tokenizer_class") or "").removesuffix("Fast")
    if not name or model_type == "qwen2":
        name = by_model.get(model_type, "")
    space = bool(settings.get("add_prefix_space", False))
    first = "first" if not settings.get("legacy") else "always"
    prefix = first if settings.get("add_prefix_space") in (True, None) else "never"
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": prefix, "split": False}
    qwen = [_split({"Regex": _QWEN_WORDS}, "Isolated"), _byte_level(space, use_regex=False)]
    text = dict.fromkeys(("bos_token", "eos_token", "unk_token"), _END_OF_TEXT)
    llama = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    gemma = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "pad")}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    qwen_names = dict.fromkeys(("eos_token", "unk_token", "pad_token"), _END_OF_TEXT)
    classes = {
        "LlamaTokenizer": Class(llama, None, metaspace, _PIECES),
        "GemmaTokenizer": Class(
            gemma, replace, _split({"String": " "}, "MergedWithPrevious"), _PIECES
        ),
        "Qwen2Tokenizer": Class(
            qwen_names, _NFC, {"type": "Sequence", "pretokenizers": qwen}, _BPE
        ),
        "GPT2Tokenizer": Class(text, None, _byte_level(space), _BPE),
        "GPTNeoXTokenizer": Class(text, _NFC, _byte_level(space), _BPE),
    }
    return (name, classes[name]) if name in classes else None


def check_same_tokens(root: epath.Path, state: Mapping[str, Any], name: str, built: Class) -> None:
    """Compares what transformers 5 builds with what tokenizer.json describes.

    state: of tokenizer.json. Raises: UserError where they give other tokens."""
    parts = {"normalizer": built.normalizer, "pre_tokenizer": built.pre_tokenizer}
    if name == "LlamaTokenizer" and "ByteLevel" in json.dumps(state.get("pre_tokenizer")):
        return  # transformers 5 sees that the class is not the right one
    if all(state.get(part) == value for part, value in parts.items()):
        return
    changed = {**state, **parts, "model": {**state["model"], **built.model}, "post_processor": None}
    backends = [tokenizers.Tokenizer.from_str(json.dumps(x)) for x in (dict(state), changed)]
    special = [t["content"] for t in state.get("added_tokens") or [] if t.get("special")]
    for probe in _PROBES:
        text = probe.format(*(2 * special[:2] + ["", ""])[:2])
        ours, other = (b.encode(text, add_special_tokens=False).ids for b in backends)
        if ours != other:
            raise UserError(
                f"{root}: transformers 4 reads the tokens that tokenizer.json describes, 5 takes "
                f"its own class {name}, which reads others: {len(ours)} and {len(other)} in "
                f'{text!r}; set tokenizer_class in tokenizer_config.json to "PreTrainedTokenizer'
                'Fast", which goes by tokenizer.json'
            )
