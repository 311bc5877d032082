"""Encoded users on the disk: the same as those encoded anew, found again, and made anew where they
are damaged or something that decides about them has changed."""

import dataclasses
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from popi_jax.data import encode, packed, prompts, tokens
from popi_jax.data.encode import EncodedUser, Truncations, encode_user
from popi_jax.errors import UserError
from tests.data.people import USERS, make_config, make_tokenizer, make_user

CFG, WORDS = make_config(), make_tokenizer()
EXPECTED = [encode_user(user, WORDS, CFG) for user in USERS]


def open_in(home: Path, **how: Any) -> tokens.Encoded:
    return tokens.open_encoded(USERS, WORDS, how.pop("cfg", CFG), home, **how)


def test_a_record_holds_all_of_a_user() -> None:
    for user in EXPECTED:
        assert packed.unpack(packed.pack(user)) == user
    assert len(packed.pack(EXPECTED[5])) < 1500


def test_a_record_holds_users_of_any_shape() -> None:
    rng = random.Random(0)

    def ids() -> list[int]:
        return [rng.randrange(rng.choice((9, 70_000, 2**31))) for _ in range(rng.randrange(5))]

    for _ in range(200):
        pairs, readings = rng.randrange(4), rng.randrange(3)
        user = EXPECTED[0]._replace(
            user_id=rng.choice(("", "alignx/17", "é\n\U0001f600")),
            **{name: ids() for name in ("context", "oracle", "told", "profile")},
            **{name: [ids() for _ in range(pairs)] for name in ("turns", "chosen", "rejected")},
            readings=[(ids(), ids()) for _ in range(readings)],
            contrasts=[("a", 'b "')] * readings,
            usable=tuple(range(pairs)),
            truncations=Truncations(*range(len(Truncations._fields))),
        )
        found = packed.unpack(packed.pack(user))
        assert found == user
        assert all(type(a) is type(b) for a, b in zip(found, user, strict=True))


def test_what_is_kept_is_what_is_encoded(tmp_path: Path) -> None:
    kept = open_in(tmp_path)
    (folder,) = tmp_path.iterdir()
    assert [kept.ids[n] for n in range(len(USERS))] == EXPECTED
    assert kept.source is USERS and len(kept.ids) == 11
    on_demand = tokens.encode_users(USERS, WORDS, CFG)
    np.testing.assert_array_equal(kept.lengths, on_demand.lengths)
    assert [on_demand.ids[n] for n in (3, 3, 10)] == [EXPECTED[n] for n in (3, 3, 10)]
    for copy in (pickle.loads(pickle.dumps(kept.ids)), pickle.loads(pickle.dumps(on_demand.ids))):
        assert copy[7] == EXPECTED[7]
        np.testing.assert_array_equal(copy.lengths, kept.lengths)
    assert len(pickle.dumps(kept.ids)) < 1000  # whatever the number of users


def test_lengths_by_hand() -> None:
    user = EXPECTED[0]._replace(
        context=[1] * 9,
        told=[1] * 2,
        turns=[[1] * 3, [1] * 5],
        chosen=[[1], [1] * 4],
        rejected=[[1] * 2, [1] * 2],
        readings=[([1] * 6, [1])],
        usable=(1,),
    )
    row = np.array([packed.measure_user(user)], packed.LENGTHS)[0]
    found = {name: int(row[name]) for name in packed.LENGTHS.names if "cut" not in name}
    assert found == {
        **{"context": 9, "told": 2, "turn": 6, "answer": 4},
        **{"pairs": 1, "turns": 5, "answers": 6},
    }


def test_nothing_is_encoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_in(tmp_path)
    asked = list[str]()

    def note(user: Any, *rest: Any) -> EncodedUser:
        asked.append(user.user_id)
        return encode.encode_user(user, *rest)

    monkeypatch.setattr(tokens, "encode_user", note)
    assert open_in(tmp_path).ids[4] == EXPECTED[4]
    assert asked == ["probe"]  # that of the key


