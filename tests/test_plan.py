"""A plan says all that is wrong with it, at once, before anything starts; and what it accepts has an effect."""

from __future__ import annotations

import dataclasses
import json
import math
from functools import partial
from typing import Any

import problems
import pytest
from torch import nn

from pipeline import ChannelPlan, DNIPlan, OptimizerPlan, Plan, PlanError, check_plan, nearest
from pipeline.run.resolve import resolve


def _problems(plan: Plan) -> tuple[str, ...]:
    with pytest.raises(PlanError) as caught:
        check_plan(plan)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def _problem(plan: Plan) -> str:
    (problem,) = _problems(plan)
    return problem


# ---------------------------------------------------------------- unknown names


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        (Plan(mode="unloked"), "unknown mode 'unloked'; did you mean 'unlocked'? Valid: "),
        (Plan(targets="boostrap"), "unknown targets 'boostrap'; did you mean 'bootstrap'? Valid: "),
        (Plan(dni=DNIPlan(form="lossmodel")), "unknown DNI form 'lossmodel'; did you mean 'loss_model'? Valid: "),
        (Plan(optimizer=OptimizerPlan(rule="addam")), "unknown optimizer 'addam'; did you mean 'adam'? Valid: "),
        (Plan(balance="tyme"), "unknown balance 'tyme'; did you mean 'time'? Valid: "),  # type: ignore[arg-type]
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_unknown_name_is_answered_with_the_nearest_valid_one(plan: Plan, sentence: str) -> None:
    assert _problem(plan).startswith(sentence)


def test_a_name_like_no_other_gets_all_valid_ones() -> None:
    assert nearest("xyzzy", ("naive", "unlocked"), "mode") == "unknown mode 'xyzzy'; Valid: naive, unlocked."


def test_a_name_that_is_no_text_is_unknown_too() -> None:
    assert _problem(Plan(mode=3)).startswith("unknown mode '3'")  # type: ignore[arg-type]


# ---------------------------------------------------------------- ranges


@pytest.mark.parametrize("bad", [-1, 1.5, math.nan, math.inf, "2"])
@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("stages", 1),
        ("microbatches", 1),
        ("steps", 1),
        ("evaluate_every", 1),
        ("threads", 1),
        ("seed", 0),
        ("warmup_steps", 0),
        ("optimizer.warmup_steps", 0),
        ("dni.hidden", 1),
        ("dni.every", 1),
        ("channel.slots", 1),
        ("channel.gradient_slots", 1),
    ],
)
def test_counts_are_whole_numbers_and_not_too_small(name: str, least: int, bad: Any) -> None:
    assert f"{name} is {bad}: it must be a whole number, at least {least}." in _problems(_with(name, bad))
    assert f"{name} is {least - 1}: it must be a whole number, at least {least}." in _problems(_with(name, least - 1))
    check_plan(_with(name, least))


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf, "much"])
@pytest.mark.parametrize("name", ["hop_steps", "optimizer.momentum", "optimizer.weight_decay"])
def test_what_may_be_zero_may_not_be_less(name: str, bad: Any) -> None:
    assert f"{name} is {bad}: it must be a number, at least 0." in _problems(_with(name, bad))
    check_plan(_with(name, 0))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, "fast"])
@pytest.mark.parametrize("name", ["optimizer.lr", "dni.lr", "stall_after_s"])
def test_rates_and_limits_are_positive(name: str, bad: Any) -> None:
    assert _problem(_with(name, bad)) == f"{name} is {bad}: it must be a positive number."


@pytest.mark.parametrize("bad", [0.0, 1.01, -0.5, math.nan, "all"])
def test_the_share_of_rows_lies_in_0_to_1(bad: Any) -> None:
    sentence = f"dni.rows is {bad}: give the fraction of the rows to train on, in (0, 1]."
    assert _problem(_with("dni.rows", bad)) == sentence
    check_plan(_with("dni.rows", 1.0))


@pytest.mark.parametrize("bad", [0.99, -2.0, math.nan, math.inf, "2"])
def test_a_temperature_is_at_least_1(bad: Any) -> None:
    assert _problem(_with("dni.temperature", bad)) == f"dni.temperature is {bad}: give a number of at least 1."
    for good in (None, 1, 2.5):
        check_plan(_with("dni.temperature", good))


