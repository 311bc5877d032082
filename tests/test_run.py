"""From a configuration to the model: the shape comes from the base folder, which must hold the
whole tokenizer."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import pytest

from popi_jax import run
from popi_jax.config import from_config_dict
from popi_jax.data import measure, tokenizer
from popi_jax.data.encode import Truncations
from popi_jax.errors import UserError
from popi_jax.evals.sweep import make_split
from tests.data import chat_folders
from tests.tiny_run import CACHE, config_of, on_devices, shared_run


def test_never_drawn_are_control_tokens_and_the_padding_of_the_vocabulary() -> None:
    role = shared_run(1).run.inference
    words, never = role.tokenizer, set(role.sampling.banned)
    assert words.eos_id not in never and words.pad_id in never and len(never) > 2
    assert set(range(words.vocab_size, role.model.vocab_size)) <= never
    assert never.isdisjoint(words.encode("plain words ; <pad> and an end"))


def test_a_tokenizer_that_outgrows_the_embedding_is_refused(tmp_path: Path) -> None:
    from configs.base import compose

    shape = {"vocab_size": 300, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"intermediate_size": 16, "model_type": "llama", "rms_norm_eps": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    c = compose("model=pretrained,scale=laptop")
    c.name, c.model.checkpoint = "test", str(tmp_path)
    config = from_config_dict(c)
    assert run.make_model(config, 300).vocab_size == 300
    with pytest.raises(
        UserError, match=r"embed_tokens.weight has shape \[300, 8\], needs at least \[301, 8\]"
    ):
        run.make_model(config, 301)


def test_the_cache_of_compiled_programs_lies_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path)
    with on_devices(1):
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
        run.start_devices(config)
        assert jax.config.jax_compilation_cache_dir == str(CACHE / "compiled")
        jax.config.update(
            "jax_compilation_cache_dir", "gs://bucket/compiled"
        )  # as JAX reads it from the environment
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/compiled")
        run.start_devices(config)
        assert jax.config.jax_compilation_cache_dir == "gs://bucket/compiled"


def test_a_workdir_of_an_older_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = shared_run(1)
    monkeypatch.setattr(run, "LAYOUT", 3)
    with on_devices(1), pytest.raises(UserError, match="dataset.layout was 2, is 3"):
        run.open_run(config_of(tiny.workdir))


def test_what_was_measured_is_kept_whole_and_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = shared_run(1)
    path = tiny.workdir / "tokenizer" / "measured.json"
    assert measure.from_json(path.read_text()) == tiny.run.measured
    assert [p.name for p in path.parent.iterdir() if p.suffix == ".part"] == []
    monkeypatch.setattr(measure, "measure_fill", None)  # it is not called again
    with on_devices(1):
        assert run.open_run(config_of(tiny.workdir)).measured == tiny.run.measured


def test_what_was_measured_before_pairs_were_compared_is_read() -> None:
    measured = shared_run(1).run.measured
    found = json.loads(measure.to_json(measured))
    del found["truncations"]["equal"], found["truncations"]["emptied"]
    assert measure.from_json(json.dumps(found)) == measured


def test_what_is_shortened_and_left_out_is_told(caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(Path("nowhere"))
    none = Truncations(0, 0, 0, users=9, pairs=20)
    run._warn_about_cuts(config, none)
    assert not caplog.records
    run._warn_about_cuts(config, none._replace(contexts=3, emptied=2, equal=4))
    shortened, emptied, equal = (record.getMessage() for record in caplog.records)
    assert "of all 9 training users: 3 signals (data.context_len = " in shortened
    assert "Of 2 of the 9 training users" in emptied and "data.context_len" in emptied
    assert "4 of 20 pairs" in equal and f"data.answer_len = {config.data.answer_len}" in equal
    with pytest.raises(UserError, match="20 of 20 pairs .* data.answer_len"):
        run._warn_about_cuts(config, none._replace(equal=20))


def test_a_run_reads_the_selected_signals(tmp_path: Path) -> None:
    whole = shared_run(1).run.dataset.splits
    config = config_of(tmp_path, "--config.data.signals=survey+shots:1")
    with on_devices(1):
        found = run.open_run(config)
    assert len(found.dataset.splits["train"]) == len(whole["train"])
    for split, users in found.dataset.splits.items():
        user, known = users[0], whole[split][0]
        assert known.profile and not user.profile and not user.comments
        assert (user.survey, user.shots) == (known.survey, known.shots[-1:])
    lengths = [r.measured.lengths["context_len"] for r in (found, shared_run(1).run)]
    assert lengths[0] < lengths[1]
    people = make_split(found.dataset, "test", config.data, 0).users
    assert people == list(whole["test"])  # a sweep selects by itself


def test_rows_beyond_the_positions_of_the_base_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from configs.base import compose

    shape = {"vocab_size": 300, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"intermediate_size": 16, "model_type": "llama", "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    c = compose("model=pretrained,scale=laptop")
    c.name, c.model.checkpoint = "test", str(tmp_path)
    limits = {"context_len": 40, "turn_len": 16, "answer_len": 30, "summary_len": 8}
    c.data.update(limits)
    config = from_config_dict(c)
    assert run.find_too_long_rows(config) == ""
    data = dataclasses.replace(config.data, context_len=41)
    longer = dataclasses.replace(config, data=data)
    expected = r"65 tokens \(context_len 41 .* positions for 64 .*; lower data.context_len"
    assert re.search(expected, run.find_too_long_rows(longer))
    run.make_model(longer, 300)
    assert re.search(expected, caplog.text)
    # a run: its folder has no weights, as the lengths are compared before
    folder = chat_folders.make_folder("chatml", tmp_path / "base")
    (folder / "config.json").write_text(json.dumps(shape))
    tiny = config_of(tmp_path / "work")
    model = dataclasses.replace(tiny.model, checkpoint=str(folder))
    with on_devices(1), pytest.raises(UserError, match="of the inference model may have"):
        run.open_run(dataclasses.replace(tiny, model=model))


def test_a_control_token_beyond_the_rows_is_accepted_and_never_drawn(tmp_path: Path) -> None:
    """As the image token that the tokenizer of Gemma 3 has and its text models have not."""
    from configs.base import compose

    folder = chat_folders.make_folder("chatml", tmp_path)
    state = json.loads((folder / "tokenizer.json").read_text())
    rows = max(token["id"] for token in state["added_tokens"]) + 1
    image = {**state["added_tokens"][0], "id": rows, "content": "<image_soft_token>"}
    state["added_tokens"].append(image)
    (folder / "tokenizer.json").write_text(json.dumps(state))
    shape = {"vocab_size": rows, "hidden_size": 8, "num_hidden_layers": 1, "model_type": "llama"}
    shape |= {"num_attention_heads": 2, "intermediate_size": 16}
    (folder / "config.json").write_text(json.dumps(shape))
    words = tokenizer.load(folder)
    c = compose("model=pretrained,scale=laptop")
    c.name, c.model.checkpoint = "test", str(folder)
    model = run.make_model(from_config_dict(c), words.vocab_size)
    assert model.vocab_size == words.vocab_size == rows
    assert max(run.list_banned(words, model)) < rows
    assert max(words.encode("see <image_soft_token>")) < rows
