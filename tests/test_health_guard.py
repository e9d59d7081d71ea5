"""Skip, go back, stop: the decisions, whatever comes."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dancegrpo.config import load_config
from dancegrpo.errors import ConfigError
from dancegrpo.health import Alarm, Decision, Guard
from dancegrpo.settings import HealthConfig

COLLAPSE = Alarm("collapse", 20, "the reward of hps fell from 0.4 to 0", "c", "r")
SPIKE = Alarm("spike", 20, "s", "c", "r")


def guard(steady: int = 10, **config: object) -> Guard:
    """One that has seen so many updates of norm 1, one per iteration."""
    made = Guard(HealthConfig(**config))
    for iteration in range(steady):
        assert made.allow(1.0)
        assert made.after(iteration, []) == Decision("go on")
    return made


def test_a_norm_past_the_threshold_is_skipped_and_the_threshold_itself_is_not():
    made = guard(spike=8.0)
    assert made.allow(8.0)
    assert not guard(spike=8.0).allow(8.001)


def test_nothing_finite_is_skipped_while_it_warms_up():
    made = guard(steady=7)
    assert made.allow(1e6)


def test_the_median_is_of_accepted_norms_alone():
    made = guard(max_skips=100)
    assert not any(made.allow(100.0) for _ in range(50))
    assert made.allow(7.0)


def test_norms_that_grow_slowly_are_followed():
    made = guard()
    assert all(made.allow(1.05**step) for step in range(200))


@pytest.mark.parametrize("watch", ["none", "alarms", "rollback"])
@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_never_allowed(watch, norm):
    assert not guard(watch=watch, steady=0).allow(norm)


@pytest.mark.parametrize("watch", ["none", "alarms"])
def test_it_does_nothing_where_it_may_only_watch(watch):
    made = guard(watch=watch)
    assert all(made.allow(1e9) for _ in range(20))
    assert made.after(30, [COLLAPSE]) == Decision("go on")
    assert made.metrics() == {"health/rollbacks": 0, "health/rate": 1.0}


def test_skips_in_a_row_ask_for_the_state_before_the_first_of_them():
    made = guard(max_skips=3)
    for iteration in (10, 11):
        assert not made.allow(50.0 + iteration)
        assert made.after(iteration, [SPIKE]) == Decision("go on")
    assert not made.allow(55.0)
    decision = made.after(12, [])
    assert (decision.action, decision.until) == ("roll back", 10)
    assert decision.reason.startswith("3 updates in a row were skipped, their gradient norms up to 61; ")
    assert made.metrics() == {"health/rollbacks": 1, "health/rate": 0.5}


def test_an_accepted_update_ends_the_row():
    made = guard(max_skips=2)
    for iteration in range(10, 30):
        assert made.allow(50.0 if iteration % 2 else 1.0) is (iteration % 2 == 0)
        assert made.after(iteration, []).action == "go on"


def test_a_collapse_asks_for_a_state_from_before_it_could_show():
    decision = guard().after(20, [COLLAPSE])
    assert (decision.action, decision.until) == ("roll back", 9)
    assert decision.reason.startswith("collapse: the reward of hps fell from 0.4 to 0; the learning rate is now 0.5 of")


def test_what_was_gone_back_to_is_good_however_soon_it_breaks_again():
    made = guard()
    made.after(20, [COLLAPSE])
    assert made.after(24, [COLLAPSE]).until == 21


def test_other_alarms_change_nothing():
    others = [Alarm(name, 20, "t", "c", "r") for name in ("flat", "hacking", "no-signal", "clip-range", "spike")]
    assert guard().after(20, others) == Decision("go on")


def test_after_the_last_rollback_it_stops_with_a_verdict():
    made = guard(max_rollbacks=2)
    assert [made.after(i, [COLLAPSE]).action for i in (20, 40)] == ["roll back", "roll back"]
    decision = made.after(60, [COLLAPSE])
    assert decision.action == "stop"
    told = (
        "stopped after 2 rollbacks, with the learning rate at 0.25 of what was asked for: collapse: the reward of hps"
    )
    assert decision.reason.startswith(told)


EVENTS = st.lists(
    st.tuples(
        st.lists(
            st.one_of(st.floats(0.5, 2.0), st.floats(1e-3, 1e6), st.just(math.nan), st.just(math.inf)), max_size=3
        ),
        st.integers(0, 9).map(lambda n: n == 0),
    ),
    max_size=80,
)
CONFIGS = st.builds(
    HealthConfig,
    spike=st.floats(1.5, 20),
    max_skips=st.integers(1, 4),
    max_rollbacks=st.integers(0, 3),
    factor=st.floats(0.1, 1.0),
)


def play(made: Guard, events: list, start: int = 0) -> list:
    """What it says to each iteration's norms and alarms; ends where it stops."""
    said = []
    for iteration, (norms, collapsed) in enumerate(events, start):
        allowed = [made.allow(norm) for norm in norms]
        decision = made.after(iteration, [COLLAPSE] if collapsed else [])
        said.append((allowed, decision, made.rate))
        if decision.action == "stop":
            break
    return said


@given(CONFIGS, EVENTS)
@settings(max_examples=60, deadline=None)
def test_it_never_goes_back_more_often_than_allowed_and_the_rate_never_rises(config, events):
    said = play(Guard(config), events)
    back = sum(decision.action == "roll back" for _, decision, _ in said)
    assert back <= config.max_rollbacks
    rates = [1.0, *(rate for _, _, rate in said)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(config.factor**back)
    assert all(0 <= decision.until <= i + 1 for i, (_, decision, _) in enumerate(said))


@given(CONFIGS, EVENTS, st.integers(0, 80))
@settings(max_examples=60, deadline=None)
def test_a_resumed_guard_decides_as_the_unbroken_one(config, events, cut):
    whole = play(Guard(config), events)
    cut = min(cut, len(whole))
    first, second = Guard(config), Guard(config)
    play(first, events[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert play(second, events[cut : len(whole)], cut) == whole[cut:]
    assert second.metrics() == {"health/rollbacks": second.rollbacks, "health/rate": second.rate}


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("health.spike=1", "health.spike"),
        ("health.factor=0", "health.factor"),
        ("health.factor=1.5", "health.factor"),
        ("health.max_skips=0", "health.max_skips"),
        ("health.max_rollbacks=-1", "health.max_rollbacks"),
        ("health.watch=maybe", "health.watch"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(override, told):
    with pytest.raises(ConfigError, match=told) as refused:
        load_config("shapes-flux", [override])
    assert "\n" not in str(refused.value)
