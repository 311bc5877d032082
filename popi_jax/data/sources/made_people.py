"""The PRISM-format sample: made people with known preferences, in the schema of the published
files.

Each person cares about a few of eight style attributes. A self-description states some of them,
partly wrong, among distractors; in each conversation two replies differ in one attribute that the
person cares about, and the scores follow the utilities by Bradley-Terry (Gumbel noise on each
reply). As the process is known, so is the best that any model could do: made_odds.py. The sample
shows that the whole machine learns; it says nothing about real people."""

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from popi_jax import files
from popi_jax.data.records import ITEM_SEPARATOR
from popi_jax.data.sources import download, made_odds, made_world, prism, prism_rows
from popi_jax.data.sources.made_world import (
    ATTRIBUTES,
    NUM_ACTIVE,
    STATED,
    STATED_RIGHT,
    STRAY,
    UTILITY,
    Person,
)
from popi_jax.data.sources.source import Card, Source

CONVERSATIONS = 14  # of each person
# the stated summary of a self-description that names no attribute
NOTHING_STATED = "no strong preference"

TOPICS = (
    "volcanoes bridges bees chess coffee comets dolphins deserts elections forests glaciers "
    "gravity honey islands jazz kites lasers lemons magnets maps mirrors moths mountains museums "
    "oceans olives opera owls paper pearls pianos planets poetry pottery rain rivers robots salt "
    "sharks silk sleep snow soap spices spiders steam storms sugar tea tides trains trees tunnels "
    "vaccines violins whales wheat wind wolves yoga"
).split()
PROMPTS = ("tell me about {}", "explain {} please", "why {} ?")
STATEMENTS = ("i like {} .", "please give me {} .", "i prefer {} .")
FACTS = (
    "i have two cats .|i work as a nurse .|i live near the sea .|i play the drums .|"
    "i cycle to work .|my kitchen is blue .|i grew up on a farm .|i drink green tea .|"
    "i have three sisters .|i read at night .|i walk my dog early .|i bake bread on sundays .|"
    "i study at home .|my car is old .|i swim in the lake .|i sing in a choir .|"
    "i paint small boats .|i travel by train ."
).split("|")
AGES = [f"{age} years old" for age in ("18-24", "25-34", "35-44", "45-54", "55-64", "65+")]
LOCATION = (
    "birth_country birth_countryISO birth_subregion reside_country reside_countryISO "
    "reside_subregion same_birth_reside_country special_region"
).split()
SILENT = "Prefer not to say"


def _draw_person(rng: np.random.Generator) -> Person:
    active = tuple(sorted(int(a) for a in rng.choice(len(ATTRIBUTES), NUM_ACTIVE, replace=False)))
    return Person(active, tuple(int(rng.integers(2)) for _ in active))


def _join_items(items: Iterable[tuple[int, int]]) -> str:
    return ITEM_SEPARATOR.join(ATTRIBUTES[a][p].item for a, p in sorted(items))


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _describe(rng: np.random.Generator, person: Person) -> tuple[str, list[tuple[int, int]]]:
    """Returns the text, and the (attribute, pole) that it states."""
    stated = []
    for a in range(len(ATTRIBUTES)):
        if a in person.active:
            if rng.random() < STATED:
                right = rng.random() < STATED_RIGHT
                pole = person.poles[person.active.index(a)]
                stated.append((a, pole if right else 1 - pole))
        elif rng.random() < 2 * STRAY:
            stated.append((a, int(rng.integers(2))))
    sentences = [_pick(rng, STATEMENTS).format(ATTRIBUTES[a][p].item) for a, p in stated]
    sentences += [str(f) for f in rng.choice(FACTS, 3, replace=False)]
    order = rng.permutation(len(sentences))
    return " ".join(sentences[i] for i in order), stated


def _make_survey_row(rng: np.random.Generator, user_id: str, description: str) -> dict[str, Any]:
    keys = (*prism_rows.PREFERENCES, "other")
    group = {"self_described": "", "categorised": SILENT, "simplified": SILENT}
    return {
        "user_id": user_id,
        "survey_only": False,
        "num_completed_conversations": CONVERSATIONS,
        "consent": "Yes, I consent to take part",
        "consent_age": "I certify that I am 18 years of age or over",
        "lm_familiarity": _pick(rng, ("Not familiar at all", "Somewhat familiar", "Very familiar")),
        "lm_direct_use": "Unsure",
        "lm_indirect_use": "Unsure",
        "lm_frequency_use": None,
        "lm_usecases": {"other_text": None},
        "order_lm_usecases": None,
        "stated_prefs": {k: int(rng.integers(0, 11)) * 10 for k in keys} | {"other_text": None},
        "order_stated_prefs": {k: i + 1 for i, k in enumerate(keys)},
        "self_description": description,
        "system_string": "you are a helpful assistant .",
        "age": _pick(rng, AGES),
        "gender": _pick(rng, ("Male", "Female")),
        "employment_status": _pick(rng, ("Working full-time", "Student", "Retired")),
        "education": SILENT,
        "marital_status": SILENT,
        "english_proficiency": "Native speaker",
        "religion": group,
        "ethnicity": group,
        "location": dict.fromkeys(LOCATION, SILENT),
        "study_id": "sample",
        "study_locale": "sample",
        "generated_datetime": "2023-11-22 00:00:00",
        "timing_duration_s": 600.0,
        "timing_duration_mins": 10.0,
        "included_in_UK_REP": False,
        "included_in_US_REP": False,
        "included_in_balanced_subset": True,
    }


