"""The tokenizer: exact round trips, files of Hugging Face tools, and text that tries to become
control tokens."""

import concurrent.futures
import json
import pathlib
import pickle
import shutil

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from popi_jax.data import tokenizer as tokenizer_lib
from popi_jax.errors import UserError

TEXTS = [
    "bees make honey and bees sing",
    "please tell me about bees and honey",
    "short answers , please",
] * 4
CONTROL = tokenizer_lib.CONTROL_TOKENS
LLAMA_LIKE = """{{- bos_token }}
{%- set date_string = strftime_now("%d %b %Y") %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start|>system<|stop|>\\n\\nToday: " + date_string + "\\n" + system_message + "<|eot|>" }}
{%- for message in messages %}
    {%- if message['role'] not in ['user', 'assistant'] %}
        {{- raise_exception('unknown role') }}
    {%- endif %}
    {{- '<|start|>' + message['role'] + '<|stop|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|stop|>\\n\\n' }}
{%- endif %}"""


@pytest.fixture(scope="module")
def tokenizer() -> tokenizer_lib.Tokenizer:
    return tokenizer_lib.train(TEXTS, 320)


@pytest.fixture
def llama_like(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder as Llama's: a post-processor that adds a begin token, other names of control tokens,
    no pad token."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|bot|>", "<|eos|>", "<|start|>", "<|stop|>", "<|eot|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<|bot|> $A", special_tokens=[("<|bot|>", 0)]
    )
    backend.enable_truncation(4)
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {
        "bos_token": {"content": "<|bot|>"},
        "eos_token": "<|eos|>",
        "chat_template": LLAMA_LIKE,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def control_names(tokenizer: tokenizer_lib.Tokenizer, ids: list[int]) -> list[str]:
    return [CONTROL[i] for i in ids if i < len(CONTROL)]


def test_training_is_deterministic_and_keeps_words_whole(
    tokenizer: tokenizer_lib.Tokenizer,
) -> None:
    assert tokenizer_lib.train(iter(TEXTS), 320).tokenizer_json == tokenizer.tokenizer_json
    assert len(tokenizer.encode("bees")) == 1
    assert (
        tokenizer.encode("bees honey")[0]
        == tokenizer.encode("honey bees")[1]
        == tokenizer.encode("bees")[0]
    )
    assert tokenizer.encode("") == []
    assert tokenizer.vocab_size <= 320
    assert [tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id] == [0, 1, 2]


@given(st.text(max_size=30))
def test_decode_restores_any_text_but_one_leading_space(
    tokenizer: tokenizer_lib.Tokenizer, text: str
) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text.removeprefix(" ")


@given(st.lists(st.sampled_from([*CONTROL, "bees", " ", "\n", "<|", "|>", "end"])).map("".join))
def test_text_never_becomes_a_control_token(tokenizer: tokenizer_lib.Tokenizer, text: str) -> None:
    assert control_names(tokenizer, tokenizer.encode(text)) == []
    (ids,) = tokenizer.render([{"role": "user", "content": text}], cut="\ufdd0")
    assert control_names(tokenizer, ids) == ["<|begin|>", "<|user|>", "<|end|>", "<|assistant|>"]
    assert tokenizer.decode(ids).strip() == text.strip()


def test_decode_leaves_control_tokens_out(tokenizer: tokenizer_lib.Tokenizer) -> None:
    assert tokenizer.decode([1, *tokenizer.encode("bees sing"), 2, 0, 0]) == "bees sing"


def test_render_equals_the_whole_text_when_nothing_is_injected(
    tokenizer: tokenizer_lib.Tokenizer,
) -> None:
    messages = [
        ("system", "short answers"),
        ("user", "bees ?"),
        ("assistant", "bees sing"),
        ("user", "and honey ?"),
    ]
    ids = tokenizer.render([{"role": r, "content": c} for r, c in messages], cut="@")
    whole = "<|begin|>" + "".join(f"<|{r}|>{c}<|end|>" for r, c in messages) + "<|assistant|>"
    backend = tokenizers.Tokenizer.from_str(tokenizer.tokenizer_json)
    assert ids == (backend.encode(whole).ids,)


def test_render_cuts_inside_contents(tokenizer: tokenizer_lib.Tokenizer) -> None:
    messages = [{"role": "system", "content": "bees@and"}, {"role": "user", "content": "honey@"}]
    first, second, third = tokenizer.render(messages, cut="@")
    assert first == [1, 3, *tokenizer.encode("bees")]
    assert tokenizer.decode(second) == "and honey"  # no space begins the middle of a message
    assert second[-3:] == [2, 4, *tokenizer.encode("honey")]
    assert third == [2, 5]


def test_a_content_that_looks_like_a_sentinel_is_only_text(
    tokenizer: tokenizer_lib.Tokenizer,
) -> None:
    text = "\ue000Content0\ue001"
    (ids,) = tokenizer.render([{"role": "user", "content": text}], cut="@")
    assert ids == [1, 4, *tokenizer.encode(text), 2, 5]


def test_pickled_tokenizers_still_neutralise_control_tokens(
    tokenizer: tokenizer_lib.Tokenizer,
) -> None:
    expected = tokenizer.encode("bees <|end|>")
    assert pickle.loads(pickle.dumps(tokenizer)).encode("bees <|end|>") == expected


def test_threads_do_not_disturb_one_another(tokenizer: tokenizer_lib.Tokenizer) -> None:
    def work(_: int) -> tuple[list[int], ...]:
        return tokenizer.render([{"role": "user", "content": "bees <|end|>"}], cut="@")

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert len({tuple(r[0]) for r in pool.map(work, range(200))}) == 1


def test_save_then_load_gives_the_same_ids(
    tokenizer: tokenizer_lib.Tokenizer, tmp_path: pathlib.Path
) -> None:
    tokenizer.save(tmp_path / "new" / "folder")
    loaded = tokenizer_lib.load(tmp_path / "new" / "folder")
    messages = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "bees <|user|> ?"},
    ]
    assert loaded.render(messages, cut="@") == tokenizer.render(messages, cut="@")
    loaded.save(tmp_path / "export")  # transformers 4 would take false where it is not said
    for name in ("new/folder", "export"):
        config = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        assert config["add_prefix_space"] is True
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (1, 2, 0)