@pytest.mark.parametrize("bad", [-0.01, 1.01, math.nan, "half"])
def test_the_mix_lies_in_0_to_1(bad: Any) -> None:
    sentence = f"mix is {bad}: it weighs the true gradient and must lie in [0, 1]."
    assert _problem(Plan(targets="mixed", mix=bad)) == sentence
    for good in (0.0, 1.0):
        check_plan(Plan(targets="mixed", mix=good))


@pytest.mark.parametrize(
    ("name", "most"),
    [("stages", 10_000), ("threads", 1024), ("steps", 10**12), ("seed", 2**63 - 1), ("channel.slots", 2**16)],
)
def test_counts_are_not_beyond_what_a_machine_can_count(name: str, most: int) -> None:
    """--stages 9223372036854775808 was an OverflowError, --threads 99999999999999999999 was taken."""
    for value in (most + 1, 9223372036854775808, 10**30):
        assert f"{name} is {value}: it must be a whole number, at most {most:,}." in _problems(_with(name, value))
    assert f"{name} is a number of thousands of digits: it must be" in str(_problems(_with(name, 10**5000)))
    check_plan(_with(name, most))


@pytest.mark.parametrize("name", ["optimizer.lr", "dni.lr", "hop_steps", "stall_after_s", "optimizer.clip"])
def test_numbers_are_not_beyond_what_a_tensor_takes(name: str) -> None:
    """torch's own error in the middle of a run: value cannot be converted to type float without overflow."""
    for value in (1e300, 10**400):
        assert "it must be at most 1,000,000" in _problem(_with(name, value))


_ABSURD = [
    *(10**30, 2**63, 10**5000, -1, -(10**30), 0, True, 1e300, 1e-300, -1e300, math.nan, math.inf, -math.inf),
    *("x", "", "1", b"1", None, (), (0,), (1.5, 2), (10**30, 1), ("x",), [], {}, object(), 1j, "nan", "stage_ms=1e300"),
    *("latency_ms=1e-300", "bandwidth_mbps=1e-300", "loss=nan", "accuracy=1e400", "cuda:99999999999999999999"),
]


def _options() -> list[str]:
    """Every option of a plan; ``a.b`` is one of a part of it."""
    parts = {f.name: getattr(Plan(), f.name) for f in dataclasses.fields(Plan)}
    nested = {name: part for name, part in parts.items() if dataclasses.is_dataclass(part)}
    return [*parts, *(f"{name}.{f.name}" for name, part in nested.items() for f in dataclasses.fields(part))]


@pytest.mark.parametrize("mode", ["unlocked", "naive"])
@pytest.mark.parametrize("name", _options())
def test_an_absurd_value_is_refused_in_a_sentence_or_can_be_resolved(name: str, mode: str) -> None:
    """Whatever is given for whatever option: never an exception of Python's or of torch's."""
    for value in _ABSURD:
        plan = _with(name, value)
        plan = plan if name == "mode" else dataclasses.replace(plan, mode=mode)
        try:
            resolve(problems.two_linear_recipe(), plan)
        except PlanError as error:
            for problem in error.problems:
                assert "\n" not in problem.strip(), problem
                assert len(problem) < 400, problem


# ---------------------------------------------------------------- where to split


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        (Plan(stages=3, sizes=(1, 2)), "sizes has 2 numbers for 3 stages: give one number of layers per stage."),
        (Plan(sizes=(0, 3)), "sizes 0 3: every stage needs at least one layer."),
        (
            Plan(stages=3, cuts=("2",)),
            "1 cuts for 3 stages: give the first layer of each stage but the first.",
        ),
        (Plan(sizes=(1, 2), cuts=("2",)), "sizes and cuts both say where to split: give one of them."),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sizes_and_cuts_agree_with_the_number_of_stages(plan: Plan, sentence: str) -> None:
    assert _problem(plan) == sentence


# ---------------------------------------------------------------- nothing accepted is ignored


