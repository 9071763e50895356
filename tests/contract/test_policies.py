"""The placement policies that ship with daskfed keep the contract of policies."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import pytest

from daskfed.hub.placement import POLICIES, Policy
from daskfed.testing.policies import PolicyContract


class TestShippedPolicies(PolicyContract):
    factory: ClassVar[Callable[[], Policy]]

    @pytest.fixture(autouse=True, params=sorted(POLICIES))
    def each(self, request: pytest.FixtureRequest) -> None:
        type(self).factory = staticmethod(POLICIES[request.param])

    def make(self) -> Policy:
        return self.factory()


def test_the_contract_catches_a_policy_that_counts_from_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class FromOne:
        def choose(self, block: object, candidates: list[object]) -> int:
            return len(candidates)

    class Tested(PolicyContract):
        def make(self) -> Policy:
            return FromOne()

    with pytest.raises(AssertionError, match="candidates"):
        Tested().test_it_names_one_of_the_candidates()


def test_the_contract_catches_a_policy_that_throws_dice() -> None:
    history = iter(range(10**6))

    class Dice:
        def choose(self, block: object, candidates: list[object]) -> int:
            return next(history) % len(candidates)

    class Tested(PolicyContract):
        def make(self) -> Policy:
            return Dice()

    with pytest.raises(AssertionError):
        Tested().test_the_same_history_leads_to_the_same_choices()
