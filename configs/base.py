"""Every field of the configuration, with its default, unit and meaning. No other file may create a field.

Order of composition: this file, then MODELS[model], SCALES[scale], SCHEDULES[schedule], the dataset's own lines, and
last the flags `--config.a.b=value`. A layer may only overwrite fields of this file: another name or type raises.
"""

import difflib
from typing import NamedTuple

from ml_collections import ConfigDict

from configs.models import MODELS
from configs.scales import SCALES, detect
from configs.schedules import SCHEDULES


def base() -> ConfigDict:
    c = ConfigDict()
    c.name = ""  # name of the config file
    c.seed = 0  # of initial weights, data order and sampling
    c.workdir = ""  # where the run lives; "" = work/<name>

    c.data = d = ConfigDict()
    d.source = "prism"  # prism | prefeval | jsonl
    d.path = "data/prism"  # folder (or, for jsonl, file) of the published files
    d.prepared = "data/prepared"  # folder of the ArrayRecord copies, one per content and options
    d.download = True  # fetch missing files where the source publishes them
    d.on_bad_row = "error"  # error | skip (counted and listed)
    d.split_by = "user"  # user | topic (prefeval only)
    d.validation_fraction = 0.03  # of users
    d.test_fraction = 0.12  # of users
    d.num_shots = 6  # most past pairs shown in the signals of a user
    d.num_pairs = 8  # most held-out pairs kept of a user
    d.pair_mode = "best_vs_worst"  # best_vs_worst | best_vs_rest | all_pairs (prism)
    d.score_margin = 1  # least difference of scores that makes a pair (prism, points of 100)
    d.pair_layout = "grouped"  # of past pairs in the signals: paired | grouped (rejected replies last, learned sooner)
    d.turns = "first"  # first | all (prism)
    d.use_system_string = False  # whether the signals hold the person's own system string, almost an oracle (prism)
    d.sample_people = 4600  # people of the PRISM-format sample
    d.context_len = 1024  # most tokens of an inference context (the signals)
    d.turn_len = 128  # most tokens of a prompt with its headers
    d.answer_len = 128  # most tokens of a reply, end token included
    d.summary_len = 18  # most tokens of a summary, end token included
    d.workers = 0  # processes that prepare batches; 0 = threads of this one

    c.model = m = ConfigDict()
    m.checkpoint = ""  # Hugging Face folder of the base weights and tokenizer; "" = random weights
    m.vocab_size = 2048  # most tokens of the tokenizer that is trained when there is no checkpoint
    m.num_layers = 3
    m.embed_dim = 64
    m.num_heads = 4
    m.num_kv_heads = 4
    m.head_dim = 16
    m.mlp_dim = 176
    m.rope_theta = 10000.0
    m.norm_eps = 1e-6
    m.tied_embeddings = True
    m.dtype = "float32"  # of compute: float32 | bfloat16; parameters and losses are float32
    m.remat = "none"  # none | dots | full
    m.summary_instruction = "summary ?"  # text after the signals that asks the inference model for a summary
    m.answer_instruction = ""  # text before the summary in the generator's context

    c.warmup = w = ConfigDict()  # likelihood training of both roles from random weights
    w.steps = 300  # 0 = off; must be 0 with a checkpoint
    w.generator_users = 8  # users per step
    w.summary_users = 16  # users per step whose signals the inference model summarises
    w.readings = 5  # reading exercises on the signals of each of them
    w.reading_users = 24  # users per step of whom it reads a few past pairs, or the survey alone
    w.reading_survey = 0.5  # part of these readings that are of the survey
    w.reading_shots = 3  # most past pairs in such an exercise
    w.guess = 0.12  # probability that a summary names one side, at random, of a contrast that past pairs show
    w.no_summary = 0.1  # probability that the generator sees no summary
    w.drop = 0.25  # probability that the generator's summary lacks an item
    w.repeat = 0.25  # probability that the generator's summary says an item twice
    w.wrong = 0.05  # the generator's summary gets Binomial(8, wrong) random items
    w.learning_rate = 3e-3
    w.lr_warmup_steps = 20

    c.generator = g = ConfigDict()
    g.beta = 0.1  # of the preference objective, per nat
    g.learning_rate = 5e-5
    g.lr_warmup_steps = 5

    c.inference = i = ConfigDict()
    i.group_size = 8  # summaries sampled per user (G)
    i.temperature = 1.0  # of sampling and of the log-probs that are trained
    i.advantage_scale = "batch"  # group | batch | none: whose standard deviation divides the centred rewards
    i.clip_eps = 0.2  # of the probability ratio
    i.kl_coef = 0.02  # per nat of KL to the reference inference model
    i.length_penalty = 0.002  # reward lost per token of the summary
    i.learning_rate = 5e-4
    i.lr_warmup_steps = 10

    c.optimizer = o = ConfigDict()  # AdamW, for both roles
    o.b1 = 0.9
    o.b2 = 0.98
    o.weight_decay = 0.0
    o.clip_norm = 1.0
    o.final_lr = 0.2  # learning rate at the end of the schedule, as a part of its peak (cosine)

    c.batch = b = ConfigDict()
    b.users = 16  # users per update, over all devices
    b.pairs = 8  # preference pairs per user and update (K)

    c.schedule = s = ConfigDict()
    # phases in order, of N updates each: "inference N", "generator N", "joint N" (both in each update) or
    # "alternate n:m N" (n updates of the inference model, then m of the generator)
    s.phases = ("inference 420", "alternate 3:1 80")
    s.log_every = 10  # updates
    s.save_every = 50  # updates
    s.keep = 2  # newest checkpoints kept

    c.mesh = h = ConfigDict()  # devices along each axis; one of them may be -1: all that are left
    h.data = 1  # across slices
    h.fsdp = -1
    h.tensor = 1
    h.num_devices = 1  # devices simulated on a CPU; 0 = leave as they are

    c.evaluation = e = ConfigDict()
    e.batch_users = 32
    e.max_users = 0  # of the test split; 0 = all
    return c


