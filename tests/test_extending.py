"""Every block of docs/extending.md runs as it stands there; the channel among them keeps what channels promise."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from workers.channels.errors import ChannelBroken, ChannelClosed, ChannelTimeout

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
BLOCKS: list[str] = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
DEADLINE_S, SOON_S = 20.0, 0.02


def _run(code: str) -> dict[str, Any]:
    """The names that a block leaves; dataclasses look their module up."""
    module = sys.modules["extending"] = ModuleType("extending")
    try:
        exec(compile(code, "docs/extending.md", "exec"), vars(module))
    finally:
        del sys.modules["extending"]
    return vars(module)


@pytest.fixture(autouse=True)
def _modes_as_before() -> Iterator[None]:
    """A block adds a mode to the table."""
    from pipeline.schedule.modes import MODES

    before = dict(MODES)
    yield
    MODES.clear()
    MODES.update(before)


def test_the_page_has_its_blocks() -> None:
    assert len(BLOCKS) == 5


@pytest.mark.parametrize("index", range(5))
def test_a_block_runs(index: int) -> None:
    _run(BLOCKS[index])


def test_the_recipe_trains_with_its_options_and_the_plan_that_it_suggests(tmp_path: Path) -> None:
    from launch.setup.recipe_source import NamedRecipe, entry_of
    from pipeline import run_reference

    (code,) = (block for block in BLOCKS if block.startswith("# my_recipe.py"))
    path = tmp_path / "my_recipe.py"
    path.write_text(code)
    run = run_reference(NamedRecipe(str(path), (("hidden", 16),))(), entry_of(str(path)).plan)
    assert run.resolved.layer_parameters[0] == 17 * 16
    (_, scores) = run.scores[-1]
    assert (scores.accuracy() or 0.0) > 0.8


# ------------------------------------------------------------------ the channel


@pytest.fixture
def channel() -> dict[str, Any]:
    """The names of the block that makes a channel."""
    (code,) = (block for block in BLOCKS if "class DequeSender" in block)
    return _run(code)


def _message(channel: dict[str, Any], batch: int) -> Any:
    return channel["Message"](channel["Kind"].ACTIVATION, channel["Item"](batch), 0, (torch.full((4,), float(batch)),))


def test_messages_come_in_order_while_the_sender_waits_for_room(channel: dict[str, Any]) -> None:
    sender, receiver = channel["ends"](capacity=2)

    def send() -> None:
        for batch in range(20):
            sender.send(_message(channel, batch), DEADLINE_S)

    thread = threading.Thread(target=send)
    thread.start()
    for batch in range(20):
        came = receiver.take_within(DEADLINE_S)
        assert came.batch == batch
        assert torch.equal(came.payload[0], torch.full((4,), float(batch)))
    thread.join(DEADLINE_S)
    assert receiver.take() is None


def test_a_full_channel_has_no_room_and_a_send_gives_up(channel: dict[str, Any]) -> None:
    sender, receiver = channel["ends"](capacity=2)
    for batch in range(2):
        assert sender.room()
        sender.send(_message(channel, batch), DEADLINE_S)
    assert not sender.room()
    with pytest.raises(ChannelTimeout, match=r"waited .*2/2 slots full"):
        sender.send(_message(channel, 2), SOON_S)
    held = receiver.poll()
    assert not sender.room()  # what is read in place is in use
    assert held.batch == 0
    receiver.release()
    assert sender.room()


def test_a_wait_for_nothing_gives_up(channel: dict[str, Any]) -> None:
    _, receiver = channel["ends"]()
    with pytest.raises(ChannelTimeout, match="receiver waited"):
        receiver.receive(SOON_S)


def test_what_was_sent_before_a_close_still_comes(channel: dict[str, Any]) -> None:
    sender, receiver = channel["ends"]()
    sender.send(_message(channel, 0), DEADLINE_S)
    sender.close()
    assert receiver.take().batch == 0
    with pytest.raises(ChannelClosed):
        receiver.poll()


def test_a_sender_learns_that_the_receiver_has_closed(channel: dict[str, Any]) -> None:
    sender, receiver = channel["ends"]()
    receiver.close()
    assert sender.room()
    with pytest.raises(ChannelClosed, match="closed by the receiver"):
        sender.send(_message(channel, 0), DEADLINE_S)


def test_a_message_larger_than_a_slot_is_refused(channel: dict[str, Any]) -> None:
    sender, _ = channel["ends"](slot_bytes=64)
    with pytest.raises(ValueError, match="slot"):
        sender.send(_message(channel, 0), DEADLINE_S)


def test_a_message_of_another_generation_is_refused(channel: dict[str, Any]) -> None:
    sender, receiver = channel["ends"]()
    sender.generation = 1
    sender.send(_message(channel, 0), DEADLINE_S)
    with pytest.raises(ChannelBroken, match="generation 1"):
        receiver.poll()
