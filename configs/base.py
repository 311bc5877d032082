"""Every field of the configuration, with its default, unit and meaning. No other file may create a
field.

Order of composition: this file, then MODELS[model], SCALES[scale], SCHEDULES[schedule], the
dataset's own lines, and last the flags `--config.a.b=value`. A layer may only overwrite fields of
this file: another name or type raises."""

import difflib
from typing import NamedTuple

from ml_collections import ConfigDict

from configs.models import MODELS
from configs.scales import ROLLOUT_RULES, RULES, SCALES, detect, row
from configs.schedules import SCHEDULES


def _lora() -> ConfigDict:
    c = ConfigDict()  # low-rank adapters instead of training all parameters; needs model.checkpoint
    c.rank = 0  # 0 = none: all parameters are trained
    c.alpha = 16.0  # the adapters' product is multiplied by alpha / rank
    c.targets = ("q", "k", "v", "o", "gate", "up", "down")  # kernels that have an adapter
    return c


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
    d.use_system_string = (
        False  # whether the signals hold the person's own system string, almost an oracle (prism)
    )
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
    m.attention = (
        "auto"  # what computes it: splash (TPU) | cudnn (GPU) | chunked | auto, by the devices
    )
    m.summary_instruction = (
        "summary ?"  # text after the signals that asks the inference model for a summary
    )
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

    c.generator = g = ConfigDict()  # objectives: docs/objectives.md
    g.objective = "dpo"  # dpo | robust | ipo | hinge | kto | slic | cpo | simpo | orpo | rrhf
    g.beta = 0.1  # of the preference objective, per nat
    g.label_smoothing = (
        0.0  # probability that a pair's labels are swapped (dpo: cDPO; robust, cpo, simpo)
    )
    g.length_normalised = (
        False  # log-probs per token (dpo, robust, hinge, kto, slic, cpo; always of the others)
    )
    g.gamma = 0.0  # margin that simpo asks for, nats
    g.sft_coef = 0.0  # weight of the chosen reply's likelihood per token (1 in orpo, cpo and rrhf as published)
    g.desirable_weight = 1.0  # of chosen replies (kto)
    g.undesirable_weight = 1.0  # of rejected replies (kto)
    g.reference = "prompt"  # what the reference model sees: prompt (x alone) | summary (x and z)
    g.ema_decay = 0.0  # of an average of the parameters, per update; 0 = none is kept
    g.lora = _lora()
    g.learning_rate = 1e-4
    g.lr_warmup_steps = 5

    c.inference = i = ConfigDict()
    i.group_size = 8  # summaries sampled per user (G)
    i.temperature = 1.0  # of sampling and of the log-probs that are trained
    i.reward = "log_sigmoid"  # of a pair's margin: log_sigmoid | accuracy | margin
    i.reward_generator = (
        "current"  # whose margins: current | ema (of generator.ema_decay) | frozen (the reference)
    )
    i.reward_baseline = (
        False  # less the reward of no summary on the same pairs (for advantages that compare users)
    )
    i.length_penalty = 0.002  # reward lost per token of the summary
    i.advantage_baseline = "group"  # group | leave_one_out (RLOO) | batch (REINFORCE)
    i.advantage_scale = (
        "batch"  # group | batch | batch_rewards | whiten | none: what divides the centred rewards
    )
    i.ratio = "token"  # probability ratio: token | sequence (GSPO) | sequence_token
    i.clip_low = 0.2  # the ratio is clipped to 1 - clip_low ...
    i.clip_high = 0.2  # ... and to 1 + clip_high
    i.clip_max = 0.0  # bound of the ratio where the advantage is negative; 0 = none
    i.normalise = (
        "samples"  # what token losses are divided by: samples | sequences | tokens | max_len
    )
    i.kl = "k3"  # estimator of the KL to the reference: k1 (in the reward) | k2 | k3 (in the loss)
    i.kl_corrected = False  # whether k3 is weighted by the ratio
    i.kl_coef = 0.02  # per nat of KL to the reference inference model
    i.entropy_coef = 0.0  # reward of the entropy, per nat and token
    i.high_entropy_share = (
        1.0  # only this share of tokens, those of highest entropy, has a policy gradient
    )
    i.skip_unfinished = False  # whether summaries cut at data.summary_len are left out of the loss
    i.updates_per_rollout = 1  # gradient steps on the same summaries
    i.ema_decay = 0.0  # of an average of the parameters, per update; 0 = none is kept
    i.lora = _lora()
    i.learning_rate = 5e-4
    i.lr_warmup_steps = 10

    c.optimizer = o = ConfigDict()  # for both roles
    o.name = "adamw"  # adamw | lion | muon (matrices of the layers; adamw for the rest) | adafactor
    o.schedule = "cosine"  # of the learning rate after its warm-up: cosine | linear | constant
    o.b1 = 0.9  # adafactor has none
    o.b2 = 0.98
    o.weight_decay = 0.0
    o.clip_norm = 1.0  # of the gradient, over all its parameters
    o.final_lr = 0.2  # learning rate at the end of the schedule, as a part of its peak

    c.batch = b = ConfigDict()
    b.users = 16  # users per update, over all devices
    b.pairs = 8  # preference pairs per user and update (K)
    # part of data.summary_len that sampled summaries fill at most, as a mean: decides about the
    # speed alone
    b.summary_fill = 0.5
    b.microbatches = 1  # parts that an update goes through one after the other, to save memory; the result is the same

    c.schedule = s = ConfigDict()
    # phases in order, of N updates each: "inference N", "generator N", "joint N" (both in each
    # update) or "alternate n:m N" (n updates of the inference model, then m of the generator)
    s.phases = ("inference 420", "alternate 3:1 80")
    s.log_every = 10  # updates
    s.save_every = 50  # updates
    s.keep = 2  # newest checkpoints kept

    c.mesh = h = ConfigDict()  # devices along each axis; one of them may be -1: all that are left
    h.data = 1  # across slices
    h.fsdp = -1
    h.tensor = 1
    h.sequence = 1  # splits the tokens of a row, for long signals
    h.rules = RULES  # which mesh axes split which logical axis of arrays
    h.rollout_rules = ROLLOUT_RULES  # the same while summaries are sampled
    h.topology = ""  # the TPU slice that it is for, like "v5p:4x4x4", what `make fit` compiles for; "" = this machine
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
            raise LookupError(
                f'unknown name "{name}", allowed are {", ".join(allowed)}.{_near(name, [*allowed])}'
            )
        if name in chosen:
            raise LookupError(f'"{name}" is given twice')
        if value and value not in allowed[name] and not (name == "scale" and row(value)):
            raise LookupError(
                f'{name} = "{value}": must be one of {", ".join(allowed[name])}.{_near(value, allowed[name])}'
                + (" Or name the topology of a TPU, e.g. v5p:4x4x4." if name == "scale" else "")
            )
        chosen[name] = value
    return Arg(**{name: value for name, value in chosen.items() if value})


def compose(arg: str) -> ConfigDict:
    """Returns base(), locked, overwritten by the rows of MODELS, SCALES and SCHEDULES that `arg`
    names."""
    chosen = parse_arg(arg)
    c = base().lock()
    c.update_from_flattened_dict(MODELS[chosen.model])
    c.update_from_flattened_dict(row(detect() if chosen.scale == "auto" else chosen.scale))
    c.update_from_flattened_dict(SCHEDULES[chosen.schedule])
    if c.model.checkpoint:
        c.warmup.steps = 0
    return c


def _near(word: str, allowed: list[str]) -> str:
    near = difflib.get_close_matches(word, allowed, n=1)
    return f' Did you mean "{near[0]}"?' if near else ""