@pytest.mark.parametrize(
    "changed",
    [
        {"data__context_len": 119},
        {"data__answer_len": 7},
        {"data__num_pairs": 5},
        {"data__pair_layout": "paired"},
        {"data__prompt_aware": True, "batch__pairs": 1},
        {"model__summary_instruction": "?"},
        {"model__answer_instruction": "!"},
        {"model__summary_system": "."},
        {"model__signals_template": "{{ survey }}"},
        {"data__signals": "survey"},
        {"generator__reads": "signals", "schedule__phases": ("generator 1",)},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_settings_that_change_ids_have_another_key(changed: dict[str, Any]) -> None:
    other = make_config(**changed)
    assert tokens.identify(USERS, WORDS, CFG) != tokens.identify(USERS, WORDS, other)


def test_others_have_the_same_key() -> None:
    key = tokens.identify(USERS, WORDS, CFG)
    free = make_config(data__workers=2, data__path="elsewhere", seed=5, batch__users=2)
    assert tokens.identify(USERS, make_tokenizer(), free) == key


def test_templates_tokenizer_and_split_are_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [tokens.identify(USERS, WORDS, CFG)]
    keys.append(tokens.identify([dataclasses.replace(USERS[0], split="test")], WORDS, CFG))
    template = WORDS.chat_template.replace("message['content']", "message['content'] + ' '")
    parts = (WORDS.tokenizer_json, WORDS.settings, template, WORDS.source)
    keys.append(tokens.identify(USERS, type(WORDS)(*parts), CFG))
    render = prompts.render_signals
    monkeypatch.setattr(prompts, "render_signals", lambda *given: render(*given) + "!")
    keys.append(tokens.identify(USERS, WORDS, CFG))
    assert len(set(keys)) == 4


def test_a_tokenizer_that_differs_in_other_words_has_another_key() -> None:
    """Though it encodes the made user of the key alike."""
    template = WORDS.chat_template.replace(
        "message['content']", "message['content'] | replace('honey', 'bees')"
    )
    other = type(WORDS)(WORDS.tokenizer_json, WORDS.settings, template, WORDS.source)
    assert tokens._encode_probe(other, CFG) == tokens._encode_probe(WORDS, CFG)
    assert tokens.identify(USERS, other, CFG) != tokens.identify(USERS, WORDS, CFG)


def spoil_nothing(folder: Path) -> None:
    pass


def spoil_end(folder: Path) -> None:
    records = next(folder.glob("*.array_record"))
    os.truncate(records, records.stat().st_size - 1)


def spoil_one_file(folder: Path) -> None:
    next(folder.glob("*.array_record")).unlink()


def spoil_list(folder: Path) -> None:
    (folder / "files.json").write_text("{")


def spoil_lengths(folder: Path) -> None:
    path = folder / "lengths.npy"
    np.save(path, np.load(path)[:-1])
    sizes = json.loads((folder / "files.json").read_text())
    (folder / "files.json").write_text(json.dumps(sizes | {path.name: path.stat().st_size}))


@pytest.mark.parametrize(
    "spoil", [spoil_nothing, spoil_end, spoil_one_file, spoil_list, spoil_lengths]
)
def test_a_damaged_copy_is_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Any
) -> None:
    open_in(tmp_path)
    (folder,) = tmp_path.iterdir()
    spoil(folder)
    caplog.clear()
    found = open_in(tmp_path)
    assert [found.ids[n] for n in range(len(USERS))] == EXPECTED
    assert [*tmp_path.iterdir()] == [folder]
    told = [r.message for r in caplog.records if "is damaged" in r.message]
    assert len(told) == (spoil is not spoil_nothing) and all("anew" in text for text in told)


def test_a_record_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    kept = open_in(tmp_path)
    (records,) = kept.ids.folder.glob("*.array_record")
    content = bytearray(records.read_bytes())
    content[1000] ^= 255
    records.write_bytes(content)
    with pytest.raises(Exception) as raised:
        found = open_in(tmp_path)
        for number in range(len(USERS)):
            found.ids[number]
    # the check of types reads one user by chance, and wraps what it meets
    told = raised.value if isinstance(raised.value, UserError) else raised.value.__cause__
    assert isinstance(told, UserError)
    assert re.search("cannot be read .* delete the folder", str(told))


def test_without_room_on_the_disk_users_are_encoded_on_demand(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tokens").write_text("no folder can be made here")
    found = open_in(tmp_path / "tokens")
    assert isinstance(found.ids, tokens.OnDemand) and found.ids[2] == EXPECTED[2]
    assert "encoded on demand" in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == ["tokens"]


def test_other_hosts_read_what_the_first_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk that they share; else each makes its own."""
    waited = list[int]()

    def write_first(users: int) -> None:
        waited.append(users)
        if len(waited) == 1:
            open_in(tmp_path / "shared")
            monkeypatch.setattr(tokens, "_write", None)

    other = tokens.Host(first=False, wait=write_first)
    assert open_in(tmp_path / "shared", host=other).ids[3] == EXPECTED[3]
    monkeypatch.undo()
    assert open_in(tmp_path / "own", host=other).ids[3] == EXPECTED[3]
    assert waited == [11, 11] and (tmp_path / "own").is_dir()


MANY = """
import sys
from pathlib import Path
from popi_jax.data import tokens
from tests.data.people import USERS, make_config, make_tokenizer

if __name__ == "__main__":
    cfg, words = make_config(), make_tokenizer()
    alone = tokens.open_encoded(USERS, words, cfg, Path(sys.argv[1]))
    tokens._MANY = 4
    many = tokens.open_encoded(USERS, words, cfg, Path(sys.argv[2]))
    print(len(list(many.ids.folder.glob("*.array_record"))), "files")
    on_demand = tokens._measure(USERS, words, cfg, show=False)
    for found in (many, on_demand):
        assert (found.lengths == alone.lengths).all()
    print("equal" if list(many.ids) == list(alone.ids) else "different")
"""


def test_processes_share_the_work(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(MANY)
    root = str(Path(__file__).parents[2])
    command = [sys.executable, str(script), *(str(tmp_path / name) for name in "ab")]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split() == ["3", "files", "equal"], done.stderr


def test_encoding_needs_neither_jax_nor_grain() -> None:
    code = "import sys, popi_jax.data.tokens as t; print({'jax', 'grain'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_user_too_large_for_the_headers_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="headers and instructions"):
        open_in(tmp_path / "home", cfg=make_config(data__context_len=1))
    assert not any(tmp_path.rglob("*.array_record"))
    shutil.rmtree(tmp_path / "home", ignore_errors=True)


def test_few_records_are_kept_of_users_encoded_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_KEPT_RECORDS", 3)
    found = tokens.encode_users([make_user(n, 1) for n in range(6)], WORDS, CFG)
    for n in range(6):
        found.ids[n]
    assert len(found.ids._kept) == 3
