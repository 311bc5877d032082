"""Declaration, composition, validation and round trip of the configuration."""

import ast
import dataclasses
import pathlib
from typing import Any

import pytest
from ml_collections import ConfigDict

from configs import (
    alignx,
    base,
    elix,
    jsonl,
    personamem,
    prefeval,
    prism,
    psoups,
    review,
    roleplay,
    smoke,
    ufp4,
)
from configs.models import MODELS
from configs.scales import SCALES
from configs.schedules import SCHEDULES
from popi_jax import config, config_rules
from popi_jax.errors import UserError
from popi_jax.phases import Phase, parse_phases

GOLDEN = pathlib.Path(__file__).parent / "golden"
BASE = base.compose("scale=laptop")
DATASETS = {"prism": prism, "prefeval": prefeval, "jsonl": jsonl, "smoke": smoke}
DATASETS |= {"elix": elix, "personamem": personamem, "review": review, "roleplay": roleplay}
DATASETS |= {"alignx": alignx, "psoups": psoups, "ufp4": ufp4}
SETTINGS = config_rules.list_settings(config.Config)


def test_a_new_setting_is_one_declaration() -> None:
    @dataclasses.dataclass(frozen=True)
    class Larger(config.EvaluationConfig):
        seconds: int = config_rules.setting(
            5, "most time of a batch", config_rules.at_least(1), free=True
        )

    declared = config_rules.list_settings(Larger, "evaluation.")[-1]
    assert (declared.name, declared.default, declared.free) == ("evaluation.seconds", 5, True)
    values = ConfigDict(dataclasses.asdict(Larger())).to_dict()
    assert config_rules.read_section(Larger, values, "evaluation.") == Larger()
    with pytest.raises(UserError, match="config.evaluation.seconds = 0: must be at least 1"):
        config_rules.read_section(Larger, values | {"seconds": 0}, "evaluation.")


@pytest.mark.parametrize(
    "name", ["config_rules.py", "cli.py", "checkpoints/manager.py", "data/prepared.py"]
)
def test_what_depends_on_settings_has_no_table_of_them(name: str) -> None:
    source = (pathlib.Path(config.__file__).parent / name).read_text()
    names = {field.name for field in SETTINGS} | {field.name.split(".")[-1] for field in SETTINGS}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Tuple | ast.List | ast.Set | ast.Dict):
            texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
            words = {word for text in texts if type(text) is str for word in text.split()}
            listed = words & (names - {*config.MESH_AXES})
            assert len(listed) <= 4, f"line {node.lineno} lists {listed}"


def test_declared_defaults_are_a_configuration_and_tell_their_meaning() -> None:
    plain = config.Config(name="plain")
    found = config.from_config_dict(ConfigDict(dataclasses.asdict(plain)))
    assert found == dataclasses.replace(plain, workdir="work/plain")
    assert all(field.meaning and "\n" not in field.meaning for field in SETTINGS)


@pytest.mark.parametrize("name", DATASETS)
def test_resolved_defaults_equal_golden_file(name: str) -> None:
    found = config.to_json(config.from_config_dict(DATASETS[name].get_config("scale=laptop")))
    assert found == (GOLDEN / f"{name}.json").read_text(), (
        "a default changed: when that is intended, run `make golden` and commit the difference"
    )


ROWS = [f"model={m}" for m in MODELS] + [f"schedule={s}" for s in SCHEDULES]
ROWS += [f"scale={s}" + (",model=llama3-70b" if s == "v5p-1024" else "") for s in ("auto", *SCALES)]
ROWS += ["model=llama3-8b,scale=2xv5p:4x4x4", "scale=v6e:2x2"]


@pytest.mark.parametrize("name", DATASETS)
def test_every_row_is_valid_and_round_trips(name: str) -> None:
    for arg in (*ROWS, "model=pretrained,scale=v5p-64,schedule=short"):
        typed = config.from_config_dict(DATASETS[name].get_config(arg))
        assert config.from_json(config.to_json(typed)) == typed
        assert typed.workdir == f"work/{name}"


