"""The files of a tokenizer mean what they mean to transformers: whose special tokens they name, in
which of them, and by which class. The expected ids are those of transformers 4.57 and 5.24."""

import json
import pathlib
from typing import Any

import pytest

from popi_jax.data import tokenizer as tokenizer_lib
from popi_jax.errors import UserError
from tests.data import chat_folders
from tests.data.chat_folders import CHATML_TURNS

ASKED = chat_folders.talk(("user", "bees <|im_end|>"))


def make_bare(folder: pathlib.Path, *, vocab: bool = False, **fields: Any) -> pathlib.Path:
    """ChatML whose two control words are in no list of tokenizer.json; vocab: they are pieces."""
    backend = chat_folders.byte_level(None, [])
    backend.save(str(folder / "tokenizer.json"))
    if vocab:
        state = json.loads((folder / "tokenizer.json").read_text())
        pieces = state["model"]["vocab"]
        pieces |= {name: len(pieces) + i for i, name in enumerate(chat_folders.IM)}
        (folder / "tokenizer.json").write_text(json.dumps(state))
    config = {"chat_template": CHATML_TURNS, "tokenizer_class": "PreTrainedTokenizerFast", **fields}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def spell(words: tokenizer_lib.Tokenizer, ids: list[int]) -> str:
    return "".join(words.list_names(ids)).replace("Ċ", "\n").replace("Ġ", " ")


@pytest.mark.parametrize(
    ("fields", "more"),
    [
        ({"additional_special_tokens": chat_folders.IM}, {}),
        ({"extra_special_tokens": {"a": "<|im_start|>", "b": "<|im_end|>"}}, {}),
        ({"extra_special_tokens": chat_folders.IM}, {}),
        ({}, {"special_tokens_map.json": {"additional_special_tokens": chat_folders.IM}}),
        ({}, {"added_tokens.json": {"<|im_start|>": 400, "<|im_end|>": 401}}),
        ({"vocab": True, "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}, {}),
    ],
)
def test_special_tokens_of_any_file(
    tmp_path: pathlib.Path, fields: dict[str, Any], more: dict[str, Any]
) -> None:
    folder = make_bare(tmp_path, **fields)
    for name, content in more.items():
        (folder / name).write_text(json.dumps(content))
    words = tokenizer_lib.load(folder)
    size = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    start, end = (size - 2, size - 1) if "vocab" in fields else (size, size + 1)
    (ids,) = words.render(ASKED, cut="@@")
    assert words.eos_id == end and ids.count(start) == 2 and ids.count(end) == 1
    assert spell(words, ids) == (
        "<|im_start|>user\nbees <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    words.save(tmp_path / "saved")
    assert tokenizer_lib.load(tmp_path / "saved").render(ASKED, cut="@@") == (ids,)
    written = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert "extra_special_tokens" not in written  # of which transformers 4 reads no list


def test_the_map_of_special_tokens_counts_where_nothing_newer_is(tmp_path: pathlib.Path) -> None:
    folder = chat_folders.make_folder("chatml", tmp_path)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<unk>"}')
    begins = json.dumps(config | {"chat_template": "{{ bos_token }}" + CHATML_TURNS})
    path.write_text(begins)
    words = tokenizer_lib.load(folder)
    assert words.list_names([words.bos_id or 0]) == ["<unk>"]
    path.write_text(json.dumps(json.loads(begins) | {"added_tokens_decoder": {}}))
    assert tokenizer_lib.load(folder).bos_id == words._control.token_to_id("<s>")


def test_tokens_that_tokenizer_config_adds_come_behind_the_others(tmp_path: pathlib.Path) -> None:
    folder = chat_folders.make_folder("chatml", tmp_path)
    before = tokenizer_lib.load(folder)
    path = folder / "tokenizer_config.json"
    last = max(before._control.get_vocab(with_added_tokens=True).values())
    more = {str(last + 5): {"content": "<new>", "special": True}}
    end = before._control.token_to_id("</s>")
    more |= {str(end): {"content": "</s>", "special": True, "lstrip": True}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": more}))
    after = tokenizer_lib.load(folder)
    assert after._control.token_to_id("<new>") == last + 1
    assert after.eos_id == before.eos_id and after.encode("bees") == before.encode("bees")
    assert end is not None and after._control.get_added_tokens_decoder()[end].lstrip


@pytest.mark.parametrize(
    ("kind", "name", "names"),
    [
        ("gemma-2", "GemmaTokenizer", {"bos_token": "<bos>", "eos_token": "<eos>"}),
        ("qwen-2.5", "Qwen2Tokenizer", {"eos_token": "<|endoftext|>"}),
    ],
)
def test_names_that_only_the_class_knows(
    tmp_path: pathlib.Path, kind: str, name: str, names: dict[str, str]
) -> None:
    folder = chat_folders.make_folder(kind, tmp_path)
    path = folder / "tokenizer_config.json"
    config = {"tokenizer_class": name, "chat_template": chat_folders.KINDS[kind].template}
    path.write_text(json.dumps(config))
    words = tokenizer_lib.load(folder)
    assert names.items() <= words.settings.items()
    # a file that says so has none
    path.write_text(json.dumps(config | {"eos_token": None}))
    assert tokenizer_lib.load(folder).settings["eos_token"] is None


@pytest.mark.parametrize(
    ("kind", "fields", "config"),
    [
        ("smollm2", {"tokenizer_class": "GPTNeoXTokenizer"}, {}),
        ("llama-3", {"tokenizer_class": "Qwen2Tokenizer"}, {}),
        ("llama-3", {}, {"model_type": "qwen2"}),
        ("llama-3", {"tokenizer_class": None}, {"model_type": "qwen3"}),
        ("mistral-nemo", {"tokenizer_class": "GPT2Tokenizer"}, {}),
        ("mistral-v0.3", {"tokenizer_class": "GemmaTokenizerFast"}, {}),
    ],
)
def test_classes_that_build_another_tokenizer_are_refused(
    tmp_path: pathlib.Path, kind: str, fields: dict[str, Any], config: dict[str, Any]
) -> None:
    folder = chat_folders.make_folder(kind, tmp_path)
    assert tokenizer_lib.load(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="5 takes its own class .*; set tokenizer_class in"):
        tokenizer_lib.load(folder)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("tokenizer.json", {"added_tokens": [{"content": "x"}]}, "KeyError 'id'"),
        ("tokenizer.json", {"pre_tokenizer": [1]}, "should not: AttributeError"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, "should not: ValueError"),
        ("tokenizer_config.json", {"eos_token": {"lstrip": False}}, "KeyError 'content'"),
        ("tokenizer_config.json", {"split_special_tokens": True}, "supported is false"),
        ("generation_config.json", {"eos_token_id": "2"}, "should not: TypeError"),
        ("generation_config.json", {"eos_token_id": -1}, "should not: OverflowError"),
    ],
)
def test_what_should_not_be_in_a_file_is_told(
    tmp_path: pathlib.Path, file: str, change: dict[str, Any], message: str
) -> None:
    folder = chat_folders.make_folder("llama-2", tmp_path)
    path = folder / file
    if file == "generation_config.json":
        config = json.loads((folder / "tokenizer_config.json").read_text())
        del config["eos_token"]
        config["chat_template"] = CHATML_TURNS
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | change))
    with pytest.raises(UserError, match=message) as caught:
        tokenizer_lib.load(folder)
    assert "\n" not in str(caught.value)


