"""The prepared copy: made once per content and options, read by index; the sample, the download,
and their refusals."""

import dataclasses
import inspect
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import types
from pathlib import Path

import grain
import pytest
from absl import flags

from popi_jax import config_rules, distributed
from popi_jax.config_data import DataConfig
from popi_jax.data import prepared, prepared_files
from popi_jax.data.records import Comment, Pair, User
from popi_jax.data.sources import download, jsonl
from popi_jax.data.sources.made_people import write_sample
from popi_jax.data.sources.source import Card, Loaded, Source
from popi_jax.data.splits import choose_split, split_topics
from popi_jax.errors import UserError
from tests.data.people import make_config, write_users
from tests.tiny_run import command


def options(tmp_path: Path, **changes: object) -> DataConfig:
    fields = {
        "path": str(tmp_path / "raw"),
        "prepared": str(tmp_path / "prepared"),
        "download": False,
        "validation_fraction": 0.2,
        "test_fraction": 0.2,
        "num_shots": 3,
        "num_pairs": 4,
        "sample_people": 30,
    }
    return dataclasses.replace(DataConfig(), **{**fields, **changes})


def own(tmp_path: Path, people: int = 40) -> DataConfig:
    """Options for a file of own data: one pair for each of the people."""
    prompt = [{"role": "user", "content": "what now?"}]
    users = [
        User(
            f"u{i}",
            "ünïcode\u2028",
            "",
            (),
            (Comment("", f"I am {i}"),),
            (Pair(f"{i}", prompt, f"tea {i}", "b"),),
        )
        for i in range(people)
    ]
    write_users(users, tmp_path / "raw.jsonl")
    return options(tmp_path, source="jsonl", path=str(tmp_path / "raw.jsonl"))


def test_users_come_back_by_index(tmp_path: Path) -> None:
    cfg = own(tmp_path)
    dataset = prepared.prepare(cfg, allow_sample=False)
    expected = jsonl.load(Path(cfg.path), cfg).users
    assert (dataset.name, dataset.data) == ("jsonl", "own")
    for split, users in dataset.splits.items():
        of_split = [user for user in expected if user.split == split]
        assert list(pickle.loads(pickle.dumps(users))) == of_split
        counted = dataset.stats[split]
        assert counted["users"] == counted["pairs"] == counted["chosen_longer"] == len(of_split)
        assert counted["pairs_per_user"] == {"1": len(of_split)} and not counted["duplicates"]
        assert users[-1] == of_split[-1] and users[:2] == of_split[:2]
        assert list(grain.MapDataset.source(users)) == of_split
        with pytest.raises(IndexError):
            users[len(users)]


def test_a_copy_is_made_once_and_never_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = own(tmp_path)
    first = prepared.prepare(cfg, allow_sample=False)
    with monkeypatch.context() as patch:
        patch.setattr(prepared, "_write", lambda *args: pytest.fail("written again"))
        assert prepared.prepare(cfg, allow_sample=False).prepared == first.prepared
    other = dataclasses.replace(cfg, num_shots=1)
    assert prepared.prepare(other, allow_sample=False).prepared != first.prepared
    own(tmp_path, people=41)
    changed = prepared.prepare(cfg, allow_sample=False)
    assert sum(len(users) for users in changed.splits.values()) == 41
    monkeypatch.setattr(prepared, "FORMAT", prepared.FORMAT + 1)
    assert prepared.prepare(cfg, allow_sample=False).prepared != changed.prepared


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = own(tmp_path)

    def fail(writer: prepared_files.UserWriter) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(prepared_files.UserWriter, "close", fail)
        with pytest.raises(UserError, match="data.prepared.*disk full.*another folder"):
            prepared.prepare(cfg, allow_sample=False)
    assert [
        p.name
        for p in (tmp_path / "prepared").rglob("*")
        if p.is_file() or p.name.startswith(".part")
    ] == ["sums.json"]
    assert len(prepared.prepare(cfg, allow_sample=False).splits["train"]) > 0


def test_skipped_rows_are_listed(tmp_path: Path) -> None:
    cfg = own(tmp_path)
    path = Path(cfg.path)
    path.write_text(path.read_text() + "nonsense\n")
    with pytest.raises(UserError, match=r"raw.jsonl:41: not JSON at column 1"):
        prepared.prepare(cfg, allow_sample=False)
    cfg = dataclasses.replace(cfg, on_bad_row="skip")
    dataset = prepared.prepare(cfg, allow_sample=False)
    assert dataset.stats["rows"] == {"skipped": 1}
    (row,) = (dataset.prepared / "bad_rows.jsonl").read_text().splitlines()
    assert json.loads(row)["error"].startswith(f"{path}:41: not JSON")