class Chat(NamedTuple):
    """A conversation of one turn with two replies."""

    prompt: str
    replies: tuple[str, ...]
    scores: list[int]
    won: tuple[int, int]  # attribute and pole of the better reply


def _draw_chat(rng: np.random.Generator, person: Person, topic: str) -> Chat:
    slot = int(rng.integers(NUM_ACTIVE))
    attribute, preferred = person.active[slot], person.poles[slot]
    first = int(rng.integers(2))
    poles = (first, 1 - first)
    replies = tuple(_pick(rng, ATTRIBUTES[attribute][p].replies) for p in poles)
    noisy = [UTILITY * (p == preferred) + rng.gumbel() for p in poles]
    scores = [int(np.clip(round(45 + 8 * value), 2, 99)) for value in noisy]
    best = int(noisy[1] > noisy[0])
    if scores[best] <= scores[1 - best]:
        scores[best] = scores[1 - best] + 1
    prompt = _pick(rng, PROMPTS).format(topic)
    return Chat(prompt, replies, scores, (attribute, poles[best]))


def _make_chat_rows(
    chat: Chat, number: int, user_id: str, when: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (file name, row): the utterances of a conversation, then the conversation."""
    shared = {
        "conversation_id": f"c{number}",
        "user_id": user_id,
        "included_in_balanced_subset": True,
    }
    kind = {"conversation_type": "unguided"}
    history: list[dict[str, Any]] = [{"turn": 0, "role": "user", "content": chat.prompt}]
    for j, (reply, score) in enumerate(zip(chat.replies, chat.scores, strict=True)):
        model = {"model_name": f"sample-{j}", "model_provider": "sample"}
        verdict = {"score": score, "if_chosen": score == max(chat.scores), "within_turn_id": j}
        history.append({"turn": 0, "role": "model", "content": reply, **model, **verdict})
        ids = {"utterance_id": f"ut{2 * number + j}", "interaction_id": f"int{number}"}
        texts = {"user_prompt": chat.prompt, "model_response": reply}
        yield "utterances.jsonl", {**ids, **shared, "turn": 0, **kind, **texts, **model, **verdict}
    none = dict.fromkeys(p for p in prism_rows.PREFERENCES if p != "personalisation")
    yield (
        "conversations.jsonl",
        {
            **shared,
            "generated_datetime": when,
            "timing_duration_s": 60.0,
            "timing_duration_mins": 1.0,
            **kind,
            "opening_prompt": chat.prompt,
            "conversation_turns": 1,
            "conversation_history": history,
            "performance_attributes": none,
            "choice_attributes": none,
            "open_feedback": "",
        },
    )


def _make_rows(people: int, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (file name, row) of all files. Each person has a stream of random numbers of their
    own."""
    for number in range(people):
        rng = np.random.default_rng((seed, number))
        user_id = f"user{number}"
        person = _draw_person(rng)
        description, stated = _describe(rng, person)
        yield "survey.jsonl", _make_survey_row(rng, user_id, description)
        readings = {}
        for i, topic in enumerate(rng.choice(TOPICS, CONVERSATIONS, replace=False)):
            chat = _draw_chat(rng, person, str(topic))
            attribute, pole = chat.won
            conversation = CONVERSATIONS * number + i
            readings[f"c{conversation}"] = {
                "question": str(topic),
                "answer": _join_items([(attribute, pole)]),
                "contrast": _join_items([(attribute, 1 - pole)]),
            }
            when = f"2023-11-{22 + i // 7} {8 + i % 7:02d}:00:00"
            yield from _make_chat_rows(chat, conversation, user_id, when)
        yield (
            "latents.jsonl",
            {
                "user_id": user_id,
                "oracle": _join_items(zip(person.active, person.poles, strict=True)),
                "stated": _join_items(stated) or NOTHING_STATED,
                "readings": readings,
            },
        )


def write_sample(folder: Path, *, people: int, seed: int = 0) -> None:
    """Writes survey.jsonl, conversations.jsonl, utterances.jsonl as published, and latents.jsonl:
    the truth behind."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        opened = {
            name: stack.enter_context((folder / name).open("w", encoding="utf-8"))
            for name in (*prism_rows.FILES, prism_rows.LATENTS)
        }
        for name, row in _make_rows(people, seed):
            opened[name].write(json.dumps(row) + "\n")


def find_sample(cfg: Any, may_download: bool) -> Path:
    """Returns the folder of the made data beside the prepared copies; writes it unless the present
    code has made that number of people before."""
    del may_download
    world = made_world.__file__ or ""
    code = "".join(download.hash_file(Path(path))[:4] for path in (__file__, world))
    folder = Path(cfg.prepared) / f"prism-sample-{cfg.sample_people}-{code}"
    if not folder.exists():
        with files.make_folder(folder) as part:
            write_sample(part, people=cfg.sample_people)
    return folder


SOURCE = Source(
    name="sample",
    kind="sample",
    card=Card("Made people", "", "", "they are part of popi_jax and add no conditions."),
    options=prism.SOURCE.options,
    files=prism.list_files,
    load=prism.load,
    splits=prism.SOURCE.splits,
    find=find_sample,
    stands_in_for="prism",
    lists_items=True,
    contrasts=made_odds.CONTRASTS,
    find_odds=made_odds.find_odds,
    write_best_list=made_odds.write_best_list,
)
