"""At which values of its metrics a run says that something goes wrong, in plain words, and what to
try: one table, `RULES`. docs/diagnostics.md tells where the thresholds come from.

A rule looks at a mean over some updates, or where one token can make a value a hundredfold (k3 of
the KL, and gradients with it) at a median, so that one noisy update raises nothing. `watch.py`
keeps the values and says each warning once."""

import statistics
from collections.abc import Callable, Mapping
from typing import NamedTuple

KEPT = 110  # newest values of each metric


class Facts(NamedTuple):
    """Settings that the rules need, and those that their advice names, as they are now."""

    beta: float  # generator.beta; 1 where margins have none
    per_token: bool  # whether margins are averages over tokens
    kl_coef: float
    temperature: float
    learning_rate: float  # of the inference model
    generator_learning_rate: float
    length_penalty: float
    group_size: int
    pairs: int  # K
    users: int  # per update
    summary_len: int
    reward_generator: str


class History(NamedTuple):
    """What a run has measured."""

    facts: Facts
    recent: Mapping[str, tuple[float, ...]] = {}  # newest last, at most KEPT
    first: Mapping[str, float] = {}

    def mean(self, name: str, over: int) -> float | None:
        """Of the newest `over` values; None where there are fewer."""
        values = self.recent.get(name, ())[-over:]
        return sum(values) / over if len(values) == over else None

    def median(self, name: str, over: int) -> float | None:
        """As `mean`."""
        values = self.recent.get(name, ())[-over:]
        return statistics.median(values) if len(values) == over else None

    def gain(self, name: str) -> float | None:
        """The newest value less the first."""
        values = self.recent.get(name)
        return values[-1] - self.first[name] if values else None


Measure = Callable[["Rule", History], float | None]  # None: the rule does not apply


class Rule(NamedTuple):
    """A warning, and when it is raised."""

    name: str
    watched: str  # the metric: each new value of it is looked at
    above: bool  # whether it is raised above the threshold, or below
    threshold: float
    over: int  # so many values of the metric make the mean or median that is compared
    measure: Measure
    wrong: str  # what goes wrong: {value}, {threshold}, {over}, and the fields of Facts
    advice: str  # what to try: settings with their present values


class Warned(NamedTuple):
    """A line of warnings.jsonl."""

    step: int
    name: str
    watched: str
    value: float
    threshold: float
    text: str


def check(rule: Rule, history: History) -> float | None:
    """The value that is beyond the threshold; None where all is well or nothing is known."""
    value = rule.measure(rule, history)
    if value is None:
        return None
    beyond = value > rule.threshold if rule.above else value < rule.threshold
    return value if beyond else None


def tell(rule: Rule, step: int, value: float, facts: Facts) -> Warned:
    words = {**facts._asdict(), "value": value, "threshold": rule.threshold, "over": rule.over}
    text = f"{rule.wrong.format(**words)} Try: {rule.advice.format(**words)}."
    return Warned(step, rule.name, rule.watched, value, rule.threshold, text)


def average(rule: Rule, history: History) -> float | None:
    return history.mean(rule.watched, rule.over)


def median_without_kl_coef(rule: Rule, history: History) -> float | None:
    return None if history.facts.kl_coef else history.median(rule.watched, rule.over)


def median_with_kl_coef(rule: Rule, history: History) -> float | None:
    return history.median(rule.watched, rule.over) if history.facts.kl_coef else None


def average_of_one_pair(rule: Rule, history: History) -> float | None:
    return average(rule, history) if history.facts.pairs == 1 else None


def equal_groups_of_equal_summaries(rule: Rule, history: History) -> float | None:
    """Where summaries differ, equal rewards are the generator's doing."""
    distinct = history.mean("inference/distinct", rule.over)
    return average(rule, history) if distinct is not None and distinct < FEW_DISTINCT else None


def spread_of_different_summaries(rule: Rule, history: History) -> float | None:
    """Nats of log-probs, without beta; of margins per token there is no measure."""
    distinct = history.mean("inference/distinct", rule.over)
    if history.facts.per_token or distinct is None or distinct < FEW_DISTINCT:
        return None
    spread = average(rule, history)
    return None if spread is None else spread / history.facts.beta


def accuracy_beyond_held_out(rule: Rule, history: History) -> float | None:
    trained, held_out = history.mean("inference/accuracy", LONG), average(rule, history)
    return None if trained is None or held_out is None else trained - held_out


