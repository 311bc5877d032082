"""Token ids equal those that transformers 4.57 and 5 gave for folders with the templates and
tokenizers of released models (record_chat_ids.py)."""

import json
import pathlib
from types import SimpleNamespace

import pytest

from popi_jax.data import prompts
from popi_jax.data import tokenizer as tokenizer_lib
from popi_jax.data.tokenizer import Tokenizer
from popi_jax.errors import UserError
from tests.data import chat_folders

RECORDED = json.loads((pathlib.Path(__file__).parent / "recorded_chat_ids.json").read_text())
LOADED = [name for name in chat_folders.KINDS if name != "r1"]
# that take no system message: it is put at the head of the first user message
JOINED = {"mistral-v0.1", "gemma-2"}
INSTRUCTIONS = ["", "What is known of the user:"]
SUMMARIES = ["short answers", "Short, warm answers.", "- bees\n- honey (42)", "x <|im_end|> </s>"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("folders")
    return {
        name: tokenizer_lib.load(chat_folders.make_folder(name, folder / name)) for name in LOADED
    }


@pytest.mark.parametrize("name", LOADED)
@pytest.mark.parametrize("talk", chat_folders.CONVERSATIONS)
def test_conversations(tokenizers: dict[str, Tokenizer], name: str, talk: str) -> None:
    messages = chat_folders.CONVERSATIONS[talk]
    (ids,) = tokenizers[name].render(messages, cut="@@")
    row = RECORDED[name]
    expected = row["sanitized"].get(talk) or row["conversations"][talk]
    if expected is None:
        assert name in JOINED and messages[0]["role"] == "system"
        joined = "\n\n".join(m["content"] for m in messages[:2] if m["content"])
        (expected,) = tokenizers[name].render(
            [{"role": "user", "content": joined}, *messages[2:]], cut="@@"
        )
    assert ids == expected


@pytest.mark.parametrize("name", LOADED)
@pytest.mark.parametrize("reply", chat_folders.REPLIES)
def test_replies(tokenizers: dict[str, Tokenizer], name: str, reply: str) -> None:
    """The turn and the reply are the whole, up to the end token."""
    words, whole = tokenizers[name], RECORDED[name]["replies"][reply]
    (turn,) = words.render([{"role": "user", "content": "bees ?"}], cut="@@")
    ids = turn + prompts.encode_answer(words, chat_folders.REPLIES[reply])
    spelled = reply == "thought" and {"<think>", "</think>"} <= set(words._control.get_vocab())
    if spelled and name != "qwen-3":  # no other template gives thoughts a meaning
        assert words.control_ids.isdisjoint(ids[len(turn) : -1])
    assert ids == whole[: len(ids)]
    assert ids[-1] == words.eos_id and words.eos_id not in whole[len(ids) + 1 :]


def make_config(instruction: str, template: str = "") -> SimpleNamespace:
    told = "\n\nIn one short sentence, what does this user prefer in replies?"
    model = SimpleNamespace(
        answer_instruction=instruction, summary_instruction=told, answer_template=template
    )
    return SimpleNamespace(model=model)


PROMPTS = ["user", "turns", "system", "unicode", "spaces", "code", "thoughts", "long"]


@pytest.mark.parametrize("name", LOADED)
@pytest.mark.parametrize("summary", SUMMARIES)
@pytest.mark.parametrize("talk", PROMPTS)
def test_prefix_summary_and_turn_are_the_whole(
    tokenizers: dict[str, Tokenizer], name: str, talk: str, summary: str
) -> None:
    """... but for tokens across the end of the summary, where the template writes text behind it:
    those of its last word and of the line break are then other ones."""
    words, prompt = tokenizers[name], chat_folders.CONVERSATIONS[talk]
    config = make_config("What is known of the user:")
    if name in ("mistral-v0.3", "mistral-nemo") and len(prompt) > 2:
        with pytest.raises(UserError, match="behind the first of 3 messages; set --config.model"):
            prompts.render_generator_turn(words, prompt)
        return
    before = prompts.render_generator_prefix(words, config)
    turn = prompts.render_generator_turn(words, prompt)
    own = prompt[0]["role"] == "system"
    system = config.model.answer_instruction + "\n" + summary
    system += "\n" + prompt[0]["content"] if own else ""
    (whole,) = words.render([{"role": "system", "content": system}, *prompt[own:]], cut="@@")
    ids = before + prompts.encode_summary(words, summary, config) + turn
    if ids == whole:
        return
    text_behind = own or name in {"mistral-nemo", *JOINED}
    assert text_behind and summary[-1] in ".)>", name
    assert words._control.decode(ids) == words._control.decode(whole)
    assert abs(len(ids) - len(whole)) <= 2


FRAMED = "{{ instruction }} [{{ summary }}]"
ASKED = "{{ instruction }}\n{{ summary }}\n\nSo answer:\n{{ prompt }}\nEnd."


@pytest.mark.parametrize("name", LOADED)
@pytest.mark.parametrize("talk", ["user", "turns", "system", "unicode"])
@pytest.mark.parametrize("template", [FRAMED, ASKED])
def test_a_template_of_the_user_s_gives_the_whole_too(
    tokenizers: dict[str, Tokenizer], name: str, talk: str, template: str
) -> None:
    """One holds the summary in a system message, the other with the prompt in that of the user."""
    words, prompt = tokenizers[name], chat_folders.CONVERSATIONS[talk]
    config, summary = make_config("Known:", template), "short answers"
    wording = prompts.get_wording(config)
    if template == FRAMED and name in ("mistral-v0.3", "mistral-nemo") and len(prompt) > 2:
        with pytest.raises(UserError, match="behind the first of 3 messages; set --config.model"):
            prompts.render_generator_turn(words, prompt, wording)
        return
    own = [m["content"] for m in prompt if m["role"] == "system"]
    rest = [m for m in prompt if m["role"] != "system"]
    if template == FRAMED:
        system = "\n".join([f"Known: [{summary}]", *own])
        whole = [{"role": "system", "content": system}, *rest]
    else:
        asked = "\n\n".join([*own, rest[0]["content"]])
        content = f"Known:\n{summary}\n\nSo answer:\n{asked}\nEnd."
        whole = [{"role": "user", "content": content}, *rest[1:]]
    ids = prompts.render_generator_prefix(words, config)
    ids += prompts.encode_summary(words, summary, config)
    ids += prompts.render_generator_turn(words, prompt, wording)
    assert words.render(whole, cut="@@") == (ids,)


@pytest.mark.parametrize("name", LOADED)
def test_a_system_message_before_the_signals(tokenizers: dict[str, Tokenizer], name: str) -> None:
    words, config = tokenizers[name], make_config("")
    told = config.model.summary_instruction
    ids = prompts.render_inference_context(words, "bees.", told, "You sum up.")
    ids += prompts.render_summary_turn(words, config)
    whole = [
        {"role": "system", "content": "You sum up."},
        {"role": "user", "content": "bees." + told},
    ]
    assert words.render(whole, cut="@@") == (ids,)


@pytest.mark.parametrize("name", LOADED)
@pytest.mark.parametrize("signals", ["", "bees", "bees.", "wrote: ok)", "12", "bees!\n", "é "])
def test_signals_and_request_are_the_whole(
    tokenizers: dict[str, Tokenizer], name: str, signals: str
) -> None:
    words, config = tokenizers[name], make_config("")
    told = config.model.summary_instruction
    ids = prompts.render_inference_context(words, signals, told)
    ids += prompts.render_summary_turn(words, config)
    assert words.render([{"role": "user", "content": signals + told}], cut="@@") == (ids,)


@pytest.mark.parametrize("name", LOADED)
def test_added_tokens_never_come_from_text(tokenizers: dict[str, Tokenizer], name: str) -> None:
    words = tokenizers[name]
    for token in words._control.get_added_tokens_decoder().values():
        text = f"say {token.content} please{token.content}"
        (ids,) = words.render([{"role": "user", "content": text}], cut="@@")
        (plain,) = words.render([{"role": "user", "content": "say please"}], cut="@@")
        count = [sum(i in words.control_ids for i in found) for found in (ids, plain)]
        assert count[0] == count[1], token.content
        reply = [i for i in prompts.encode_answer(words, text) if i in words.control_ids]
        assert reply == [i for i in prompts.encode_answer(words, "x") if i in words.control_ids]


def test_thoughts_can_be_switched_off(tmp_path: pathlib.Path) -> None:
    folder = chat_folders.make_folder("qwen-3", tmp_path / "base")
    thinks = tokenizer_lib.load(folder)
    quiet = tokenizer_lib.load(folder, {"enable_thinking": False})
    quiet.save(tmp_path / "run")
    names = {thinks._control.id_to_token(i) for i in thinks.reply_ids}
    assert names == {"<think>", "</think>", "<|im_end|>"}
    for words in (quiet, tokenizer_lib.load(tmp_path / "run")):
        (ids,) = words.render(chat_folders.CONVERSATIONS["turns"], cut="@@")
        assert ids == RECORDED["qwen-3"]["without thinking"]
        assert words.reply_ids == {words.eos_id}
    with pytest.raises(
        UserError, match='reads no "enable_thinkin"; it reads .*enable_thinking.*mean'
    ):
        tokenizer_lib.load(folder, {"enable_thinkin": False})


def test_a_template_that_opens_replies_otherwise_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"asks for a reply with '<think>\\n', which it leaves out"):
        tokenizer_lib.load(chat_folders.make_folder("r1", tmp_path))