def test_rows_overwrite_in_order() -> None:
    c = base.compose("model=small,scale=v5e-8,schedule=short")
    assert (c.model.embed_dim, c.mesh.fsdp, c.mesh.tensor, c.warmup.steps) == (128, 2, 4, 60)
    assert base.compose("model=pretrained,schedule=short").warmup.steps == 0
    rates = [
        base.compose(f"model={model},schedule=raw_context").generator.learning_rate
        for model in ("tiny", "pretrained")
    ]
    assert rates == [5e-4, 1e-6]
    # what suits a summary of a few words would silence a released model
    both = [base.compose(f"model={m},schedule=thorough") for m in ("tiny", "pretrained")]
    assert [(c.inference.kl_coef, c.inference.length_penalty) for c in both] == [
        (0.02, 0.004),
        (0.02, 0.0005),
    ]
    assert [c.schedule.phases[0] for c in both] == ["inference 1500", "inference 500"]
    assert base.compose("").inference.kl_coef == 0.05


def test_auto_scale_is_laptop_without_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert base.compose("scale=auto").to_dict() == base.compose("scale=laptop").to_dict()


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        (
            "modle=tiny",
            'unknown name "modle", allowed are model, scale, schedule. Did you mean "model"?',
        ),
        (
            "model=smal",
            'model = "smal": must be one of tiny, small, pretrained, llama3-1b, llama3-3b,',
        ),
        ("tiny", '"tiny" is not name=value; write e.g. model=tiny'),
        ("model=tiny,model=small", '"model" is given twice'),
    ],
)
def test_bad_arg_is_named(arg: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        base.parse_arg(arg)
    assert str(error.value).startswith(message)


def test_empty_values_of_arg_mean_defaults() -> None:
    assert base.parse_arg("model=,scale=,schedule=short") == base.Arg("tiny", "auto", "short")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("inference.group_size", 1, "config.inference.group_size = 1: must be at least 2"),
        (
            "data.source",
            "prims",
            'config.data.source = "prims": must be one of prism, elix, review, roleplay, alignx, '
            "psoups, ufp4, prefeval, personamem, jsonl. "
            'Did you mean "prism"?',
        ),
        (
            "data.path",
            "gs://bucket/mine.jsonl",
            'config.data.path = "gs://bucket/mine.jsonl": must be on a disk of this machine',
        ),
        ("data.prepared", "gs://bucket/x", 'config.data.prepared = "gs://bucket/x": must be on a'),
        ("generator.beta", 0.0, "config.generator.beta = 0.0: must be above 0"),
        ("generator.beta", float("nan"), "config.generator.beta = NaN: must be a finite number"),
        ("seed", True, "config.seed = true: must be a whole number"),
        (
            "data.test_fraction",
            1.0,
            "config.data.test_fraction = 1.0: must be at least 0 and below 1",
        ),
        ("data.test_fraction", 0.98, "config.data.test_fraction = 0.98: leaves no training users"),
        ("warmup.guess", 1.5, "config.warmup.guess = 1.5: must be between 0 and 1"),
        (
            "model.checkpoint",
            "weights",
            f"config.warmup.steps = {BASE.warmup.steps}: must be 0 with model.checkpoint",
        ),
        (
            "batch.pairs",
            99,
            f"config.batch.pairs = 99: must be at most data.num_pairs = {BASE.data.num_pairs}",
        ),
        (
            "inference.advantage_scale",
            "std",
            'config.inference.advantage_scale = "std": must be one of group, batch, batch_rewards,',
        ),
        ("warmup.summary_users", 0, "config.warmup.summary_users = 0: must be at least 1"),
        ("warmup.reading_shots", 0, "config.warmup.reading_shots = 0: must be at least 1"),
        ("warmup.readings", -1, "config.warmup.readings = -1: must be at least 0"),
        ("warmup.drop", -0.1, "config.warmup.drop = -0.1: must be between 0 and 1"),
        ("warmup.wrong", 2.0, "config.warmup.wrong = 2.0: must be between 0 and 1"),
        (
            "data.summary_len",
            0,
            "config.data.summary_len = 0: must be at least 2 (the end token is counted)",
        ),
        (
            "data.split_by",
            "topics",
            "config.data.split_by = \"topics\": must be one of '', user, topic,",
        ),
        (
            "model.num_kv_heads",
            3,
            f"config.model.num_kv_heads = 3: must divide model.num_heads = {BASE.model.num_heads}",
        ),
        ("model.head_dim", 7, "config.model.head_dim = 7: must be even"),
        ("mesh.data", -1, "config.mesh.fsdp = -1: only one of"),
        ("mesh.data", 0, "config.mesh.data = 0: must be at least 1, or -1"),
        ("mesh.num_devices", 3, "config.batch.users = 16: must be a multiple of 3"),
        (
            "mesh.tensor",
            2,
            "config.mesh (data=1, fsdp=-1, tensor=2, sequence=1) does not fit 1 devices",
        ),
        (
            "generator.label_smoothing",
            0.5,
            "config.generator.label_smoothing = 0.5: must be at least 0",
        ),
        ("generator.objective", "orpo", "config.generator.sft_coef = 0.0: must be above 0 with"),
        (
            "generator.objective",
            "sigmoid",
            'config.generator.objective = "sigmoid": must be one of dpo, robust, ipo,',
        ),
        (
            "generator.lora.rank",
            8,
            "config.generator.lora.rank = 8: needs base weights (model.checkpoint)",
        ),
        (
            "inference.lora.targets",
            ("qkv",),
            'config.inference.lora.targets = ["qkv"]: must be some of q, k',
        ),
        (
            "inference.reward_generator",
            "ema",
            'config.inference.reward_generator = "ema": needs an average',
        ),
        (
            "inference.clip_max",
            1.1,
            "config.inference.clip_max = 1.1: must be 0 (no bound) or more",
        ),
        ("batch.microbatches", 3, "config.batch.microbatches = 3: must divide batch.users = 16"),
        ("name", "", 'config.name = "": must consist of'),
        (
            ("generator.over_beta", "generator.objective"),
            (True, "ipo"),
            "config.generator.over_beta = true: does not go with generator.objective = ipo; take",
        ),
        (
            ("generator.over_beta", "inference.reward"),
            (True, "margin"),
            'config.inference.reward = "margin": must be log_sigmoid with generator.over_beta',
        ),
        (
            ("schedule.phases", "generator.reads"),
            (("stored 3",), "nothing"),
            'config.schedule.phases = ["stored 3"]: holds more than "generator N", but with '
            'generator.reads = "nothing" there are no summaries; take generator phases alone',
        ),
        (
            "schedule.phases",
            ("inference",),
            'config.schedule.phases[0] = "inference": must be like "inference 240"',
        ),
        (
            "schedule.phases",
            ("storing 3",),
            'config.schedule.phases[0] = "storing 3": must begin with one of inference, generator, '
            'joint, alternate, supervised, stored. Did you mean "stored"?',
        ),
        ("schedule.phases", (3,), "config.schedule.phases = [3]: must be a tuple of strings"),
        (
            "generator.reads",
            "signal",
            'config.generator.reads = "signal": must be one of summary, signals, persona, nothing.',
        ),
        (
            "generator.reads",
            "signals",
            'config.schedule.phases = ["inference 140", "alternate 3:1 40"]: holds more than '
            '"generator N", but with generator.reads = "signals" there are no summaries; take',
        ),
    ],
)
def test_bad_value_is_one_line_that_names_the_field(
    field: str | tuple[str, ...], value: Any, message: str
) -> None:
    """`field` may be several with a value each."""
    c = prism.get_config("scale=laptop")
    several = zip(field, value, strict=True) if isinstance(field, tuple) else [(field, value)]
    c.update_from_flattened_dict(dict(several))
    with pytest.raises(UserError) as error:
        config.from_config_dict(c)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_unknown_and_missing_fields_are_named() -> None:
    c = prism.get_config("scale=laptop").unlock()
    c.data.sumary_len = 3
    with pytest.raises(
        UserError,
        match=r'config.data.sumary_len: there is no such field. Did you mean "summary_len"\?',
    ):
        config.from_config_dict(c)
    c = prism.get_config("scale=laptop").unlock()
    del c.data["turns"]
    with pytest.raises(UserError, match="config.data.turns is missing"):
        config.from_config_dict(c)


