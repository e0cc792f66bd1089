"""Limits of a key: token buckets and requests at once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from multitensor.server.auth import ANONYMOUS, Key
from multitensor.server.limits import RateLimiter, StreamLimiter


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_requests_a_minute() -> None:
    clock = Clock()
    limiter = RateLimiter(clock)
    key = Key("ada", requests_per_minute=6)
    assert all(limiter.allow(key) for _ in range(6))
    refused = limiter.allow(key)
    assert not refused and "6 requests a minute" in refused.reason and refused.headers == {"Retry-After": "10"}
    clock.now = 9.9
    assert not limiter.allow(key)
    clock.now = 10.1
    assert limiter.allow(key) and not limiter.allow(key)


def test_a_refusal_costs_nothing_of_either_limit() -> None:
    clock = Clock()
    limiter = RateLimiter(clock)
    key = Key("ada", requests_per_minute=2, tokens_per_minute=100)
    assert limiter.allow(key, 90)
    for _ in range(50):
        assert not limiter.allow(key, 20)
    assert limiter.allow(key, 10)


def test_made_tokens_are_paid_afterwards() -> None:
    clock = Clock()
    limiter = RateLimiter(clock)
    key = Key("ada", tokens_per_minute=60)
    assert limiter.allow(key, 30)
    limiter.charge(key, 90)  # 60 below zero
    refused = limiter.allow(key, 1)
    assert 60 <= refused.retry_after <= 62
    clock.now = 61.5
    assert limiter.allow(key, 1)


def test_a_prompt_above_the_whole_limit_waits_for_an_unused_minute() -> None:
    clock = Clock()
    limiter = RateLimiter(clock)
    key = Key("ada", tokens_per_minute=60)
    assert limiter.allow(key, 180)
    assert not limiter.allow(key, 180)
    clock.now = 121.0
    assert not limiter.allow(key, 180)
    clock.now = 180.1
    assert limiter.allow(key, 180)


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(0, 400), st.integers(0, 400)), max_size=60))
def test_on_average_the_limit_holds(asks: list[tuple[float, int, int]]) -> None:
    clock = Clock()
    limiter = RateLimiter(clock)
    key = Key("ada", tokens_per_minute=300)
    taken = largest = 0
    for pause, prompt, answer in asks:
        clock.now += pause
        if limiter.allow(key, prompt):
            limiter.charge(key, answer)
            taken += prompt + answer
            largest = max(largest, prompt + answer)
    assert taken <= 300 + clock.now * 5 + largest + 1e-6


def test_keys_do_not_share_and_no_limit_is_no_limit() -> None:
    limiter = RateLimiter(Clock())
    ada, bob = Key("ada", requests_per_minute=1), Key("bob", requests_per_minute=1)
    assert limiter.allow(ada) and limiter.allow(bob) and not limiter.allow(ada)
    assert all(limiter.allow(ANONYMOUS, 10**9) for _ in range(1000))


def test_a_changed_limit_counts_at_once() -> None:
    limiter = RateLimiter(Clock())
    assert limiter.allow(Key("ada", requests_per_minute=1))
    assert not limiter.allow(Key("ada", requests_per_minute=1))
    assert limiter.allow(Key("ada", requests_per_minute=5))


def test_a_changed_limit_forgives_no_debt() -> None:
    clock = Clock()
    limiter = RateLimiter(clock)
    limiter.charge(Key("ada", tokens_per_minute=300), 900)
    assert limiter.allow(Key("ada", tokens_per_minute=301)).retry_after > 110
    clock.now = 120.0
    assert limiter.allow(Key("ada", tokens_per_minute=301))


def test_what_is_given_back_is_there_again_and_no_more_than_that() -> None:
    limiter = RateLimiter(Clock())
    key = Key("ada", requests_per_minute=1, tokens_per_minute=10)
    assert limiter.allow(key) and limiter.allow(key, 10, requests=0) and not limiter.allow(key, requests=0)
    limiter.charge(key, -10, requests=-1)
    limiter.charge(key, -10, requests=-1)
    assert limiter.allow(key, 10) and not limiter.allow(key)


def test_requests_at_once_of_a_key_and_of_all() -> None:
    limiter = StreamLimiter(total=3)
    ada, bob = Key("ada", streams=2), Key("bob")
    assert limiter.enter(ada) and limiter.enter(ada)
    assert "ada is limited to 2" in limiter.enter(ada).reason
    assert limiter.enter(bob)
    assert "3 requests already" in limiter.enter(bob).reason
    limiter.leave(ada)
    assert limiter.active == 2
    assert limiter.enter(ada) and not limiter.enter(ada)


def test_answers_at_once_of_a_key() -> None:
    limiter = StreamLimiter(total=2)
    ada = Key("ada", streams=4)
    assert limiter.enter(ada, 3) and not limiter.enter(ada, 2)
    assert limiter.enter(ada) and limiter.active == 2
    limiter.leave(ada, 3)
    assert limiter.enter(ada, 3) and not limiter.enter(Key("bob"))
