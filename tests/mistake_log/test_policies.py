"""How often each policy draws which record, against theory, on logs of what a Pilot really makes of rows."""

import math
from collections import Counter

import pytest
import torch
from scipy.stats import binom, chisquare
from small_training import learner, of_records, random_batch, small_module, tiny_model, tiny_pilot, train_on

from tcopilot.mistake_log.log import MistakeLog
from tcopilot.mistake_log.policies import Balanced, Fifo, Latest, Prioritised, Reservoir, _without_replacement
from tcopilot.models.states import PilotStates, StatePooler, trace_pilot

DRAWS = 4000
UNLIKELY = 1e-4


def filled(policy, rows=(3, 4, 2), benchmarks=None, seed=0, **options):
    """A log of one round per entry of `rows`."""
    log, pilot = MistakeLog(policy=policy, seed=seed, **options), tiny_pilot("llama")
    benchmarks = [None] * len(rows) if benchmarks is None else benchmarks
    for s, (n, kinds) in enumerate(zip(rows, benchmarks, strict=True)):
        batch = random_batch("llama", rows=n, seed=s, benchmarks=kinds)
        log.append(trace_pilot(pilot, batch, StatePooler()))
    return log


def counts(log, records=1, draws=DRAWS):
    """How often each record of the log is drawn."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.cat([log.policy.draw(log.held, records, generator) for _ in range(draws)])
    return torch.bincount(drawn, minlength=len(log)).tolist()


def follows(observed, probabilities):
    """Whether counts are compatible with a distribution."""
    probabilities = torch.as_tensor(probabilities, dtype=torch.double)
    expected = probabilities / probabilities.sum() * sum(observed)
    return chisquare(observed, expected.tolist()).pvalue > UNLIKELY


def test_fifo_draws_every_record_of_the_newest_rounds_equally_often():
    log = filled(Fifo(), rows=(5, 3, 4, 2), capacity_rounds=3)
    assert len(log) == 9
    assert follows(counts(log), [1] * 9)


def test_fifo_draws_a_record_at_most_once_in_a_draw_and_all_of_a_small_log():
    log = filled(Fifo())
    generator = torch.Generator().manual_seed(0)
    orders = set()
    for _ in range(50):
        drawn = log.policy.draw(log.held, 6, generator).tolist()
        assert len(set(drawn)) == 6
        everything = log.policy.draw(log.held, 64, generator).tolist()
        assert sorted(everything) == list(range(9))
        orders.add(tuple(everything))
    assert len(orders) > 40
    assert len(log.sample(64).targets_BN) == 9


def test_latest_draws_from_the_newest_round_alone():
    log = filled(Latest(), rows=(3, 4, 5))
    observed = counts(log)
    assert observed[:7] == [0] * 7
    assert follows(observed[7:], [1] * 5)
    newest = random_batch("llama", rows=5, seed=2)
    drawn = log.sample(64)
    assert drawn.target_mask_BN.sum() == newest.tokens
    assert sorted(drawn.targets_BN[drawn.target_mask_BN].tolist()) == sorted(
        newest.target_ids_BN[newest.target_mask_BN].tolist()
    )


@pytest.mark.slow
def test_prioritised_draws_in_proportion_to_the_length_of_the_error():
    log = MistakeLog(policy=Prioritised(), capacity_rounds=2)
    batches = [random_batch("llama", seed=0) for _ in range(15)] + [random_batch("llama", seed=1)]
    train_on(small_module(tiny_model("llama"), 16, pilot=learner(lr=3e-2)), batches, log)  # one round known, one new
    energies = []
    for logged in log.rounds:
        targets, mask, probs = (logged.tensors[name] for name in ("targets", "target_mask", "probs"))
        errors = torch.nn.functional.one_hot(targets, probs.shape[-1]) - probs
        energies += [(e.square().sum(-1)[m]).mean().item() for e, m in zip(errors, mask, strict=True)]
    lengths = torch.tensor(energies).sqrt()
    observed = counts(log, records=6 * DRAWS, draws=1)  # all are independent
    assert follows(observed, lengths)
    assert not follows(observed, [1] * 8)  # the errors differ enough for the test to see it


def test_prioritised_next_to_never_draws_a_record_without_error():
    log = filled(Prioritised(), rows=(3,))
    state = log.state_dict()
    state["rounds"][0]["tensors"]["energy"] = torch.tensor([0.0, 0.25, 1.0])
    log.load_state_dict(state)
    observed = counts(log)
    assert observed[0] == 0
    assert follows(observed[1:], [1, 2])


@pytest.mark.parametrize("correction", [0.0, 0.5, 1.0])
def test_importance_makes_up_for_how_often_prioritised_draws_a_record(correction):
    log = filled(Prioritised(correction=correction), rows=(3,))
    state = log.state_dict()
    state["rounds"][0]["tensors"]["energy"] = torch.tensor([0.04, 0.25, 1.0])
    log.load_state_dict(state)
    shares = torch.tensor([0.2, 0.5, 1.0]) / 1.7
    importance = log.policy.importance(log.held, torch.arange(3))
    torch.testing.assert_close(importance, (3 * shares) ** -correction, rtol=1e-4, atol=0)
    losses = torch.tensor([0.0, 1.0, 2.0])
    over_draws = (shares * importance * losses).sum().item()
    assert (over_draws == pytest.approx(losses.mean().item(), rel=1e-3)) == (correction == 1)
    assert set(log.sample(64).importance_B.tolist()) <= set(importance.tolist())


def test_a_correction_that_is_no_share_is_refused():
    with pytest.raises(ValueError, match=r"mistake_log\.log\.policy\.correction=2: must be a number, from 0 to 1"):
        Prioritised(correction=2)


@pytest.mark.parametrize("policy", [Prioritised, Balanced])
def test_policies_with_replacement_always_give_the_records_asked_for(policy):
    assert len(filled(policy()).sample(40).targets_BN) == 40


def test_balanced_draws_every_benchmark_equally_often_and_its_records_alike():
    log = filled(Balanced(), rows=(6, 4), benchmarks=[[0, 0, 0, 0, 0, 2], [0, 0, 5, 5]])
    observed = counts(log)
    kinds = [0, 0, 0, 0, 0, 2, 0, 0, 5, 5]
    assert follows(observed, [1 / kinds.count(kind) for kind in kinds])
    assert not follows(observed, [1] * 10)


@pytest.mark.slow
def test_reservoir_keeps_every_round_with_the_same_probability():
    rounds, capacity, logs = 8, 3, 500
    one = torch.zeros(1, 1, dtype=torch.long)
    mask = one == 0
    states = PilotStates(
        torch.zeros(1, 1, 2), torch.zeros(1, 1, 1), mask, torch.zeros(1, 1, 1), one, mask, one[0], one[0]
    )
    kept = torch.zeros(rounds)
    for seed in range(logs):
        log = MistakeLog(capacity_rounds=capacity, policy=Reservoir(), seed=seed)
        for _ in range(rounds):
            log.append(states)
        assert len(log.rounds) == capacity
        kept[[logged.round for logged in log.rounds]] += 1
    low, high = binom.interval(1 - UNLIKELY, logs, capacity / rounds)
    assert kept.min() >= low
    assert kept.max() <= high


def test_reservoir_holds_old_rounds_where_fifo_does_not():
    rows = (1,) * 30
    ages = {}
    for policy in (Fifo(), Reservoir()):
        log = filled(policy, rows=rows, capacity_rounds=6)
        assert len(log.rounds) == 6
        ages[type(policy)] = log.statistics()["age_rounds"]
    assert ages[Fifo] == 2.5
    assert ages[Reservoir] > 6


def test_reservoir_draws_what_it_holds_equally_often():
    log = filled(Reservoir(), rows=(2, 3, 1, 4, 2), capacity_rounds=3)
    assert follows(counts(log), [1] * len(log))


def test_a_draw_without_replacement_is_any_ordered_choice_equally_often():
    generator = torch.Generator().manual_seed(3)
    observed = Counter(tuple(_without_replacement(5, 3, generator).tolist()) for _ in range(6000))
    assert len(observed) == 60
    assert follows(list(observed.values()), [1] * 60)


def test_a_draw_from_very_many_records_costs_what_it_draws():
    drawn = _without_replacement(10**15, 64, torch.Generator().manual_seed(0))
    assert len(set(drawn.tolist())) == 64
    assert drawn.max() > 10**14


@pytest.mark.slow
@pytest.mark.parametrize("policy", [Prioritised, Balanced])
def test_weighted_draws_stay_right_after_rounds_have_left_the_middle(policy):
    log = filled(policy(), rows=(3, 2, 4, 1), benchmarks=[[0, 0, 1], [2, 2], [0, 1, 1, 3], [1]])
    log.held.pop(1)
    if policy is Balanced:  # benchmark 2 is gone
        kinds = of_records(log, "benchmark").tolist()
        expected = [1 / kinds.count(kind) for kind in kinds]
    else:
        expected = of_records(log, "energy").sqrt()
    assert follows(counts(log, draws=3 * DRAWS), expected)


def test_an_error_that_is_not_a_number_counts_as_one_in_a_prioritised_draw():
    log = filled(Prioritised(), rows=(2,))
    state = log.state_dict()
    state["rounds"][0]["tensors"]["energy"] = torch.tensor([float("nan"), 0.25])
    log.load_state_dict(state)
    assert follows(counts(log), [2, 1])
    assert math.isnan(log.statistics()["error_energy"])