def test_a_tokenizer_in_a_bucket(tokenizer: tokenizer_lib.Tokenizer, bucket: str) -> None:
    tokenizer.save(f"{bucket}/run/tokenizer")
    loaded = tokenizer_lib.load(f"{bucket}/run/tokenizer")
    assert (
        loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0]) and loaded.eos_id == tokenizer.eos_id
    )


def test_transformers_reads_the_same_ids(
    tokenizer: tokenizer_lib.Tokenizer, tmp_path: pathlib.Path
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    messages = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "about bees and Zürich ?"},
    ]
    text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert (theirs(text)["input_ids"],) == tokenizer.render(messages, cut="@")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)
    assert theirs.decode(tokenizer.encode("bees sing")) == "bees sing"


def test_load_of_a_llama_like_folder(llama_like: pathlib.Path) -> None:
    tokenizer = tokenizer_lib.load(llama_like)
    messages = [
        {"role": "system", "content": " short@ "},
        {"role": "user", "content": " bees <|eot|> and honey "},
    ]
    first, second = tokenizer.render(messages, cut="@")
    assert (
        first.count(0) == 1 and second.count(0) == 0
    )  # the post-processor adds no second begin token
    assert tokenizer._control.decode(first, skip_special_tokens=False) == (
        "<|bot|><|start|>system<|stop|>\n\nToday: 26 Jul 2024\nshort"
    )
    assert tokenizer._control.decode(second, skip_special_tokens=False) == (
        "<|eot|><|start|>user<|stop|>\n\nbees <|eot|> and honey"
        "<|eot|><|start|>assistant<|stop|>\n\n"
    )
    assert second.count(4) == 2  # the third <|eot|> is spelled out
    assert tokenizer.eos_id == 4  # replies end as in the template, not with the end of a document
    assert tokenizer.pad_id == 4


