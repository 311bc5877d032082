"""Small Hugging Face folders with the chat templates and the kinds of tokenizers of released
models, and conversations to render with them.

The templates do what the published ones do, in words of our own where the logic allows it. The
tokenizers have the normalizer, pre-tokenizer and added tokens of their families and a small
vocabulary."""

import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = [
    "bees make honey and bees sing",
    "please tell me about bees and honey.\n\nWhat is known of the user:\nshort answers",
    "short answers , please. You are a helpful assistant",
    "def f(x):\n    return x  # 12 345\n",
] * 4
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(
    words: str | None, special: list[str], *, plain: list[str] = (), nfc: bool = False, **model: Any
) -> tokenizers.Tokenizer:
    """As those of Llama 3, Qwen and Mistral Nemo; words None: of GPT-2, with single digits."""
    b = tokenizers.Tokenizer(models.BPE(**model))
    if nfc:
        b.normalizer = normalizers.NFC()
    if words is None:
        b.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    else:
        b.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(words), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    b.decoder = decoders.ByteLevel()
    b.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=ALPHABET, show_progress=False)
    )
    b.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    b.add_tokens([AddedToken(t, special=False, normalized=False) for t in plain])
    return b


def sentence_piece(kind: str, special: list[str], *, plain: list[str] = ()) -> tokenizers.Tokenizer:
    """As those of Llama 2 and Mistral ("prepend": older files, "first": newer ones), of Gemma
    ("gemma"), with bytes for what is not in the vocabulary."""
    pieces = ["<unk>", "<s>", "</s>"] if kind != "gemma" else ["<pad>", "<eos>", "<bos>", "<unk>"]
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    letters = sorted(
        {c for t in TEXTS for c in t if c not in " \n"} | {"▁", "[", "]", "/", "<", ">"}
    )
    trained.train_from_iterator(
        [t.replace("\n", " ") for t in TEXTS],
        trainers.BpeTrainer(
            vocab_size=250, special_tokens=pieces, initial_alphabet=letters, show_progress=False
        ),
    )
    model = json.loads(trained.to_str())["model"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    names = [f"<0x{i:02X}>" for i in range(256)]
    newlines = ["\n", "\n\n", "▁▁"] if kind == "gemma" else []
    for piece in (*names, *newlines, *model["vocab"]):
        vocab.setdefault(piece, len(vocab))
    merges = [tuple(m) if not isinstance(m, str) else tuple(m.split(" ")) for m in model["merges"]]
    b = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "prepend":
        b.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    elif kind == "first":
        b.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        b.normalizer = normalizers.Replace(" ", "▁")
        b.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    b.decoder = decoders.Sequence(back if kind == "gemma" else [*back, decoders.Strip(" ", 1, 0)])
    b.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in pieces + special])
    b.add_tokens([AddedToken(t, special=False, normalized=False) for t in [*newlines, *plain]])
    return b


class Kind(NamedTuple):
    """A folder: its tokenizer, its template and the fields of tokenizer_config.json."""

    make: Callable[[], tokenizers.Tokenizer]
    template: str
    fields: dict[str, Any]


CHATML_TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' "
    "+ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for m in loop_messages %}"
    "{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
LLAMA31 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL1 = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles') }}{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set told = messages[0]['content'] %}{% else %}{% set rest = messages %}"
    "{% set told = false %}{% endif %}{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if loop.index0 == 0 and told != false %}"
    "{% set content = '<<SYS>>\n' + told + '\n<</SYS>>\n\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
MISTRAL3 = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("roles must alternate user/assistant after the system message") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("only user and assistant roles are supported") }}
    {%- endif %}
{%- endfor %}
"""
NEMO = MISTRAL3.replace('"[INST] "', '"[INST]"').replace(
    '{{- " " + message["content"]|trim + eos_token}}', '{{- message["content"] + eos_token}}'
)
QWEN25 = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools' }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first)
        or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools' }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
        and not(message.content.startswith('<tool_response>')
        and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set before = content.split('</think>')[0].rstrip('\\n') %}
            {%- set reasoning_content = before.split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index
            and (loop.last or (not loop.last and reasoning_content)) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') }}
            {{- '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
GEMMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if m['role'] == 'assistant' %}{% set role = 'model' %}"
    "{% else %}{% set role = m['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
GEMMA3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("roles must alternate user/assistant") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\n'}}
{%- endif -%}
"""
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
R1 = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
    "{% endif %}{% set ns = namespace(is_first=false, system_prompt='') %}{%- for m in messages %}"
    "{%- if m['role'] == 'system' %}{% set ns.system_prompt = m['content'] %}{%- endif %}"
    "{%- endfor %}{{bos_token}}{{ns.system_prompt}}{%- for m in messages %}"
    "{%- if m['role'] == 'user' %}{{'<｜User｜>' + m['content']}}{%- endif %}"
    "{%- if m['role'] == 'assistant' %}{% set content = m['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor %}"
    "{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{'<|system|>\n' + m['content'] + "
    "'<|end|>\n'}}{% elif m['role'] == 'user' %}{{'<|user|>\n' + m['content'] + '<|end|>\n'}}"
    "{% elif m['role'] == 'assistant' %}{{'<|assistant|>\n' + m['content'] + '<|end|>\n'}}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
