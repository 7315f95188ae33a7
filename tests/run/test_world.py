"""What passes between the processes of a run: sums, maxima, objects, failures."""

from __future__ import annotations

import multiprocessing
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fastppo.config import config_from_dict
from fastppo.errors import TrainingStopped, UserError
from fastppo.run import world as worlds
from fastppo.run.launch import Launched, launched
from fastppo.run.world import ALONE, World, check_gpus
from tests.limits import HANGS
from tests.project import PPO
from tests.world import as_process, free_port, variables

# Forked from this process: nothing here runs a backward pass, whose threads a fork would lose.
context = multiprocessing.get_context("fork")
SIZE = 3


def child(rank: int, port: int, place: Path) -> None:
    from datetime import timedelta

    import torch.distributed as dist

    as_process(rank, SIZE, port)
    worlds.SIGNAL_SECONDS = 0.1
    dist.init_process_group("gloo", timeout=timedelta(seconds=HANGS))
    torch.save(exchanged(World(rank, SIZE, HANGS)), place / f"{rank}.pt")


def caught(function: Any, *args: Any) -> tuple[str, str, bool] | None:
    """Kind and text of what a call raises, and whether another process tells it."""
    try:
        function(*args)
    except (UserError, TrainingStopped) as error:
        return type(error).__name__, str(error), error.told
    return None


def fail_in(world: World, rank: int) -> None:
    with world.together():
        if world.rank == rank:
            raise UserError(f"{rank}: this is wrong")


def full_disk() -> None:
    raise TrainingStopped("no room")