@pytest.mark.parametrize(
    "option",
    [{"targets": "mixed"}, {"mix": 0.3}, {"dni": DNIPlan(lr=1e-2)}, {"deterministic": True}],
    ids=lambda option: next(iter(option)),
)
def test_a_locked_mode_refuses_what_only_unlocking_uses(option: dict[str, Any]) -> None:
    (name,) = option
    sentence = f"{name} has no effect with mode naive: leave it out, or choose mode unlocked."
    assert _problem(Plan(mode="naive", **option)) == sentence
    check_plan(Plan(mode="unlocked", **{"targets": "mixed", **option}))


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        (
            Plan(mode="naive", microbatches=4),
            "microbatches has no effect with mode naive: leave it out, or choose mode gpipe or 1f1b.",
        ),
        (
            Plan(mode="async-1f1b", in_flight="full"),
            "in_flight has no effect but in mode async-1f1b with hop_steps: leave it out.",
        ),
        (
            Plan(targets="true", mix=0.25),
            "mix has no effect with targets true: leave it out, or choose targets mixed.",
        ),
        (
            Plan(optimizer=OptimizerPlan(rule="adam", momentum=0.9)),
            "optimizer.momentum has no effect with adam: leave it out, or choose sgd or nadamw.",
        ),
        (
            Plan(deterministic=True, channel=ChannelPlan(gradient_slots=3)),
            "deterministic runs may not drop targets: leave channel.gradient_slots out.",
        ),
        (
            Plan(dni=DNIPlan(form="linear", factory=nn.Identity)),
            "both a DNI factory and the form linear are given: leave one out.",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_that_contradict_each_other_are_refused(plan: Plan, sentence: str) -> None:
    assert _problem(plan) == sentence


def test_all_mistakes_come_at_once() -> None:
    plan = Plan(mode="unloked", stages=0, optimizer=OptimizerPlan(lr=-1.0), dni=DNIPlan(form="liner", rows=2.0))
    problems = _problems(plan)
    assert [problem.split(":")[0].split(";")[0] for problem in problems] == [
        "unknown mode 'unloked'",
        "unknown DNI form 'liner'",
        "stages is 0",
        "optimizer.lr is -1.0",
        "dni.rows is 2.0",
    ]


# ---------------------------------------------------------------- a value like any other


@pytest.mark.parametrize(
    "plan",
    [
        Plan(),
        Plan(mode="naive", stages=1, steps=3),
        Plan(targets="mixed", mix=0.9, dni=DNIPlan(form="loss_model", rows=0.5, every=3)),
        Plan(optimizer=OptimizerPlan(rule="sgd", momentum=0.9, weight_decay=1e-4), sizes=(1, 3)),
        Plan(stages=3, cuts=("blocks.1", "head"), dni=DNIPlan(factory=nn.Identity)),
    ],
    ids=["default", "locked", "mixed", "sgd", "cuts"],
)
def test_a_good_plan_is_returned_and_can_be_written_as_json(plan: Plan) -> None:
    assert check_plan(plan) is plan
    values = json.loads(json.dumps(plan.as_dict()))
    assert values["stages"] == plan.stages
    assert values["optimizer"]["rule"] == plan.optimizer.rule
    assert values.keys() == {field.name for field in dataclasses.fields(Plan)}


def test_a_factory_is_written_by_its_name() -> None:
    def my_dni(cut: object, width: int = 3) -> nn.Module:
        return nn.Identity()

    assert Plan(dni=DNIPlan(factory=my_dni)).as_dict()["dni"]["factory"].endswith("my_dni")
    assert "my_dni" in Plan(dni=DNIPlan(factory=partial(my_dni, width=4))).as_dict()["dni"]["factory"]


@pytest.mark.parametrize("kind", [Plan, OptimizerPlan, DNIPlan, ChannelPlan])
def test_plans_are_frozen_keyword_only_and_comparable(kind: Any) -> None:
    plan = kind()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(plan, dataclasses.fields(kind)[0].name, 3)
    with pytest.raises(TypeError):
        kind(3)
    assert plan == kind()
    assert hash(plan) == hash(kind())


@pytest.mark.parametrize(
    ("plan", "slots"),
    [
        (
            Plan(stages=4, targets="true"),
            [17, 12, 7],
        ),  # 5 batches in each of the stages above, and the END, and the one in hand
        (Plan(stages=4, targets="bootstrap"), [7, 7, 7]),
        (Plan(stages=3, targets="true", channel=ChannelPlan(slots=1)), [6, 5]),
        (Plan(stages=3, channel=ChannelPlan(gradient_slots=1)), [1, 1]),
    ],
    ids=["true", "bootstrap", "one slot", "given"],
)
def test_by_default_every_gradient_under_way_finds_a_slot(plan: Plan, slots: list[int]) -> None:
    assert [plan.gradient_slots_at(cut) for cut in range(plan.stages - 1)] == slots


def _with(name: str, value: Any) -> Plan:
    """The default plan with one option changed; ``a.b`` reaches into a part of it."""
    part, _, option = name.rpartition(".")
    if not part:
        return dataclasses.replace(Plan(), **{option: value})
    return dataclasses.replace(Plan(), **{part: dataclasses.replace(getattr(Plan(), part), **{option: value})})