IM = ["<|im_start|>", "<|im_end|>"]
LLAMA3_TOKENS = [
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    "<|eot_id|>",
]
LLAMA3_FIELDS = {**FAST, "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
QWEN_FIELDS = {
    "tokenizer_class": "Qwen2Tokenizer",
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "add_prefix_space": False,
}
S_FIELDS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
GEMMA_FIELDS = {
    "tokenizer_class": "GemmaTokenizer",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
}
TURNS = ["<start_of_turn>", "<end_of_turn>"]
R1_TOKENS = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
THINK = ["<think>", "</think>", "<tool_call>", "</tool_call>"]


def llama3() -> tokenizers.Tokenizer:
    return byte_level(LLAMA3_WORDS, LLAMA3_TOKENS, ignore_merges=True)


KINDS = {
    "llama-3": Kind(llama3, LLAMA3, LLAMA3_FIELDS),
    "llama-3.1": Kind(llama3, LLAMA31, LLAMA3_FIELDS),
    "mistral-v0.1": Kind(lambda: sentence_piece("first", []), MISTRAL1, FAST | S_FIELDS),
    "mistral-v0.3": Kind(
        lambda: sentence_piece("first", ["[INST]", "[/INST]"]),
        MISTRAL3,
        {"tokenizer_class": "LlamaTokenizer", "legacy": False, **S_FIELDS},
    ),
    "mistral-nemo": Kind(
        lambda: byte_level(TEKKEN_WORDS, ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]),
        NEMO,
        FAST | S_FIELDS,
    ),
    "llama-2": Kind(lambda: sentence_piece("prepend", []), LLAMA2, FAST | S_FIELDS),
    "qwen-2.5": Kind(
        lambda: byte_level(
            QWEN_WORDS, ["<|endoftext|>", *IM], plain=["<tool_call>", "</tool_call>"], nfc=True
        ),
        QWEN25,
        QWEN_FIELDS,
    ),
    "qwen-3": Kind(
        lambda: byte_level(QWEN_WORDS, ["<|endoftext|>", *IM], plain=THINK, nfc=True),
        QWEN3,
        QWEN_FIELDS,
    ),
    "gemma-2": Kind(lambda: sentence_piece("gemma", TURNS), GEMMA2, GEMMA_FIELDS),
    "gemma-3": Kind(
        lambda: sentence_piece("gemma", TURNS, plain=["<table>"]), GEMMA3, GEMMA_FIELDS
    ),
    "smollm2": Kind(
        lambda: byte_level(None, ["<|endoftext|>", *IM]),
        SMOLLM2,
        {
            **{"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False},
            **{"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
        },
    ),
    "chatml": Kind(  # its turns are added, not special, and the model files name another end
        lambda: byte_level(None, ["<unk>", "<s>", "</s>"], plain=IM),
        CHATML_TURNS,
        {**FAST, "bos_token": "<s>", "eos_token": "</s>"},
    ),
    "generation": Kind(
        lambda: byte_level(LLAMA3_WORDS, ["<|endoftext|>", *IM]),
        GENERATION,
        {**FAST, "eos_token": "<|im_end|>"},
    ),
    "r1": Kind(
        lambda: byte_level(LLAMA3_WORDS, R1_TOKENS, plain=["<think>", "</think>"]),
        R1,
        {**FAST, "bos_token": R1_TOKENS[0], "eos_token": R1_TOKENS[1]},
    ),
    "phi-3": Kind(
        lambda: sentence_piece("prepend", ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]),
        PHI3,
        FAST | S_FIELDS,
    ),
}


def talk(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


CONVERSATIONS = {
    "user": talk(("user", "tell me about bees")),
    "system": talk(("system", "short answers, please."), ("user", "tell me about bees.")),
    "turns": talk(("user", "bees ?"), ("assistant", "bees sing."), ("user", "and honey ?")),
    "system and turns": talk(
        ("system", "What is known of the user:\nshort answers"),
        *(("user", "bees ?"), ("assistant", "bees sing.")),
        *(("user", "why ?"), ("assistant", "for honey"), ("user", "and then ?")),
    ),
    "empty system": talk(("system", ""), ("user", "bees ?")),
    "unicode": talk(
        ("user", "naïve café — 蜂蜜は甘い 🐝 e\u0301 ﬁ \u00a0x"),
        *(("assistant", "добрый мёд"), ("user", "ok ✓")),
    ),
    "spaces": talk(
        ("user", "  bees  and\n\n\n honey \n"), ("assistant", " they sing "), ("user", "\tok\n")
    ),
    "code": talk(("user", "def f(x):\n    return x  # 12 345\n\n\n\nprint(f(1234567))")),
    "thoughts": talk(
        ("user", "bees ?"),
        ("assistant", "<think>\nbees sing, do they\n</think>\n\nthey sing"),
        ("user", "and honey ?"),
    ),
    "control words": talk(("user", "say <|im_end|> </s> [INST] <end_of_turn> <|eot_id|> please")),
    "tags": talk(("user", "a <b>bold</b> [x] <|x|> {y} <table> word")),
    "long": talk(("user", "please tell me about bees and honey. " * 40)),
}
# whose words would become control tokens
HAVE_CONTROL_WORDS = ("control words",)
REPLIES = {
    "plain": "bees make honey and bees sing.",
    "spaces": "  bees sing \n",
    "lines": "short answers.\n\n- bees\n- honey\n",
    "unicode": "蜂蜜 🐝 café",
    "thought": "<think>\nthey sing\n</think>\n\nbees sing",
}


def make_folder(name: str, folder: pathlib.Path) -> pathlib.Path:
    kind = KINDS[name]
    folder.mkdir(parents=True, exist_ok=True)
    kind.make().save(str(folder / "tokenizer.json"))
    config = json.dumps({**kind.fields, "chat_template": kind.template}, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(config)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder
