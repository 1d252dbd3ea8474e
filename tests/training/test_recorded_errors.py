"""What the Mistake Log keeps of a Pilot that is trained with dropout."""

from copy import deepcopy

import pytest
import torch
from small_training import InOrder, random_batch, same, small_module, tiny_model, train_on, weights

from tcopilot.mistake_log.log import MistakeLog
from tcopilot.models.states import trace_pilot


def recorded(dropout, micro_batch_size=None):
    """One round of a Pilot with dropout 0.5: its p̂ in the log, that of a pass without dropout, and the module."""
    torch.manual_seed(0)
    model = tiny_model("t5", dropout=0.5)
    batch, log = random_batch("t5", targets=[4, 4, 4, 4]), MistakeLog(policy=InOrder(), dropout=dropout)
    with torch.no_grad():
        expected = trace_pilot(deepcopy(model.pilot).eval(), batch, model.copilot.pooler)
    module = small_module(model, 1, micro_batch_size=micro_batch_size)
    torch.manual_seed(1)
    train_on(module, [batch], log)
    return log.sample(4), expected, module


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_without_dropout_the_log_holds_the_errors_that_the_pilot_makes_when_it_answers(micro_batch_size):
    record, expected, module = recorded(False, micro_batch_size)
    torch.testing.assert_close(record.probs_BNV, expected.logits_BNV.softmax(-1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(record.states_BNP, expected.states_BNP, atol=1e-5, rtol=1e-4)
    assert module.model.pilot.training


def test_by_default_the_log_holds_those_of_the_pass_that_the_pilot_learns_from():
    record, expected, _ = recorded(True)
    assert (record.probs_BNV - expected.logits_BNV.softmax(-1)).abs().max() > 0.01


def test_the_pilot_learns_the_same_whichever_is_recorded():
    (_, _, with_dropout), (_, _, without) = recorded(True), recorded(False)
    assert same(weights(with_dropout.model.pilot), weights(without.model.pilot))
