"""The cost estimate, and what each policy makes of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from daskfed.hub.placement import POLICIES, Candidate, DataOnly, LowestCost, Policy, Random, RoundRobin, finish_s
from tests.unit.hub.builders import block

IDLE = Candidate("idle", threads=4, backlog_s=0.0, bring_nbytes=0, bring_s=0.0, run_s=8.0)
B = block("b", "x", ntasks=8)


class TestEstimate:
    @pytest.mark.parametrize(
        ("changes", "seconds"),
        [
            ({}, 2.0),
            ({"backlog_s": 12.0}, 3.0 + 2.0),
            ({"bring_s": 0.5, "cold_start_s": 30.0, "round_trip_s": 0.25}, 0.5 + 30.0 + 0.25 + 2.0),
            ({"queue_wait_s": 60.0}, 2.0),  # it has workers
            ({"threads": 0, "queue_wait_s": 60.0}, 60.0 + 8.0),
            ({"threads": 0, "queue_wait_s": 60.0, "backlog_s": 100.0}, 100.0 + 8.0),
            ({"threads": 100}, 1.0),  # eight tasks use eight threads at most
            ({"run_s": 0.0}, 0.0),
        ],
    )
    def test_seconds_until_the_block_would_be_finished(self, changes: dict[str, float], seconds: float) -> None:
        assert finish_s(B, replace(IDLE, **changes)) == seconds  # type: ignore[arg-type]

    def test_one_task_uses_one_thread(self) -> None:
        assert finish_s(block("b", "x", ntasks=1), IDLE) == 8.0
        assert finish_s(block("b", "x", ntasks=0), IDLE) == 8.0


class TestLowestCost:
    def test_it_takes_the_first_to_finish(self) -> None:
        busy, far = replace(IDLE, site="busy", backlog_s=1.0), replace(IDLE, site="far", bring_s=0.2)
        assert LowestCost().choose(B, [busy, far]) == 1
        assert LowestCost().choose(B, [far, busy]) == 0

    def test_ties_go_to_fewer_bytes_and_then_to_the_name(self) -> None:
        heavy, light = replace(IDLE, site="a", bring_nbytes=2), replace(IDLE, site="b", bring_nbytes=1)
        assert LowestCost().choose(B, [heavy, light]) == 1
        assert LowestCost().choose(B, [replace(IDLE, site="z"), replace(IDLE, site="y")]) == 1


    def test_it_stays_near_its_data_unless_there_is_much_to_gain(self) -> None:
        near, away = replace(IDLE, site="near", near=True), replace(IDLE, site="away")

        def chosen(**changes: Any) -> str:
            return [near.site, away.site][LowestCost().choose(B, [replace(near, **changes), away])]

        assert finish_s(B, away) == 2.0
        assert chosen(backlog_s=24.0) == "near"  # 8 s: four times as long, and only 6 s later
        assert chosen(backlog_s=44.0) == "away"
        assert chosen(backlog_s=44.0, guessed=True) == "near"
        assert chosen(threads=0, queue_wait_s=60.0, guessed=True) == "away"

    def test_of_several_sites_near_its_data_it_takes_the_first_to_finish(self) -> None:
        near = [replace(IDLE, site=name, near=True, backlog_s=seconds) for name, seconds in (("a", 2.0), ("b", 1.0))]
        assert LowestCost().choose(B, [*near, replace(IDLE, site="c")]) == 1


class TestBaselines:
    def test_data_only_takes_the_fewest_bytes_however_busy(self) -> None:
        busy, empty = replace(IDLE, site="a", backlog_s=1e6), replace(IDLE, site="b", bring_nbytes=1)
        assert DataOnly().choose(B, [empty, busy]) == 1

    def test_and_then_the_shortest_backlog_for_each_thread(self) -> None:
        small = replace(IDLE, site="a", backlog_s=10.0, threads=1)
        large = replace(IDLE, site="b", backlog_s=30.0, threads=10)
        assert DataOnly().choose(B, [small, large]) == 1

    def test_round_robin_takes_each_in_turn(self) -> None:
        policy = RoundRobin()
        assert [policy.choose(B, [IDLE] * 3) for _ in range(6)] == [1, 2, 0, 1, 2, 0]

    def test_random_depends_on_its_seed_alone_and_takes_all_alike(self) -> None:
        chosen = {seed: [policy.choose(B, [IDLE] * 3) for _ in range(3000)] for seed, policy in seeded(1, 1, 2)}
        assert chosen[1] == [Random(1).choose(B, [IDLE] * 3), *chosen[1][1:]]
        assert chosen[1] != chosen[2]
        assert all(900 < count < 1100 for count in Counter(chosen[1]).values())


def seeded(*seeds: int) -> list[tuple[int, Policy]]:
    return [(seed, Random(seed)) for seed in seeds]


def test_policies_are_made_afresh_by_name() -> None:
    assert {name: type(make()).__name__ for name, make in POLICIES.items()} == {
        "lowest-cost": "LowestCost", "data-only": "DataOnly", "round-robin": "RoundRobin", "random": "Random"
    }  # fmt: skip
    assert all(make() is not make() for make in POLICIES.values())