def test_nothing_to_train_is_an_error() -> None:
    c = prism.get_config("scale=laptop")
    c.schedule.phases = ()
    assert config.from_config_dict(c).schedule.phases == ()
    c.warmup.steps = 0
    with pytest.raises(UserError, match="nothing to train"):
        config.from_config_dict(c)


def test_parse_phases() -> None:
    phases = parse_phases(
        (
            "inference 240",
            " alternate  2:1 60",
            "joint 3",
            "generator 1",
            "supervised 2",
            "stored 4",
        )
    )
    assert phases == (
        Phase("inference", 1, 0, 240),
        Phase("alternate", 2, 1, 60),
        Phase("joint", 1, 1, 3),
        Phase("generator", 0, 1, 1),
        Phase("supervised", 1, 0, 2),
        Phase("stored", 0, 1, 4),
    )


@pytest.mark.parametrize(
    "phase",
    ["inferense 3", "inference 0", "alternate 3", "alternate 0:1 3", "joint -1", "", "joint 1.5"],
)
def test_bad_phase_is_an_error(phase: str) -> None:
    with pytest.raises(UserError, match=r"config.schedule.phases\[0\]"):
        parse_phases((phase,))


def test_resolve_mesh() -> None:
    mesh = dataclasses.replace(
        config.from_config_dict(prism.get_config()).mesh, data=2, fsdp=-1, tensor=2
    )
    assert config_rules.resolve_mesh(mesh, 8) == (2, 2, 2, 1)
    with pytest.raises(UserError, match="does not fit 6 devices"):
        config_rules.resolve_mesh(mesh, 6)


