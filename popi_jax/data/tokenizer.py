"""The tokenizer of both roles and its chat template, read from and written to the files of Hugging
Face tools.

Refuses to let text of the data become a control token. Needs neither jax nor torch."""

import datetime
import json
import os
import re
from collections.abc import Iterable
from typing import Any, NoReturn, SupportsIndex

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, trainers

from popi_jax import files
from popi_jax.data.records import Messages
from popi_jax.errors import UserError

CONTROL_TOKENS = ("<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_TRAINED = "trained tokenizer"  # `source` of a tokenizer made here
# for templates that write today's date: prompts must be reproducible
_PINNED_DATE = datetime.datetime(2024, 7, 26)
# stands for a message's content while the template is rendered
_SENTINEL = re.compile("\ue000Content([0-9]+)\ue001")

Frame = list[list[int] | int]  # what a template writes: token ids, and numbers of messages


class Tokenizer:
    """Text <-> token ids, and conversations -> token ids. Immutable, picklable, usable from many
    threads.

    `bos`, `eos` and `pad` are the names that the chat template gets ("" = none). `eos_id` is the
    token that ends a reply: the first control token that the template writes after an assistant's
    content, else `eos`.

    Raises: UserError when the serialised tokenizer, a token name or the chat template is broken."""

    def __init__(
        self, tokenizer_json: str, chat_template: str, bos: str, eos: str, pad: str, source: str
    ) -> None:
        self.tokenizer_json, self.chat_template = tokenizer_json, chat_template
        self.bos, self.eos, self.pad, self.source = bos, eos, pad, source
        # Two copies: whether control tokens are recognised is a mutable switch of the object, and
        # threads share us.
        self._control = _open(tokenizer_json, source)
        self._plain = _open(_mark_control_tokens(tokenizer_json, chat_template), source)
        self._plain.encode_special_tokens = True
        self._template = _compile(chat_template, source)
        self._frames: dict[tuple[str, ...], Frame] = {}  # a memo: templates are slow to render
        self.vocab_size = max(self._control.get_vocab(with_added_tokens=True).values()) + 1
        added = self._control.get_added_tokens_decoder().items()
        self.control_ids = frozenset(i for i, token in added if token.special)
        self.bos_id = self._find_id(bos, "bos_token") if bos else None
        self.eos_id = self._find_reply_end()
        self.pad_id = self._find_id(pad, "pad_token") if pad else self.eos_id

    def __reduce__(self) -> tuple[Any, ...]:
        parts = self.tokenizer_json, self.chat_template, self.bos, self.eos, self.pad, self.source
        return Tokenizer, parts

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of plain text; the name of a control token inside it is spelled
        out, never the control token."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Returns the text of token ids; control tokens are left out."""
        return self._control.decode([int(i) for i in ids], skip_special_tokens=True)

    def render(self, messages: Messages, *, cut: str) -> tuple[list[int], ...]:
        """Returns the token ids of a conversation up to the header of the reply, divided at each
        `cut` inside a message's content.

        The template's own text is encoded with control tokens, contents (stripped of outer white
        space) without, and each piece by itself: nothing merges across a border. `cut` must be a
        string that no content holds by accident. A conversation starts with one begin token where
        the template writes one, or where the tokenizer puts one before any text; with none where
        neither does. A template that refuses or drops system messages gets the system message at
        the head of the first user message, as Gemma 3's own template puts it.

        Raises: UserError when the template refuses the conversation, or drops, repeats or changes a
        content."""
        pieces: list[list[int]] = [[]]
        for part in self._make_frame(tuple(m["role"] for m in messages)):
            if isinstance(part, list):
                pieces[-1] += part
                continue
            head, *rest = messages[part]["content"].strip().split(cut)
            pieces[-1] += self.encode(head)
            pieces += [self.encode(text) for text in rest]
        return tuple(pieces)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the tokenizer files of a Hugging Face folder; `load` and AutoTokenizer read the
        same ids from them."""
        names = {"bos_token": self.bos, "eos_token": self.eos, "pad_token": self.pad}
        names = {key: name for key, name in names.items() if name}
        config = {
            **names,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": self.chat_template,
            "clean_up_tokenization_spaces": False,
            # transformers 4 overrides tokenizer.json with it
            **({"add_prefix_space": True} if self.source == _TRAINED else {}),
            "model_max_length": 10**30,  # what Hugging Face writes for "no limit"
        }
        texts = {"tokenizer.json": self.tokenizer_json}
        for name, content in (("tokenizer_config", config), ("special_tokens_map", names)):
            texts[f"{name}.json"] = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        for name, text in texts.items():
            files.write_whole(epath.Path(folder) / name, text)

    def _find_id(self, token: str, field: str) -> int:
        found = self._control.token_to_id(token)
        if found is None:
            told = f'{field} "{token}" is not in the vocabulary of tokenizer.json'
            raise UserError(f"{self.source}: {told}")
        return found

    def _encode_control(self, text: str) -> list[int]:
        return self._control.encode(text, add_special_tokens=False).ids

    def _make_frame(self, roles: tuple[str, ...]) -> Frame:
        """Returns what the template writes around messages with these roles, and their numbers in
        place of their contents."""
        if roles not in self._frames:
            try:
                text = self._fill_template(roles, add_generation_prompt=True)
            except UserError:
                if roles[:2] != ("system", "user"):
                    raise
                self._frames[roles] = self._join_system(roles)
                return self._frames[roles]
            pieces = enumerate(_SENTINEL.split(text))
            frame = [int(x) if i % 2 else self._encode_control(x) for i, x in pieces]
            if isinstance(frame[0], list) and self.bos_id is not None:
                frame[0] = self._with_one_begin(frame[0])
            self._frames[roles] = frame
        return self._frames[roles]

    def _join_system(self, roles: tuple[str, ...]) -> Frame:
        """Returns the frame where the system message stands at the head of the first user
        message."""
        frame: Frame = []
        for part in self._make_frame(roles[1:]):
            if part == 0:
                frame += [0, self._encode_control("\n\n"), 1]
            else:
                frame.append(part if isinstance(part, list) else part + 1)
        return frame

    def _with_one_begin(self, ids: list[int]) -> list[int]:
        count = next((i for i, token in enumerate(ids) if token != self.bos_id), len(ids))
        expected = bool(count) or self._control.encode("").ids[:1] == [self.bos_id]
        return [self.bos_id] * expected + ids[count:] if self.bos_id is not None else ids

    def _fill_template(self, roles: tuple[str, ...], *, add_generation_prompt: bool) -> str:
        """Renders the template for messages with these roles, with a sentinel in place of each
        content."""
        messages = [
            {"role": role, "content": f"\ue000Content{i}\ue001"} for i, role in enumerate(roles)
        ]
        try:
            text = self._template.render(
                messages=messages,
                tools=None,
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos,
                eos_token=self.eos,
                pad_token=self.pad,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as e:
            told = f"the chat template refuses the roles {', '.join(roles)}: {e}"
            raise UserError(f"{self.source}: {told}") from None
        found = [int(number) for number in _SENTINEL.findall(text)]
        if sorted(found) != list(range(len(roles))):
            raise UserError(
                f"{self.source}: the chat template must write the content of each message once and "
                f"unchanged; of a conversation with the roles {', '.join(roles)} it writes "
                f"{len(found)} of {len(roles)} contents"
            )
        return text

    def _find_reply_end(self) -> int:
        text = self._fill_template(("user", "assistant"), add_generation_prompt=False)
        for i in self._encode_control(_SENTINEL.split(text)[-1]):
            if i in self.control_ids:
                return i
        if not self.eos:
            told = "eos_token is missing and the chat template ends a reply with no control token"
            raise UserError(f"{self.source}: {told}")
        return self._find_id(self.eos, "eos_token")


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learns a byte-level byte-pair encoding of at most `vocab_size` tokens; the same texts give
    the same tokenizer.

    A word has one form at the start of a text and after a space (a space is put before each text);
    so a space before a text is not restored by `decode`.

    Raises: UserError when `vocab_size` does not hold the 256 bytes and the control tokens."""
    least = 256 + len(CONTROL_TOKENS)
    if vocab_size < least:
        told = f"{vocab_size} is too small; the bytes and control tokens alone need {least}"
        raise UserError(f"model.vocab_size: {told}")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    names = "<|begin|>", "<|end|>", "<|pad|>"
    return Tokenizer(backend.to_str(), CHAT_TEMPLATE, *names, source=_TRAINED)


def load(folder: str | os.PathLike[str]) -> Tokenizer:
    """Reads the tokenizer of a Hugging Face folder: tokenizer.json, tokenizer_config.json and the
    chat template.

    Raises: UserError when a file is missing or broken, or no chat template is found."""
    root = epath.Path(folder)
    if not root.is_dir():
        fix = "give a Hugging Face folder with tokenizer.json"
        raise UserError(f"model.checkpoint: {root} is not a folder; {fix}")
    if not (root / "tokenizer.json").is_file():
        found = ", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing"
        told = f"not found (the folder holds {found}); slow tokenizers are not read"
        raise UserError(f"{root}/tokenizer.json: {told}")
    config = _read_json(root / "tokenizer_config.json")
    more = root / "special_tokens_map.json"  # the names, where tokenizer_config.json has none
    if more.is_file():
        config = _read_json(more) | config
    tokenizer_json = _read_text(root / "tokenizer.json")
    bos, eos, pad = (_read_token(config, f"{name}_token") for name in ("bos", "eos", "pad"))
    eos = eos or _find_eos(root, _open(tokenizer_json, str(root)))
    return Tokenizer(tokenizer_json, _find_template(root, config), bos, eos, pad, str(root))


def _open(tokenizer_json: str, source: str) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(tokenizer_json)
    except Exception as e:  # the library raises plain Exception for every defect of the file
        told = f"tokenizer.json is not a tokenizer of Hugging Face tokenizers: {e}"
        raise UserError(f"{source}: {told}") from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def _mark_control_tokens(tokenizer_json: str, chat_template: str) -> str:
    """Marks as special what the template uses as control tokens though the file calls them text
    (Qwen 3's <think>)."""
    try:
        state = json.loads(tokenizer_json)
        for token in state["added_tokens"]:
            token["special"] |= bool(token["content"].strip()) and token["content"] in chat_template
    except (ValueError, KeyError, TypeError):
        return tokenizer_json  # broken: told where it is loaded
    return json.dumps(state, ensure_ascii=False)


def _compile(chat_template: str, source: str) -> jinja2.Template:
    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = _PINNED_DATE.strftime
    env.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    try:
        return env.from_string(chat_template)
    except jinja2.TemplateSyntaxError as e:
        raise UserError(f"{source}: chat template, line {e.lineno}: {e.message}") from None


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


def _read_token(config: dict[str, Any], field: str) -> str:
    value = config.get(field)
    return str(value["content"] if isinstance(value, dict) else value or "")


def _find_eos(root: epath.Path, backend: tokenizers.Tokenizer) -> str:
    """Returns the name of the end token that the files of the model tell, "" when they tell
    none."""
    for name in ("generation_config.json", "config.json"):
        ids = _read_json(root / name).get("eos_token_id") if (root / name).is_file() else None
        if ids is not None:
            return backend.id_to_token(ids[0] if isinstance(ids, list) else ids) or ""
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