def exchanged(world: World) -> dict[str, Any]:
    """All exchanges there are, one after another; process 2 then ends without a word."""
    rank = world.rank
    mine, others, nobodys = (torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(3))
    mine.grad = torch.full((2, 2), float(rank))
    if rank == 1:
        others.grad = torch.ones(2, 2)
    world.sum_gradients([mine, others, nobodys])
    found = {
        "sum": world.sum(torch.tensor([1.0, rank], dtype=torch.float64)),
        "max": world.max(torch.tensor([1.0, rank])),
        "gather": world.gather({"rank": rank}),
        "gradients": [mine.grad, others.grad, nobodys.grad],
        "on main": world.on_main(lambda: f"process {rank}"),
        "agree": caught(world.agree, {"seed": "1", "data": "x"}, "mend it"),
        "differ": caught(world.agree, {"seed": "1", "data": "y" if rank == 2 else "x"}, "mend it"),
        "together": caught(fail_in, world, 1),
        "main fails": caught(world.on_main, full_disk),
        "parts": world.part(7),
    }
    if rank == 2:
        return found
    began = time.monotonic()
    found["lost"] = caught(world.gather, rank)
    return {**found, "seconds": time.monotonic() - began}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    place, port = tmp_path_factory.mktemp("exchanged"), free_port()
    processes = [context.Process(target=child, args=(rank, port, place)) for rank in range(SIZE)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(HANGS)
        assert process.exitcode == 0
    return [torch.load(place / f"{rank}.pt", weights_only=False) for rank in range(SIZE)]


def test_every_process_has_the_sum_and_the_maximum(found):
    for each in found:
        assert each["sum"].tolist() == [3.0, 3.0]
        assert each["max"].tolist() == [1.0, 2.0]
        assert each["gather"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert each["on main"] == "process 0"


def test_gradients_are_summed_and_what_nobody_has_stays_without_one(found):
    """With a gradient of 0 AdamW would decay the weight, and its moments."""
    for each in found:
        mine, others, nobodys = each["gradients"]
        assert torch.equal(mine, torch.full((2, 2), 3.0))
        assert torch.equal(others, torch.ones(2, 2))
        assert nobodys is None


def test_large_gradients_are_added_up_by_themselves():
    tensors = [torch.zeros(n) for n in (1, 2, 30, 1, 4, 5)]  # of 4 bytes
    sizes = [[x.numel() for x in group] for group in worlds.groups(tensors, 40)]
    assert sizes == [[1, 2], [30], [1, 4, 5]]
    assert list(worlds.groups([], 40)) == []


def test_parts_are_neighbours_and_hold_everything_once(found):
    parts = [each["parts"] for each in found]
    assert [row for part in parts for row in part] == list(range(7))
    assert {len(part) for part in parts} == {2, 3}


def test_processes_that_differ_are_named_in_every_process(found):
    line = "process 2 of 3 has another data than process 0; mend it"
    for each in found:
        assert each["agree"] is None
        assert each["differ"] == ("UserError", line, False)


def test_a_failure_in_one_process_is_everybodys_and_told_once(found):
    told = [each["together"] for each in found]
    assert {each[:2] for each in told} == {("UserError", "1: this is wrong")}
    assert [each[2] for each in told] == [True, False, True]
    assert [each["main fails"] for each in found] == [
        ("TrainingStopped", "no room", rank > 0) for rank in range(SIZE)
    ]


def test_a_lost_process_is_one_line_and_soon(found):
    for each in found[:2]:
        kind, line, _ = each["lost"]
        assert kind == "TrainingStopped"
        assert "has lost another" in line
        assert "ddp_timeout" in line
        assert each["seconds"] < HANGS / 2, "not after the timeout"


def test_alone_everything_is_given_back_and_torch_distributed_is_not_asked():
    x, parameter = torch.ones(2), torch.nn.Parameter(torch.ones(1))
    assert ALONE.sum(x) is x
    assert ALONE.max(x) is x
    assert ALONE.gather(3) == [3]
    assert ALONE.part(5) == range(5)
    assert ALONE.on_main(max, 1, 2) == 2
    ALONE.sum_gradients([parameter])
    assert parameter.grad is None
    with pytest.raises(UserError, match="wrong"), ALONE.together():
        raise UserError("wrong")
    assert not torch.distributed.is_initialized()


def test_a_process_whose_others_do_not_come_says_where_it_waited(monkeypatch):
    port = free_port()
    for name, value in variables(1, 2, port).items():
        monkeypatch.setenv(name, value)
    config = config_from_dict({**PPO, "ddp_timeout": 1, "use_cpu": True})
    line = f"process 1 of 2 has not met the others at 127.0.0.1:{port} within 1 s"
    with pytest.raises(TrainingStopped, match=re.escape(line)), worlds.join(config):
        pass
    assert not torch.distributed.is_initialized()


def test_more_processes_on_a_machine_than_gpus_are_refused():
    check_gpus(Launched(rank=5, size=8, local_rank=1), count=2)
    with pytest.raises(UserError, match=r"LOCAL_RANK: is 2, and 2 GPUs are visible.*start 2"):
        check_gpus(Launched(rank=2, size=3, local_rank=2), count=2)


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"])
def test_a_process_is_torchruns_where_all_of_its_variables_say_so(monkeypatch, missing):
    for name, value in variables(1, 2, 29500).items():
        monkeypatch.setenv(name, value)
    assert launched() == (1, 2, 1)
    monkeypatch.delenv(missing)
    assert launched() is None


def test_a_group_that_the_launcher_has_made_is_used_and_left_to_it(monkeypatch):
    """Ray Train meets before it calls anybody, and parts afterwards."""
    import torch.distributed as dist

    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("it is the launcher's")

    for name, value in variables(1, 2, free_port()).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "init_process_group", refused)
    monkeypatch.setattr(dist, "destroy_process_group", refused)
    seen: list[Path] = []
    with worlds.join(config_from_dict({**PPO, "use_cpu": True}), seen.append) as world:
        assert (world.rank, world.size) == (1, 2)
        world.report_checkpoint(Path("checkpoint-4"))
    assert seen == [Path("checkpoint-4")]
    ALONE.report_checkpoint(Path("checkpoint-5"))  # nobody wants to know
