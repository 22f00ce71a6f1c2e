"""Text of others that is not fit to be sent, written and shown: another stage was blamed, and 60 MB lay on the disk."""

from __future__ import annotations

import json
import os
from functools import partial
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import problems
import pytest
import torch.nn.functional as F
from torch import nn

from launch import RunFailed, train
from launch.ranks.agreement import profile
from launch.results import run_folder
from launch.setup.recipe_source import GivenRecipe
from launch.setup.resolve_source import resolve_source
from launch.show.console import Console
from launch.training import run
from pipeline import Plan, PlanError, Recipe
from pipeline.run.resolve import resolve
from pipeline.user_code import place_of
from pipeline.wording import escaped, said, shortened, text_of, traceback_of
from workers.supervision import control_records as control
from workers.supervision.control_socket import ControlSocket
from workers.telemetry import records
from workers.worker.failure_report import failure_of

LATIN_1 = os.fsdecode(b"caf\xe9")
AWKWARD = {
    "surrogate": r"FileNotFoundError: caf\udce9.png",
    "long": " ... 20.0 MB left out ... ",
    "speechless": "Speechless: (its text cannot be had: __str__ raises ValueError)",
    "chain": "RuntimeError: link 999",
}


# ---------------------------------------------------------------- words


def test_a_long_text_keeps_head_and_tail() -> None:
    assert shortened("a short one", 11) == "a short one"
    assert shortened("a" * 20 + "b" * 10, 12) == "aaaaaaaa ... 18 characters left out ... bbbb"
    text = shortened("begin " + 19_900_000 * "x" + " end", 2_000)
    assert text.startswith("begin x")
    assert text.endswith("x end")
    assert " ... 19.9 MB left out ... " in text
    assert len(text) < 2_100


def test_what_no_encoding_has_is_escaped_wherever_it_is() -> None:
    content = {LATIN_1: ["\U0001f600 \u00e9", (LATIN_1, 1.5, None)]}
    assert escaped(content) == {r"caf\udce9": ["\U0001f600 \u00e9", [r"caf\udce9", 1.5, None]]}


@pytest.mark.parametrize("what", AWKWARD)
def test_any_exception_can_be_told_in_a_line_and_in_a_page(what: str) -> None:
    error = problems.awkward_errors()[what]
    assert AWKWARD[what] in said(error)
    for text, most in ((said(error), 2_200), (text_of(error), 2_100), (traceback_of(error), 61_000)):
        assert len(text.encode()) < most
    assert type(error).__name__ in traceback_of(error)


def test_causes_that_go_in_circles_are_followed_once() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    assert place_of(first) == ""


# ---------------------------------------------------------------- records


@pytest.mark.parametrize("what", AWKWARD)
def test_what_ended_a_worker_fits_into_a_record(what: str) -> None:
    """Encoding it failed in the worker, which ended without a word; the next stage's word was taken for the cause."""
    try:
        raise problems.awkward_errors()[what]
    except Exception as error:
        assignment = SimpleNamespace(index=1, replica=0, plan=Plan(stages=2))
        failure = failure_of(assignment, error)  # type: ignore[arg-type]
    sent = records.encoded(failure)
    assert AWKWARD[what] in failure.message
    assert len(sent) < 100_000


@pytest.mark.parametrize(
    "record",
    [
        records.Failure(0, 7, LATIN_1, LATIN_1, 5, layer=LATIN_1, shown=LATIN_1),
        control.Hello(0, 7, LATIN_1, "m", "p", [LATIN_1]),
        control.Task([1], [LATIN_1], "p", True, ("host", 5), {LATIN_1: LATIN_1}),
        control.Prepared([LATIN_1]),
    ],
)
def test_no_text_keeps_a_record_from_being_sent(record: control.Control) -> None:
    here, there = (ControlSocket(end) for end in Pipe())
    here.send(record)
    received = there.receive()
    assert type(received) is type(record)
    assert r"caf\udce9" in str(received).replace("\\\\", "\\")
    here.close()
    there.close()


def test_ranks_agree_on_what_cannot_be_sent_as_it_is() -> None:
    resolved = resolve(problems.recipe(), Plan(stages=1, mode="naive", steps=4))
    texts = profile(resolved)
    assert texts == escaped(texts)