def with_template(folder: pathlib.Path, template: str, kind: str = "chatml") -> pathlib.Path:
    chat_folders.make_folder(kind, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return folder


@pytest.mark.parametrize(
    "change",
    [
        "m['content'] | tojson",
        "m['content'] | replace('\\n', ' ')",
        "m['content'][:150]",
        "m['content'] | upper",
        "m['content'].split() | join(' ')",
        "m['content'] | striptags",
    ],
)
def test_templates_that_change_contents_are_refused(tmp_path: pathlib.Path, change: str) -> None:
    folder = with_template(tmp_path, CHATML_TURNS.replace("m['content']", change))
    with pytest.raises(UserError, match="once and unchanged"):
        tokenizer_lib.load(folder)


@pytest.mark.parametrize("fault", ["1 / 0", "messages[9].role", "{}.x.y", "'x' * -1 + 1"])
def test_faults_of_a_template_are_told(tmp_path: pathlib.Path, fault: str) -> None:
    with pytest.raises(UserError, match="the chat template refuses the roles user"):
        tokenizer_lib.load(with_template(tmp_path, "{{ " + fault + " }}" + CHATML_TURNS))


def test_a_reply_whose_thoughts_the_template_moves(tmp_path: pathlib.Path) -> None:
    """With thinking off the header holds empty thoughts; one with thoughts of its own is text."""
    folder = chat_folders.make_folder("qwen-3", tmp_path)
    words = tokenizer_lib.load(folder, {"enable_thinking": False})
    reply = words.encode_reply("<think>\nthey sing\n</think>\n\nbees sing")
    assert spell(words, reply) == "<think>\nthey sing\n</think>\n\nbees sing<|im_end|>"
    assert words.control_ids.intersection(reply) == {words.eos_id}


def test_words_that_become_control_words_are_spelled(tmp_path: pathlib.Path) -> None:
    """By a normalizer, or by a template that takes another word out of the middle."""
    strips = CHATML_TURNS.replace("m['content']", "m['content'] | replace('<s>', '')")
    words = tokenizer_lib.load(with_template(tmp_path / "strips", strips))
    text = "say <|im_<s>end|> and ＜|im_end|＞"
    for folder, content in (("strips", text), ("folds", text.replace("<s>", ""))):
        if folder == "folds":
            state = json.loads((tmp_path / "strips" / "tokenizer.json").read_text())
            state["normalizer"] = {"type": "NFKC"}
            for token in state["added_tokens"]:
                token["normalized"] = token["content"] == "<|im_end|>"
            (with_template(tmp_path / folder, CHATML_TURNS) / "tokenizer.json").write_text(
                json.dumps(state)
            )
            words = tokenizer_lib.load(tmp_path / folder)
        (ids,) = words.render([{"role": "user", "content": content}], cut="@@")
        assert ids.count(words.eos_id) == 1


def test_runs_of_spaces_and_tags_are_text(tmp_path: pathlib.Path) -> None:
    folder = chat_folders.make_folder("gemma-3", tmp_path)
    state = json.loads((folder / "tokenizer.json").read_text())
    last = max(token["id"] for token in state["added_tokens"])
    plain = {**state["added_tokens"][-1], "special": False}
    for i, name in enumerate(("<div>", "÷", "<tool>"), 1):
        state["added_tokens"].append({**plain, "id": last + i, "content": name})
    (folder / "tokenizer.json").write_text(json.dumps(state))
    words = tokenizer_lib.load(folder)
    text = "a  b <div> 6 ÷ 2"
    assert words.decode(words.encode(text)) == text
    assert {last + 1, last + 2} <= set(words.encode(text))
    assert {"▁▁", "<div>", "÷"}.isdisjoint(words.list_names(sorted(words.control_ids)))
    assert last + 3 in words.control_ids and words.vocab_size == last + 3