def share_by_first_judge(rule: Rule, history: History) -> float | None:
    """Of the gain of the summaries since the start; a gain that is too small has no parts."""
    own, by_first = history.gain("probe/bits_summary"), history.gain(rule.watched)
    if own is None or by_first is None or own < LEAST_GAIN * history.facts.beta:
        return None
    return by_first / own


def accuracy_beyond_no_summary(rule: Rule, history: History) -> float | None:
    without, told = history.mean("probe/acc_none", rule.over), average(rule, history)
    return None if without is None or told is None else told - without


def times_running_median(rule: Rule, history: History) -> float | None:
    values = history.recent.get(rule.watched, ())
    before, newest = values[: -rule.over], history.median(rule.watched, rule.over)
    if newest is None or len(before) < LONG:
        return None
    return newest / max(statistics.median(before), 1e-9)


def loss_since_first(rule: Rule, history: History) -> float | None:
    gain = history.gain(rule.watched)
    return None if gain is None else -gain


FEW_DISTINCT = 0.3  # of a group's summaries
LEAST_GAIN = 0.1  # bits per pair, times beta
SHORT, LONG = 10, 20  # updates

RULES = (
    Rule(
        "beta_too_large",
        "inference/saturated",
        above=True,
        threshold=0.25,
        over=SHORT,
        measure=average,
        wrong="beta is too large: {value:.0%} of the margins are beyond 8 nats (more than "
        "{threshold:.0%}), where the reward is flat and a few pairs decide all.",
        advice="a smaller generator.beta (now {beta:g}), a tenth of it first",
    ),
    Rule(
        "no_kl",
        "inference/kl",
        above=True,
        threshold=0.4,
        over=SHORT,
        measure=median_without_kl_coef,
        wrong="no KL holds the inference model: its summaries are {value:.1f} nats from those of "
        "its start (more than {threshold:g}), and nothing brings them back.",
        advice="inference.kl_coef=0.02 (now {kl_coef:g})",
    ),
    Rule(
        "kl_too_large",
        "inference/kl",
        above=True,
        threshold=15.0,
        over=LONG,
        measure=median_with_kl_coef,
        wrong="the inference model runs away: its summaries are {value:.1f} nats from those of "
        "its start (more than {threshold:g}), which ends in repeated and broken phrases.",
        advice="a larger inference.kl_coef (now {kl_coef:g}) or a smaller "
        "inference.learning_rate (now {learning_rate:g})",
    ),
    Rule(
        "leaky_reward",
        "probe/acc_sampled",
        above=True,
        threshold=0.1,
        over=1,
        measure=accuracy_beyond_held_out,
        wrong="the reward leaks: on training users the accuracy is {value:.2f} above that of "
        "held-out users (more than {threshold:g}), so the gain is of pairs that were seen.",
        advice="more training users, fewer updates of the generator, "
        "inference.reward_generator=frozen (now {reward_generator})",
    ),
    Rule(
        "leaky_judge",
        "probe/bits_start_judge",
        above=False,
        threshold=0.5,
        over=1,
        measure=share_by_first_judge,
        wrong="only the trained generator understands the summaries: by the generator of the start "
        "they gained {value:.0%} of what they gained by it (less than {threshold:.0%}).",
        advice="inference.reward_generator=frozen or ema (now {reward_generator}), or a smaller "
        "generator.learning_rate (now {generator_learning_rate:g})",
    ),
    Rule(
        "one_noisy_pair",
        "probe/reliability_1",
        above=False,
        threshold=0.3,
        over=1,
        measure=average_of_one_pair,
        wrong="one noisy pair rewards a summary: another pair would repeat {value:.0%} of what "
        "tells summaries apart (less than {threshold:.0%}).",
        advice="batch.pairs=4 or more (now {pairs}), or more batch.users (now {users})",
    ),
    Rule(
        "noisy_reward",
        "inference/reliability",
        above=False,
        threshold=0.2,
        over=LONG,
        measure=average,
        wrong="the reward is noise: another draw of {pairs} pairs would repeat {value:.0%} of what "
        "tells summaries apart (less than {threshold:.0%}).",
        advice="more batch.pairs (now {pairs}) or more batch.users (now {users})",
    ),
    Rule(
        "dead_entropy",
        "inference/zero_variance",
        above=True,
        threshold=0.5,
        over=SHORT,
        measure=equal_groups_of_equal_summaries,
        wrong="the inference model no longer explores: in {value:.0%} of the groups (more than "
        "{threshold:.0%}) all {group_size} summaries have one reward, and nearly all are equal, so "
        "they teach nothing.",
        advice="a higher inference.temperature (now {temperature:g}), inference.entropy_coef=0.01, "
        "or a smaller inference.learning_rate (now {learning_rate:g})",
    ),
    Rule(
        "one_summary_for_all",
        "inference/distinct_users",
        above=False,
        threshold=0.3,
        over=SHORT,
        measure=average,
        wrong="users get the same summary: of the first summaries of the {users} users of an "
        "update {value:.0%} differ (less than {threshold:.0%}), so they tell nothing of a user.",
        advice="a larger inference.kl_coef (now {kl_coef:g}), a smaller inference.learning_rate "
        "(now {learning_rate:g}) or inference.length_penalty (now {length_penalty:g})",
    ),
    Rule(
        "summaries_cut",
        "inference/finished",
        above=False,
        threshold=0.8,
        over=SHORT,
        measure=average,
        wrong="summaries are cut: {value:.0%} of them end by themselves (less than "
        "{threshold:.0%}), the others at {summary_len} tokens.",
        advice="a larger data.summary_len (now {summary_len}), a lower inference.temperature (now "
        "{temperature:g}), a larger inference.unfinished_penalty or inference.length_penalty (now "
        "{length_penalty:g}), or an "
        "instruction that asks for less (model.summary_instruction)",
    ),
    Rule(
        "summaries_do_not_help",
        "inference/accuracy",
        above=False,
        threshold=0.53,
        over=LONG,
        measure=average,
        wrong="summaries do not help: behind them the generator prefers the chosen reply in "
        "{value:.1%} of the pairs (less than {threshold:.0%}). It ignores them, or they say "
        "nothing of the user.",
        advice="as probe/acc_oracle tells which: where it is near one half, a longer warm-up or a "
        "larger generator.learning_rate (now {generator_learning_rate:g}) in updates of the "
        "generator; else more signals or another model.summary_instruction",
    ),
    Rule(
        "generator_ignores_summary",
        "inference/margin_spread",
        above=False,
        threshold=0.1,
        over=SHORT,
        measure=spread_of_different_summaries,
        wrong="the generator ignores the summary: different summaries of a user move what it "
        "prefers by {value:.3f} nats (less than {threshold:g}).",
        advice="a longer warm-up with less warmup.no_summary, updates of the generator before "
        'those of the inference model (schedule.phases that begin with "generator N"), or another '
        "model.answer_instruction",
    ),
    Rule(
        "generator_ignores_oracle",
        "probe/acc_oracle",
        above=False,
        threshold=0.05,
        over=1,
        measure=accuracy_beyond_no_summary,
        wrong="the generator ignores even the true summary: behind it the accuracy is {value:.3f} "
        "above that of none (less than {threshold:g}).",
        advice="a longer warm-up (warmup.steps) with less warmup.no_summary, or more updates of "
        "the generator",
    ),
    *(
        Rule(
            f"{role}_gradient",
            f"{role}/grad_norm",
            above=True,
            threshold=10.0,
            over=3,
            measure=times_running_median,
            wrong=f"gradients of the {of} are {{value:.0f}} times their running median (more than "
            "{threshold:g}).",
            advice=f"a smaller {role}.learning_rate (now {{{rate}:g}})",
        )
        for role, of, rate in (
            ("inference", "inference model", "learning_rate"),
            ("generator", "generator", "generator_learning_rate"),
        )
    ),
    Rule(
        "repeated_phrases",
        "probe/repeats",
        above=True,
        threshold=0.3,
        over=2,
        measure=average,
        wrong="summaries repeat themselves: {value:.2f} repeated phrases in each (more than "
        "{threshold:g}).",
        advice="a larger inference.repeat_penalty or inference.kl_coef (now {kl_coef:g})",
    ),
    Rule(
        "summaries_of_anybody",
        "probe/bits_other",
        above=True,
        threshold=0.02,
        over=2,
        measure=average,
        wrong="another user's summary helps as well: {value:.3f} bits per pair (more than "
        "{threshold:g}), so a part of the gain is not personal.",
        advice="inference.reward_generator=frozen (now {reward_generator}), or fewer updates of "
        "the generator",
    ),
    Rule(
        "stated_forgotten",
        "probe/recall_stated",
        above=True,
        threshold=0.25,
        over=1,
        measure=loss_since_first,
        wrong="summaries forget what users state: {value:.2f} less recall than at the start (more "
        "than {threshold:g}).",
        advice="a larger inference.kl_coef (now {kl_coef:g}) or a smaller "
        "inference.length_penalty (now {length_penalty:g})",
    ),
)
WATCHED = frozenset(rule.watched for rule in RULES) | {
    *("inference/distinct", "inference/accuracy", "probe/bits_summary", "probe/acc_none")
}