def test_an_empty_split_is_an_error(tmp_path: Path) -> None:
    cfg = own(tmp_path, people=1)
    with pytest.raises(UserError, match=r"split of 1 users is empty. (Raise|Lower)"):
        prepared.prepare(cfg, allow_sample=False)
    cfg = dataclasses.replace(cfg, validation_fraction=0.0, test_fraction=0.0)
    dataset = prepared.prepare(cfg, allow_sample=False)
    assert {split: len(users) for split, users in dataset.splits.items()} == {
        "train": 1,
        "validation": 0,
        "test": 0,
    }


def test_no_user_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "raw.jsonl").write_text("nonsense\n")
    cfg = options(tmp_path, source="jsonl", path=str(tmp_path / "raw.jsonl"), on_bad_row="skip")
    with pytest.raises(UserError, match=r"found no user .* the first of 1 bad rows: .*raw.jsonl:1"):
        prepared.prepare(cfg, allow_sample=False)


def test_unknown_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='Did you mean "prism"'):
        prepared.prepare(options(tmp_path, source="prsm"), allow_sample=False)


def test_the_sample_stands_in_only_when_allowed_and_loudly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = options(tmp_path)
    with pytest.raises(UserError, match="no PRISM files"):
        prepared.prepare(cfg, allow_sample=False)
    with caplog.at_level(logging.WARNING, logger="absl"):
        dataset = prepared.prepare(cfg, allow_sample=True)
    assert "MADE data" in caplog.text
    assert dataset.data == "sample" and dataset.folder.name.startswith("prism-sample-30-")
    assert sum(len(users) for users in dataset.splits.values()) == 30
    user = dataset.splits["train"][0]
    assert len(user.shots) == 3 and len(user.pairs) == 4 and len(user.readings) == 3 and user.oracle


def test_published_files_are_preferred_and_must_be_complete(tmp_path: Path) -> None:
    cfg = options(tmp_path)
    write_sample(tmp_path / "raw", people=30)
    assert prepared.prepare(cfg, allow_sample=True).data == "published"
    (tmp_path / "raw" / "survey.jsonl").unlink()
    with pytest.raises(
        UserError, match=r"no survey.jsonl beside conversations.jsonl, utterances.jsonl"
    ):
        prepared.prepare(cfg, allow_sample=True)


def test_a_failed_download_falls_back_or_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object) -> None:
        raise download.DownloadFailed("the hub is away.")

    monkeypatch.setattr(download, "download_hub", unreachable)
    cfg = options(tmp_path, download=True)
    assert prepared.prepare(cfg, allow_sample=True).data == "sample"
    with pytest.raises(UserError, match="the hub is away"):
        prepared.prepare(cfg, allow_sample=False)


def test_a_run_of_the_sample_goes_on_without_a_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(download, "download_hub", lambda *_: pytest.fail("tried to download"))
    cfg = options(tmp_path, download=True)
    assert prepared.prepare(cfg, allow_sample=True, trained_on="sample").data == "sample"
    assert "MADE data" not in caplog.text
    write_sample(
        tmp_path / "raw", people=30
    )  # real files that came later are taken, and refused by check_same_run
    assert prepared.prepare(cfg, allow_sample=True, trained_on="sample").data == "published"