class Arg(NamedTuple):
    """What follows the colon of `--config=configs/prism.py:model=tiny,scale=auto`."""

    model: str = "tiny"
    scale: str = "auto"  # auto: the row for this machine
    schedule: str = "default"


def parse_arg(arg: str) -> Arg:
    """Parses "model=small,schedule=short"; an empty value means the default.

    Raises:
        LookupError: one line, for an unknown or repeated name or an unknown value.
    """
    allowed = {"model": [*MODELS], "scale": ["auto", *SCALES], "schedule": [*SCHEDULES]}
    chosen: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in arg.split(","))):
        name, equals, value = part.partition("=")
        if not equals:
            raise LookupError(f'"{part}" is not name=value; write e.g. model={next(iter(MODELS))}')
        if name not in allowed:
            raise LookupError(f'unknown name "{name}", allowed are {", ".join(allowed)}.{_near(name, [*allowed])}')
        if name in chosen:
            raise LookupError(f'"{name}" is given twice')
        if value and value not in allowed[name]:
            raise LookupError(
                f'{name} = "{value}": must be one of {", ".join(allowed[name])}.{_near(value, allowed[name])}'
            )
        chosen[name] = value
    return Arg(**{name: value for name, value in chosen.items() if value})


def compose(arg: str) -> ConfigDict:
    """Returns base(), locked, overwritten by the rows of MODELS, SCALES and SCHEDULES that `arg` names."""
    chosen = parse_arg(arg)
    c = base().lock()
    c.update_from_flattened_dict(MODELS[chosen.model])
    c.update_from_flattened_dict(SCALES[detect() if chosen.scale == "auto" else chosen.scale])
    c.update_from_flattened_dict(SCHEDULES[chosen.schedule])
    if c.model.checkpoint:
        c.warmup.steps = 0
    return c


def _near(word: str, allowed: list[str]) -> str:
    near = difflib.get_close_matches(word, allowed, n=1)
    return f' Did you mean "{near[0]}"?' if near else ""