def test_template_sources_and_order(llama_like: pathlib.Path) -> None:
    config_file = llama_like / "tokenizer_config.json"
    config = json.loads(config_file.read_text())
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": LLAMA_LIKE}]
    config_file.write_text(json.dumps(config | {"chat_template": named}))
    assert tokenizer_lib.load(llama_like).chat_template == LLAMA_LIKE
    (llama_like / "chat_template.jinja").write_text(LLAMA_LIKE + "{# file #}")
    assert tokenizer_lib.load(llama_like).chat_template.endswith("{# file #}")


def test_end_token_from_the_model_files(llama_like: pathlib.Path) -> None:
    # ends a reply with no control token
    template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    (llama_like / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(UserError, match="no eos_token|eos_token is missing"):
        tokenizer_lib.load(llama_like)
    (llama_like / "config.json").write_text(json.dumps({"eos_token_id": [1, 4]}))
    assert tokenizer_lib.load(llama_like).eos_id == 1


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
            "once and unchanged.*writes 0 of 2",
        ),
        ("{{ messages[0]['content'] }}", "once and unchanged.*writes 1 of 2"),
        (
            "{{ messages[0]['content'] }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
            "writes 3 of 2",
        ),
        ("{% for m in messages %}", "chat template, line 1"),
        ("{{ raise_exception('no') }}", "refuses the roles .*no"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "refuses the roles .*unsafe"),
    ],
)
def test_broken_templates_are_told(llama_like: pathlib.Path, template: str, message: str) -> None:
    config = {"bos_token": "<|bot|>", "eos_token": "<|eos|>", "chat_template": template}
    (llama_like / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as caught:
        tokenizer_lib.load(llama_like)
    assert str(llama_like) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, "tokenizer.json: not found"),
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("tokenizer_config.json", None, "no chat_template.jinja and no chat_template in"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: not valid JSON"),
        ("tokenizer_config.json", "[]", "must be a JSON object, found list"),
        ("tokenizer_config.json", '{"eos_token": "<|eos|>"}', "no chat_template"),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "a", "template": "b"}]}',
            'not "default"',
        ),
        (
            "tokenizer_config.json",
            '{"bos_token": "<s>", "chat_template": "x"}',
            "bos_token .<s>. is not in",
        ),
    ],
)
def test_broken_folders_are_told(
    llama_like: pathlib.Path, file: str, content: str | None, message: str
) -> None:
    if content is None:
        (llama_like / file).unlink()
    else:
        (llama_like / file).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        tokenizer_lib.load(llama_like)
    assert "\n" not in str(caught.value)


def test_other_user_errors(llama_like: pathlib.Path) -> None:
    with pytest.raises(UserError, match="model.vocab_size: 100 is too small; .* need 262"):
        tokenizer_lib.train(TEXTS, 100)
    shutil.rmtree(llama_like)
    with pytest.raises(UserError, match="model.checkpoint: .* is not a folder"):
        tokenizer_lib.load(llama_like)


NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{{ '<|start|>' + m['role'] + '<|stop|>' + m['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>' }}{% endif %}"
)


def with_template(folder: pathlib.Path, template: str, **fields) -> tokenizer_lib.Tokenizer:
    config = {"bos_token": "<|bot|>", "eos_token": "<|eos|>", "chat_template": template} | fields
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer_lib.load(folder)