def test_saved_text_that_is_no_configuration_is_an_error() -> None:
    for text in ("{", "[]", "{}"):
        with pytest.raises(UserError):
            config.from_json(text)


def fails(section: str, **settings: object) -> bool:
    c = prism.get_config("scale=laptop")
    c.update_from_flattened_dict({f"{section}.{name}": x for name, x in settings.items()})
    try:
        config.from_config_dict(c)
    except UserError:
        return True
    return False


def test_words_are_those_of_the_losses() -> None:
    from popi_jax.losses import grpo, preference, reward
    from popi_jax.models import fused_attention, lora

    assert preference.OVER_BETA == tuple(
        name
        for name in preference.WITH_REFERENCE + preference.REFERENCE_FREE
        if not fails("generator", objective=name, sft_coef=1.0, over_beta=True)
    )
    words = {
        "model.attention": fused_attention.IMPLEMENTATIONS,
        "generator.objective": preference.WITH_REFERENCE + preference.REFERENCE_FREE,
        "inference.reward": reward.KINDS,
        "inference.advantage_baseline": grpo.BASELINES,
        "inference.advantage_scale": grpo.SCALES,
        "inference.ratio": grpo.RATIOS,
        "inference.normalise": grpo.NORMALISATIONS,
        "inference.kl": grpo.ESTIMATORS,
    }
    declared = {field.name: field.allowed for field in config_rules.list_settings(config.Config)}
    found = {name: {*allowed.words} for name in words for allowed in declared[name]}
    assert found == {name: {*known} for name, known in words.items()}
    assert config.LORA_TARGETS == lora.TARGETS
