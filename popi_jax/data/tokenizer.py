"""The tokenizer of both roles: texts and conversations -> the token ids that transformers feeds.

A conversation gets the ids of `tokenizer.apply_chat_template` of transformers 4.57 and 5 on the
same folder: the template is rendered whole and its text encoded whole. Refuses to let text of the
data become a control token: such a word is spelled out, as `sanitize_control_tokens=True` of
transformers 5 does. Needs neither jax nor torch."""

import functools
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, SupportsIndex

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from popi_jax.data import chat_template as chat
from popi_jax.data import tokenizer_files
from popi_jax.data.records import Messages
from popi_jax.errors import UserError

CONTROL_TOKENS = ("<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Unicode noncharacters, reserved for such a use and replaced where data hold them: they stand
# around a control word of the data while the template is rendered
_OPEN, _CLOSE = "\ufdd1", "\ufdd2"
_REPLACED = str.maketrans({_OPEN: "\ufffd", _CLOSE: "\ufffd"})
# stands for a message's content when a template is tried: what one that changes contents changes
_TRIED = ' "a" <b>&\n\n  ' + "content " * 30 + "x"
# an added token of this form is text like any other: a word, white space, one character, or one of
# Gemma's tags of HTML
_TAGS = (
    "a b blockquote body caption code div em footer h1 h2 h3 h4 h5 h6 html i iframe img li s span"
)
_TAGS += " strong sub sup table tbody td tfoot th thead tr u ul ol p br hr bbox"
_PLAIN = re.compile(rf"[\w\s▁'’\-]*|.|</?({_TAGS.replace(' ', '|')})>", re.DOTALL)
# normalizers that make no control word of other words
_FAITHFUL = {"Replace", "Prepend", "NFC", "NFD", "Sequence"}


class Tokenizer:
    """Text <-> token ids, and conversations -> token ids. Immutable, picklable, usable from many
    threads.

    system_role: whether system messages are given to the template as such, where it takes them.
    tokenizer_json: of the library `tokenizers`. settings: those of tokenizer_config.json, with the
    names of the special tokens. `eos_id` is the token that ends a reply: the first added token that
    the template writes after an assistant's content, else eos_token. `control_ids` are all special
    tokens, and all other added tokens but plain words; `reply_ids` those of them that the template
    writes into a reply, its end among them: all others are never drawn. `vocab_size` is the rows of
    an embedding that text, template and replies need.

    Raises: UserError when the serialised tokenizer, a token name or the chat template is broken."""

    def __init__(
        self,
        tokenizer_json: str,
        settings: Mapping[str, Any],
        chat_template: str,
        source: str,
        system_role: bool = True,
    ) -> None:
        self.tokenizer_json, self.settings = tokenizer_json, dict(settings)
        self.chat_template, self.source = chat_template, source
        self._control = tokenizer_files.open_backend(tokenizer_json, source)
        self._template = chat.compile_template(chat_template, source)
        self._names = tokenizer_files.read_names(settings)
        added = self._control.get_added_tokens_decoder()
        named = {*self._names.values(), settings.get("reply_end")}
        control = {
            i: token.content
            for i, token in added.items()
            if token.special or token.content in named or not _PLAIN.fullmatch(token.content)
        }
        self.control_ids = frozenset(control)
        words = _match_any(control.values())
        folder = self._control.normalizer
        kinds = re.findall(r'"type": ?"(\w+)"', folder.__getstate__().decode() if folder else "")
        self._folds = not {*kinds} <= _FAITHFUL
        self._words = re.compile(words)
        self._marked = re.compile(f"{_OPEN}({words}){_CLOSE}|[{_OPEN}{_CLOSE}]")
        # headers come again and again
        self._look_back = functools.lru_cache(64)(self._find_last_segment)
        self.bos_id = self._find_id("bos_token")
        self.eos_id = self._find_reply_end()
        pad = self._control.token_to_id(self._names.get("pad_token", ""))
        self.pad_id = self.eos_id if pad is None else pad
        self._takes_system = system_role and self._try_system()
        self._system_role = system_role
        self._asked = [{"role": "user", "content": "x"}]
        self._header = self._write(self._asked, add_generation_prompt=True)
        self._check_header()
        reply = self.encode_reply("x")
        self.reply_ids = self.control_ids.intersection(reply)
        system = {"role": "system", "content": "x"}
        told = [system, *self._asked, {"role": "assistant", "content": "x"}, *self._asked]
        seen = [*reply, self.pad_id, *self.render(told, cut=_OPEN)[0]]
        seen += [i for i, word in control.items() if word and word in chat_template]
        plain = (i for i in self._control.get_vocab().values() if i not in self.control_ids)
        self.vocab_size = 1 + max(*plain, *seen)

    def __reduce__(self) -> tuple[Any, ...]:
        parts = self.tokenizer_json, self.settings, self.chat_template, self.source
        return Tokenizer, (*parts, self._system_role)

    def encode(self, text: str, after: str = "") -> list[int]:
        """Token ids of plain text, as it goes on after `after`, text of a template; the name of a
        control token inside it is spelled out, never the control token."""
        return self._continue(after, self._mark(text))

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of token ids; control tokens are left out."""
        shown = [int(i) for i in ids if int(i) not in self.control_ids]
        return self._control.decode(shown, skip_special_tokens=True)

    def list_names(self, ids: Iterable[int]) -> list[str]:
        """How the tokens are spelled in the vocabulary."""
        return [self._control.id_to_token(i) or "" for i in ids]

    def render(self, messages: Messages, *, cut: str) -> tuple[list[int], ...]:
        """Token ids of a conversation up to the header of the reply, divided at each `cut` inside a
        message's content, each part as it goes on after those before it.

        Without a cut the ids are those of `apply_chat_template(add_generation_prompt=True)`; where
        a token would lie across a cut, the parts are encoded apart. `cut` must be a string that no
        content holds by accident. A template that refuses or drops system messages gets the system
        message at the head of the first user message, as Gemma 3's own template puts it.

        Raises: UserError when the template refuses the conversation, or drops or repeats a cut."""
        first, *rest = parts = self.write(messages).split(cut)
        expected = sum(m["content"].count(cut) for m in messages)
        if len(rest) != expected:
            raise UserError(
                f"{self.source}: of a conversation with the roles {_list_roles(messages)} the chat "
                f"template writes {len(rest)} of {expected} places of a text that is put in"
            )
        ids = [self._encode_marked(first)]
        for number, part in enumerate(rest, 1):
            ids.append(self._continue("".join(parts[:number]), part))
        return tuple(ids)

    def write(self, messages: Messages) -> str:
        """The text of the conversation up to the header of the reply, with marks around the control
        words of contents; `encode` takes it for `after`."""
        if messages[0]["role"] == "system" and not self._takes_system:
            messages = _join_system(messages)
        return self._write(messages, add_generation_prompt=True)

    def encode_reply(self, text: str) -> list[int]:
        """Token ids of a reply behind its header, as the template writes it, with its end token."""
        messages = [*self._asked, {"role": "assistant", "content": text}]
        whole = self._write(messages, add_generation_prompt=False)
        if not whole.startswith(self._header):  # the template acts on a control word of the reply
            hidden = self._words.sub(lambda word: f"{word[0][0]}{_OPEN}{word[0][1:]}", text)
            reply = {"role": "assistant", "content": hidden}
            whole = self._fill([*self._asked, reply], add_generation_prompt=False)
        if not whole.startswith(self._header):
            raise UserError(
                f"{self.source}: the chat template writes the reply {text[:60]!r} behind another "
                "header than it asks for one with"
            )
        ids = self._continue(self._header, whole.removeprefix(self._header))
        end = ids.index(self.eos_id) if self.eos_id in ids else len(ids)
        return [*ids[:end], self.eos_id]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the tokenizer files of a Hugging Face folder; `load` and AutoTokenizer read the
        same ids from them."""
        tokenizer_files.write(folder, self.tokenizer_json, self.settings, self.chat_template)

    def _find_id(self, name: str) -> int | None:
        token = self._names.get(name)
        found = self._control.token_to_id(token) if token else None
        if token and found is None:
            told = f'{name} "{token}" is not in the vocabulary of tokenizer.json'
            raise UserError(f"{self.source}: {told}")
        return found

    def _mark(self, text: str) -> str:
        text = text.translate(_REPLACED)
        if self._folds and self._control.normalizer is not None:
            folded = self._control.normalizer.normalize_str(text)
            if len(self._words.findall(folded)) > len(self._words.findall(text)):
                text = folded  # which becomes a control token only now
        return self._words.sub(f"{_OPEN}\\g<0>{_CLOSE}", text)

    def _write(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        """Renders contents with their control words marked. Where the template acts on the words of
        a message, as one that leaves former thoughts out, and none is left of them, it gets that
        message bare."""

        def fill(contents: list[str]) -> str:
            filled = [m | {"content": c} for m, c in zip(messages, contents, strict=True)]
            return self._fill(filled, add_generation_prompt=add_generation_prompt)

        bare = [m["content"].translate(_REPLACED) for m in messages]
        plain, contents = fill(bare), list(bare)
        for number, content in enumerate(bare):
            marked = self._mark(content)
            if marked != content:
                text = fill([*bare[:number], marked, *bare[number + 1 :]])
                left = any(found.group(1) for found in self._marked.finditer(text))
                words = self._words.findall(self._marked.sub("\0", text))
                if left or words != self._words.findall(plain):
                    contents[number] = marked
        return plain if contents == bare else fill(contents)

    def _fill(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        template, asks = self._template, add_generation_prompt
        return chat.render(
            template, messages, self._names, add_generation_prompt=asks, source=self.source
        )

    def _encode_marked(self, text: str) -> list[int]:
        """Token ids of a template's text; the marked words are spelled out, each by itself."""
        ids: list[int] = []
        for number, part in enumerate(self._marked.split(text)):
            if number == 0:
                ids = self._encode_control(part)
            elif part:
                ids += self._spell(part) if number % 2 else self._continue("\n", part)
        return ids

    def _encode_control(self, text: str) -> list[int]:
        return self._control.encode(text, add_special_tokens=False).ids

    def _continue(self, before: str, text: str) -> list[int]:
        """Token ids of `text` where it goes on after `before`. All that matters of that is what
        follows its last control token: no token lies across one."""
        if not before:
            return self._encode_marked(text)
        near, start = self._look_back(before)
        whole = self._encode_marked(near + text)
        if whole[: len(start)] == start:
            return whole[len(start) :]
        return self._continue("\n" if near != "\n" else "", text)

    def _find_last_segment(self, before: str) -> tuple[str, list[int]]:
        """What stands from the last control token on, and its token ids."""
        *_, last = (0, *(found.start() for found in self._words.finditer(before)))
        return before[last:], self._encode_marked(before[last:])

    def _spell(self, word: str) -> list[int]:
        """A control word as plain text, without any added token.

        Raises: UserError where the vocabulary makes a control token of single characters."""
        newline, text = self._tokenize("\n"), self._tokenize("\n" + word)
        ids = text[len(newline) :] if text[: len(newline)] == newline else self._tokenize(word)
        unknown = self._control.token_to_id(self._names.get("unk_token", ""))
        if self.control_ids.isdisjoint(ids) or set(ids) & self.control_ids == {unknown}:
            return ids
        if len(word) == 1:
            raise UserError(f'{self.source}: the control token "{word}" cannot be told from text')
        return self._spell(word[0]) + self._spell(word[1:])

    def _tokenize(self, text: str) -> list[int]:
        backend, parts = self._control, [text]
        if backend.normalizer is not None:
            parts = [backend.normalizer.normalize_str(text)]
        if backend.pre_tokenizer is not None:
            parts = [part for part, _ in backend.pre_tokenizer.pre_tokenize_str(parts[0])]
        return [token.id for part in parts for token in backend.model.tokenize(part)]

    def _try_system(self) -> bool:
        """Whether the template writes a system message."""
        try:
            self._try_roles(("system", "user"), add_generation_prompt=True)
        except UserError:
            return False
        return True

    def _try_roles(self, roles: tuple[str, ...], *, add_generation_prompt: bool) -> str:
        """What the template writes for sentinels as contents. Raises: UserError unless it writes
        each once and unchanged."""
        contents = [f"\ue000{i}{_TRIED}\ue001" for i in range(len(roles))]
        messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
        text = self._write(messages, add_generation_prompt=add_generation_prompt)
        found = [int(number) for number in re.findall(f"\ue000([0-9]+){_TRIED}\ue001", text)]
        if sorted(found) != list(range(len(roles))):
            raise UserError(
                f"{self.source}: the chat template must write the content of each message once and "
                f"unchanged; of a conversation with the roles {', '.join(roles)} it writes "
                f"{len(found)} of {len(roles)} contents"
            )
        return text

    def _check_header(self) -> None:
        """Raises: UserError where a reply does not begin with what asks for it."""
        reply = [*self._asked, {"role": "assistant", "content": "x"}]
        whole = self._write(reply, add_generation_prompt=False)
        if not whole.startswith(self._header):
            same = os.path.commonprefix([whole, self._header])
            raise UserError(
                f"{self.source}: the chat template asks for a reply with "
                f"{self._header.removeprefix(same)!r}, which it leaves out where it writes one: a "
                "reply would be trained behind another text than it is sampled behind; take that "
                "out of its add_generation_prompt, or into its replies"
            )

    def _find_reply_end(self) -> int:
        text = self._try_roles(("user", "assistant"), add_generation_prompt=False)
        for i in self._encode_control(text.rpartition("\ue001")[2]):
            if i in self.control_ids:
                return i
        token = self._names.get("eos_token") or self.settings.get("reply_end", "")
        eos = self._control.token_to_id(token) if token else None
        if eos is None:
            told = "eos_token is missing and the chat template ends a reply with no control token"
            raise UserError(f"{self.source}: {told}")
        return eos


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
    settings = {
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        # transformers 4 overrides tokenizer.json with it
        "add_prefix_space": True,
    }
    return Tokenizer(backend.to_str(), settings, CHAT_TEMPLATE, "trained tokenizer")


def load(
    folder: str | os.PathLike[str],
    template_args: Mapping[str, Any] | None = None,
    *,
    system_role: bool = True,
) -> Tokenizer:
    """The tokenizer of a Hugging Face folder.

    template_args: of its chat template, such as enable_thinking; they become defaults of the
    template that the run and its exports keep. Raises: UserError when a file is missing or broken,
    no chat template is found, or releases of transformers read different ids from the files."""
    found = tokenizer_files.read(folder)
    template = chat.set_arguments(found.chat_template, template_args or {}, str(folder))
    return Tokenizer(found.tokenizer_json, found.settings, template, str(folder), system_role)


def _match_any(words: Iterable[str]) -> str:
    """A pattern of the longest of the words that begins somewhere; the look at their first
    characters is what makes thousands of words fast."""
    longest_first = sorted(filter(None, words), key=len, reverse=True)
    if not longest_first:
        return "(?!)"
    first = "".join(sorted({re.escape(word[0]) for word in longest_first}))
    return f"(?=[{first}])(?:{'|'.join(map(re.escape, longest_first))})"


def _join_system(messages: Messages) -> Messages:
    """The system message at the head of the first user message.

    Raises: UserError when no user message follows it."""
    system, *rest = messages
    if not rest or rest[0]["role"] != "user":
        told = "the chat template takes no system message, and no user message follows it"
        raise UserError(f"{told}: {_list_roles(messages)}")
    joined = "\n\n".join(text for text in (system["content"], rest[0]["content"]) if text)
    return [rest[0] | {"content": joined}, *rest[1:]]


def _list_roles(messages: Messages) -> str:
    return ", ".join(m["role"] for m in messages)