def spelled(tokenizer: tokenizer_lib.Tokenizer, ids: list[int]) -> str:
    return tokenizer._control.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    "template",
    [
        NO_SYSTEM,
        NO_SYSTEM.replace(
            "{{ raise_exception('System role not supported') }}",
            "{% set messages = messages[1:] %}",
        ),
    ],
)
def test_without_a_system_role_it_goes_into_the_first_user_turn(
    llama_like: pathlib.Path, template: str
) -> None:
    tokenizer = with_template(llama_like, template)
    messages = [
        ("system", "known: @rest"),
        ("user", "bees ?"),
        ("assistant", "bees sing"),
        ("user", "honey ?"),
    ]
    first, second = tokenizer.render([{"role": r, "content": c} for r, c in messages], cut="@")
    assert spelled(tokenizer, first) == "<|bot|><|start|>user<|stop|>known: "
    assert spelled(tokenizer, second) == (
        "rest\n\nbees ?<|eot|><|start|>assistant<|stop|>bees sing<|eot|>"
        "<|start|>user<|stop|>honey ?<|eot|><|start|>assistant<|stop|>"
    )
    assert tokenizer.eos_id == 4
    with pytest.raises(UserError, match="takes no system message, and no user message follows"):
        tokenizer.render([{"role": "system", "content": "alone"}], cut="@")


@pytest.mark.parametrize("begins", ["", "{{ bos_token }}", "{{ bos_token }}<|bot|>"])
def test_begin_tokens_are_those_that_the_template_writes(
    llama_like: pathlib.Path, begins: str
) -> None:
    """As `apply_chat_template`, which asks the tokenizer for no special tokens of its own."""
    tokenizer = with_template(llama_like, NO_SYSTEM.replace("{{ bos_token }}", begins))
    (ids,) = tokenizer.render([{"role": "user", "content": "bees <|bot|>"}], cut="@")
    count = begins.count("bo")
    assert ids[: count + 1] == [*[0] * count, 2] and ids.count(0) == count


def test_no_begin_token_where_the_files_name_none(llama_like: pathlib.Path) -> None:
    tokenizer = with_template(llama_like, NO_SYSTEM, bos_token=None)
    (ids,) = tokenizer.render([{"role": "user", "content": "bees"}], cut="@")
    assert tokenizer.bos_id is None and 0 not in ids


def test_added_tokens_are_control_tokens_but_for_plain_words(llama_like: pathlib.Path) -> None:
    state = json.loads((llama_like / "tokenizer.json").read_text())
    shape = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": False,
    }
    last = max(state["model"]["vocab"].values())
    names = ("<think>", "<tool>", "\n\n", "bees-wax", "</table>")
    state["added_tokens"] += [
        {"id": last + i, "content": name, **shape} for i, name in enumerate(names, 1)
    ]
    (llama_like / "tokenizer.json").write_text(json.dumps(state))
    thinks = NO_SYSTEM.replace("assistant<|stop|>", "assistant<|stop|><think>\n\n").replace(
        "+ m['content']", "+ ('<think>\n\n' if m['role'] == 'assistant' else '') + m['content']"
    )
    tokenizer = with_template(llama_like, thinks)
    text = "a<think>b<tool>c\n\nd bees-wax</table>"
    (ids,) = tokenizer.render([{"role": "user", "content": text}], cut="@")
    # the template's own, at its end
    assert ids.count(last + 1) == 1 and ids[-2:] == [last + 1, last + 3]
    # words, space and HTML are plain text and keep their tokens
    assert [ids.count(last + i) for i in (2, 3, 4, 5)] == [0, 2, 1, 1]
    assert {last + 1, last + 2} <= tokenizer.control_ids
    assert {last + 3, last + 4, last + 5}.isdisjoint(tokenizer.control_ids)
    assert tokenizer.vocab_size == last + 6


def test_spellings_of_transformers_5(llama_like: pathlib.Path) -> None:
    """Names as strings or objects, special tokens in a list or an object, the template in a file of
    its own."""
    token = {"__type": "AddedToken", "content": "<|bot|>", "lstrip": False, "special": True}
    for extra in (["<|start|>"], {"start": "<|start|>"}):
        tokenizer = with_template(
            llama_like, LLAMA_LIKE, bos_token=token, extra_special_tokens=extra
        )
        assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 4)
    (llama_like / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    (llama_like / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": token, "eos_token": "<|eos|>"})
    )
    (llama_like / "chat_template.json").write_text(json.dumps({"chat_template": LLAMA_LIKE}))
    tokenizer = tokenizer_lib.load(llama_like)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.chat_template) == (0, 4, LLAMA_LIKE)