# ---------------------------------------------------------------- names


def test_a_layer_whose_name_no_file_can_hold_is_refused() -> None:
    """Such a run trained to its end, and could not save its weights."""

    def model() -> nn.Module:
        chain = nn.Sequential(nn.Linear(problems.WIDTH, problems.CLASSES))
        chain.add_module(LATIN_1, nn.ReLU())
        return chain

    recipe = Recipe(name="odd", model=model, batches=problems.batch, loss=F.cross_entropy)
    with pytest.raises(PlanError, match=r"is called 'caf\\udce9', which no file can hold: rename it"):
        resolve(recipe, Plan(stages=1, mode="naive", steps=2))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (LATIN_1, r"name is 'caf\udce9': no weights can be saved under a path that is no valid UTF-8"),
        ("x" * 241, "name has 241 bytes: it names a folder, so give at most 240."),
    ],
)
def test_a_name_that_no_folder_can_have_is_refused(name: str, problem: str) -> None:
    assert problem in next(run_folder.name_problems(name))
    assert not list(run_folder.name_problems("x" * 240))
    assert len(run_folder.default_name("x" * 1000, "unlocked")) < 100


# ---------------------------------------------------------------- runs


@pytest.mark.processes
@pytest.mark.parametrize("what", AWKWARD)
def test_the_stage_that_failed_is_named_whatever_its_error_says(what: str, tmp_path: Path) -> None:
    """It was "stage 0: activations 0->1: closed by the receiver"."""
    plan = Plan(mode="naive", stages=2, sizes=(1, 2), steps=1000)
    with pytest.raises(RunFailed) as caught:
        train(
            model=partial(problems.awkward, what),
            batches=problems.batch,
            loss=F.cross_entropy,
            plan=plan,
            runs=tmp_path,
            quiet=True,
        )
    failure = caught.value
    assert (failure.stage, failure.layer, failure.batch) == (1, "2", 4)
    assert AWKWARD[what] in str(failure)
    assert "(pid " in str(failure)
    written = next(tmp_path.glob("*/failure.txt")).read_bytes().decode()
    assert AWKWARD[what] in written
    assert len(written) < 80_000


@pytest.mark.processes
@pytest.mark.parametrize("what", ["surrogate", "long"])
def test_batches_that_raise_something_awkward_are_named_too(what: str, tmp_path: Path) -> None:
    batches = partial(problems.batches_that_raise, what)
    with pytest.raises(RunFailed, match=r"stage 0: batches\(5\) raises ") as caught:
        train(
            model=problems.two_linear,
            batches=batches,
            loss=F.cross_entropy,
            plan=Plan(stages=1, mode="naive", steps=20),
            runs=tmp_path,
            quiet=True,
        )
    assert AWKWARD[what] in str(caught.value)
    assert "mend it there" in str(caught.value)
    assert len(caught.value.shown) < 10_000


def test_a_folder_whose_path_is_no_text_is_refused(tmp_path: Path) -> None:
    """The first screen could not be printed; else the run would have trained, and not saved its weights."""
    with pytest.raises(PlanError, match=r"caf.+: no weights can be saved under .+; choose another folder with --runs"):
        run_folder.new_run_dir(tmp_path / LATIN_1, "r")
    assert not list(tmp_path.iterdir())


@pytest.mark.processes
def test_what_was_typed_and_what_a_recipe_is_called_need_not_be_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Recipe(name=LATIN_1, model=problems.two_linear, batches=problems.batch, loss=F.cross_entropy)
    plan = Plan(stages=1, mode="naive", steps=4)
    source = GivenRecipe(recipe)
    result = run(source, resolve_source(source, plan), tmp_path, None, Console(), ["freewheel", "train", LATIN_1])
    assert result.run_dir.name.endswith("-caf--naive")
    assert r"caf\udce9: naive, 1 stage" in capsys.readouterr().out
    written = json.loads((result.run_dir / "plan.json").read_bytes())
    assert (written["recipe"], written["command"][-1]) == (r"caf\udce9", r"caf\udce9")