def test_a_download_that_was_changed_is_refused(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    write_sample(raw, people=30)
    sums = {path.name: download.hash_file(path) for path in raw.iterdir()}
    (raw / "SOURCE.json").write_text(json.dumps({"sha256": sums}))
    prepared.prepare(options(tmp_path), allow_sample=False)
    (raw / "survey.jsonl").write_bytes((raw / "survey.jsonl").read_bytes() + b"\n")
    with pytest.raises(UserError, match=r"survey.jsonl: sha256 is .*SOURCE.json"):
        prepared.prepare(options(tmp_path), allow_sample=False)


def test_prism_is_downloaded_where_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fetch(folder: Path, *what: object) -> None:
        asked.append(what)
        write_sample(folder, people=30)

    monkeypatch.setattr(download, "download_hub", fetch)
    cfg = options(tmp_path, download=True)
    assert prepared.prepare(cfg, allow_sample=True).data == "published"
    ((repository, commit, names, known),) = asked
    assert repository == "HannahRoseKirk/prism-alignment" and len(str(commit)) == 40
    assert names == ("survey.jsonl", "conversations.jsonl", "utterances.jsonl")
    assert set(known) < set(names) and all(len(sum_) == 64 for sum_ in known.values())
    cfg = options(tmp_path, download=True, path=str(tmp_path / "newer"), revision="main")
    prepared.prepare(cfg, allow_sample=True)
    assert asked[1][1:] == ("main", names, {})


def test_the_configuration_allows_the_sources_that_there_are() -> None:
    names = [source.name for source in prepared.SOURCES if not source.stands_in_for]
    declared = {field.name: field for field in config_rules.list_settings(DataConfig)}
    assert declared["source"].allowed[0].words == tuple(names)
    for source in prepared.SOURCES:
        assert source.stands_in_for in ("", *names)
        assert prepared.find_source(source.stands_in_for or source.name, source.kind) is source


def test_a_source_names_the_options_that_it_reads() -> None:
    """Prepared copies that differ in what a source reads have different keys."""
    folder = Path(inspect.getfile(prepared)).parent / "sources"
    texts = {path.stem: path.read_text() for path in folder.glob("*.py")}
    for source in prepared.SOURCES:
        own = texts["prism" if source.name == "sample" else source.name]  # which reads both
        used = [
            name
            for name in texts
            if re.search(rf"import .*\b{name}\b", own) or f"sources.{name} " in own
        ]
        whole = own + "".join(texts[name] for name in used if name != "download")
        read = {word for word in vars(DataConfig()) if re.search(rf"cfg\.{word}\b", whole)}
        assert set(source.options) == read - {"path", "download", "revision"}, source.name
        assert set(source.options) <= set(prepared.OPTIONS)


def test_a_new_data_set_is_one_file_and_its_place_in_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the new file would hold: one line of text per person."""

    def load(path: Path, cfg: DataConfig) -> Loaded:
        prompt = [{"role": "user", "content": "tea or coffee?"}]
        users = []
        for name in path.read_text().split():
            pair = Pair(name, prompt, f"tea for {name}", "coffee")
            split = choose_split(name, cfg.validation_fraction, cfg.test_fraction)
            users.append(User(name, f"I am {name}", "", (), (), (pair,), split=split))
        return Loaded(users, [])

    options_read = ("validation_fraction", "test_fraction")
    new = Source(
        "names", "published", Card("Names", "", "", "CC0"), options_read, lambda path: [path], load
    )
    monkeypatch.setattr(prepared, "SOURCES", (*prepared.SOURCES, new))
    (tmp_path / "names.txt").write_text(" ".join(f"n{i}" for i in range(40)))
    cfg = options(tmp_path, source="names", path=str(tmp_path / "names.txt"))
    dataset = prepared.prepare(cfg, allow_sample=False)
    assert (dataset.name, dataset.data, dataset.source.licence) == (
        "names",
        "published",
        "Names: CC0",
    )
    assert sum(len(users) for users in dataset.splits.values()) == 40
    assert dataset.splits["train"][0].profile.startswith("I am n")
    assert dataset.prepared.parent == tmp_path / "prepared" / "names"


@pytest.mark.parametrize(
    ("env", "refused"),
    [
        ({"JAX_PLATFORMS": "cpu"}, False),
        ({"JAX_PLATFORMS": "cuda"}, True),
        ({"JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": "host:1"}, True),
    ],
)
def test_made_data_are_refused_by_make_data_where_make_train_refuses_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env: dict[str, str], refused: bool
) -> None:
    import jax

    other = flags.FLAGS["users"] if "users" in flags.FLAGS else None
    prepare = command("prepare")
    monkeypatch.setattr(prepare, "_USERS", types.SimpleNamespace(value=1))
    if other is not None:  # of a command that was imported before
        flags.FLAGS["users"] = other
    for name in ("devices", "default_backend", "process_count"):  # no device is started for it
        monkeypatch.setattr(jax, name, lambda: pytest.fail("asked for devices"))
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert distributed.is_alone_on_cpu(os.environ) is not refused  # what popi_jax.run asks
    places = {"data__path": f"{tmp_path / 'none'}", "data__prepared": f"{tmp_path}"}
    config = make_config(**places, data__download=False, data__sample_people=60)
    if refused:
        with pytest.raises(UserError, match="no PRISM files"):
            prepare.main(config)
    else:
        prepare.main(config)


def test_fractions_are_met() -> None:
    splits = [choose_split(f"user{i}", 0.1, 0.3) for i in range(5000)]
    assert (
        abs(splits.count("test") / 5000 - 0.3) < 0.03
        and abs(splits.count("validation") / 5000 - 0.1) < 0.02
    )
    wider = [choose_split(f"user{i}", 0.4, 0.3) for i in range(5000)]
    assert [s == "test" for s in splits] == [s == "test" for s in wider]
    assert (choose_split("user0", 0.1, 0.2), choose_split("user1", 0.0, 0.04)) == (
        "validation",
        "test",
    )  # by `sha256sum`
    assert sorted(split_topics("abcd", 0.1, 0.0).values()) == [
        "train",
        "train",
        "train",
        "validation",
    ]


def test_reading_needs_neither_jax_nor_tensorflow(tmp_path: Path) -> None:
    write_sample(tmp_path / "raw", people=30)
    code = f"""
import sys
from popi_jax.config_data import DataConfig
from popi_jax.data import prepared
cfg = DataConfig(**{vars(options(tmp_path))!r})
assert "tensorflow_datasets" not in sys.modules, "imported too early"
assert len(prepared.prepare(cfg, allow_sample=False).splits["train"][0].pairs) == 4
assert not {{"jax", "tensorflow"}} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr


def test_command_prints_the_splits_and_a_user(tmp_path: Path) -> None:
    write_sample(tmp_path / "raw", people=60)
    flags = [
        f"--config.data.path={tmp_path}/raw",
        f"--config.data.prepared={tmp_path}/p",
        "--config.data.test_fraction=0.3",
    ]
    command = [
        sys.executable,
        "-m",
        "popi_jax.prepare",
        "--config=prism",
        "--config.data.validation_fraction=0.3",
        *flags,
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert (
        sum(int(line[1]) for line in lines if line and line[0] in ("train", "validation", "test"))
        == 60
    )
    assert "true persona" in done.stdout and "chosen: " in done.stdout


@pytest.mark.parametrize("damage", ["shorter", "no stats", "half stats", "no shard", "no info"])
def test_a_damaged_copy_is_told_and_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    cfg = own(tmp_path)
    first = prepared.prepare(cfg, allow_sample=False)
    users = list(first.splits["train"])
    (shard,) = first.prepared.glob("1.0.0/*train*")
    stats = first.prepared / prepared_files.STATS
    if damage == "shorter":
        shard.write_bytes(shard.read_bytes()[:-7])
    elif damage == "half stats":
        stats.write_text(stats.read_text()[:40])
    else:
        gone = {"no stats": stats, "no shard": shard, "no info": shard.parent / "dataset_info.json"}
        gone[damage].unlink()
    with caplog.at_level(logging.WARNING, logger="absl"):
        again = prepared.prepare(cfg, allow_sample=False)
    assert "the prepared copy is damaged" in caplog.text and "made again" in caplog.text
    assert again.prepared == first.prepared and list(again.splits["train"]) == users
    assert [p.name for p in first.prepared.parent.iterdir()] == [first.prepared.name]


def test_damage_inside_a_shard_is_told_when_it_is_read(tmp_path: Path) -> None:
    dataset = prepared.prepare(own(tmp_path), allow_sample=False)
    (shard,) = dataset.prepared.glob("1.0.0/*train*")
    content = bytearray(shard.read_bytes())
    for i in range(100, 1100):
        content[i] ^= 0xFF
    shard.write_bytes(content)
    fresh = pickle.loads(pickle.dumps(dataset.splits["train"]))  # opens the file anew
    with pytest.raises(UserError, match=r"prepared copy is damaged .* delete the folder"):
        list(fresh)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    cfg = own(tmp_path)
    (tmp_path / "prepared").mkdir(mode=0o500)
    with pytest.raises(UserError, match=r"data.prepared.*Permission denied.*another folder"):
        prepared.prepare(cfg, allow_sample=False)


def test_a_file_in_place_of_the_prepared_folder_is_told(tmp_path: Path) -> None:
    cfg = own(tmp_path)
    (tmp_path / "prepared").write_text("")
    with pytest.raises(UserError, match=r"data.prepared.*another folder"):
        prepared.prepare(cfg, allow_sample=False)


def test_large_files_are_summed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = own(tmp_path)
    first = prepared.prepare(cfg, allow_sample=False).prepared
    with monkeypatch.context() as patch:
        patch.setattr(download, "hash_file", lambda path: pytest.fail("read again"))
        assert prepared.prepare(cfg, allow_sample=False).prepared == first
    path = Path(cfg.path)
    path.write_text(path.read_text().replace("u39", "u99"))
    assert prepared.prepare(cfg, allow_sample=False).prepared != first


def test_a_form_that_the_source_does_not_have_is_told(tmp_path: Path) -> None:
    cfg = dataclasses.replace(own(tmp_path), split_by="topic")
    with pytest.raises(UserError, match=r'"data.split_by": found "topic", allowed for jsonl: user'):
        prepared.prepare(cfg, allow_sample=False)
    cfg = dataclasses.replace(own(tmp_path), form="choice")
    with pytest.raises(UserError, match=r'"data.form": found "choice", allowed for jsonl: none'):
        prepared.prepare(cfg, allow_sample=False)


def test_two_users_of_one_id_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = own(tmp_path)
    users = list(jsonl.load(Path(cfg.path), dataclasses.replace(cfg, split_by="user")).users)
    twice = jsonl.SOURCE._replace(load=lambda path, cfg: Loaded(iter([*users, users[3]]), []))
    monkeypatch.setattr(prepared, "SOURCES", (twice,))
    with pytest.raises(UserError, match='two users have the id "u3"'):
        prepared.prepare(cfg, allow_sample=False)