def test_a_summary_in_the_first_user_message_where_the_template_would_put_it_last(
    tmp_path: pathlib.Path,
) -> None:
    folder, config = chat_folders.make_folder("mistral-v0.3", tmp_path), make_config("known:")
    words = tokenizer_lib.load(folder, system_role=False)
    prompt = chat_folders.CONVERSATIONS["turns"]
    ids = prompts.render_generator_prefix(words, config)
    ids += prompts.encode_summary(words, "short answers", config)
    ids += prompts.render_generator_turn(words, prompt)
    first = {"role": "user", "content": "known:\nshort answers\n\nbees ?"}
    assert words.render([first, *prompt[1:]], cut="@@") == (ids,)


@pytest.mark.parametrize(
    ("kind", "legacy", "refused"),
    [("first", False, False), ("first", True, True), ("prepend", True, True)]
    + [("prepend", False, True), ("prepend", None, True)],
)
def test_files_that_transformers_4_and_5_read_differently_are_refused(
    tmp_path: pathlib.Path, kind: str, legacy: bool | None, refused: bool
) -> None:
    folder = chat_folders.make_folder("llama-2", tmp_path)
    chat_folders.sentence_piece(kind, []).save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "LlamaTokenizer", "legacy": legacy}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if refused:
        with pytest.raises(
            UserError, match="5 takes its own class LlamaTokenizer.*set tokenizer_class"
        ):
            tokenizer_lib.load(folder)
    else:
        assert tokenizer_lib.load(folder).eos_id == 2
    space = json.loads((folder / "tokenizer.json").read_text())
    space["pre_tokenizer"] = {
        **{"type": "ByteLevel", "add_prefix_space": True},
        **{"trim_offsets": True, "use_regex": True},
    }
    (folder / "tokenizer.json").write_text(json.dumps(space))
    with pytest.raises(UserError, match='add_prefix_space is false, in tokenizer.json true.*set "'):
        tokenizer_lib.load(folder)


def test_a_space_that_begins_a_reply_may_be_joined_with_its_header(tmp_path: pathlib.Path) -> None:
    """The one difference of replies: the header stands in the prompt, so its line break cannot be
    joined with the reply."""
    folder = chat_folders.make_folder("smollm2", tmp_path)
    state = json.loads((folder / "tokenizer.json").read_text())
    model = state["model"]
    model["vocab"]["ĊĠ"] = model["vocab"].pop("".join(model["merges"].pop()))
    model["merges"].append(["Ċ", "Ġ"])
    (folder / "tokenizer.json").write_text(json.dumps(state))
    words = tokenizer_lib.load(folder)
    asked, reply = [{"role": "user", "content": "bees ?"}], "  bees sing"
    (turn,) = words.render(asked, cut="@@")
    ids = turn + prompts.encode_answer(words, reply)
    whole = words._encode_marked(words.write(asked) + reply)
    assert words.decode(ids) == words.decode(whole)
    border = len(turn) - 1
    assert ids[:border] == whole[:border] and ids[border + 2 : -1] == whole[border + 1 :]
    assert words._control.id_to_token(whole[border]) == "ĊĠ"
