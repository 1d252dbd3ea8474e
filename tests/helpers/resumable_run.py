"""One process's life of a small joint run, to be crashed and resumed."""

import random
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from small_training import (
    EachRound,
    Losses,
    learner,
    small_module,
    task_data,
    tiny_model,
    trainer_for,
    vocabulary_size,
    weights,
)
from transformers import get_scheduler

from tcopilot.mistake_log.log import MistakeLog
from tcopilot.training.callbacks import GracefulStop, RngState, RoundCheckpoint
from tcopilot.training.checkpoints import SafeCheckpointIO

ROUNDS = 10
VALIDATED = {"trainer": {"limit_val_batches": 1, "val_check_interval": 4}}


class Crash(Exception):
    """A power cut, a node that dies."""


def crash_after(rounds):
    def crash(trainer, module):
        if module.round + 1 == rounds:
            raise Crash

    return EachRound(crash)


class Run:
    """One process's life: everything is built anew, from another seed if asked, so that nothing leaks into it."""

    def __init__(
        self, family, folder, seed=0, every=None, keep=2, callbacks=(), log=None, model=None, trainer=None, **options
    ):
        self.folder = Path(folder)
        self.data = task_data(family, ROUNDS, rows=60)  # a pass is 8 rounds, the last of them filled up
        built = {"vocab": vocabulary_size(self.data), "dropout": 0.1, "seed": seed}
        self.model = tiny_model(family, **built) if model is None else model
        schedule = partial(get_scheduler, name="cosine", num_warmup_steps=3)
        learners = {"pilot": learner(3e-3, schedule=schedule), "copilot": learner(schedule=schedule)}
        self.module = small_module(self.model, ROUNDS, **{**learners, "steps_per_round": 2, **options})
        self.log = MistakeLog(capacity_rounds=4) if log is None else log
        self.losses = Losses()
        saver = RoundCheckpoint(str(folder), every, keep)
        self.trainer = trainer_for(
            [self.losses, saver, RngState(), GracefulStop(), *callbacks],
            self.log,
            **{"plugins": [SafeCheckpointIO()], **(trainer or {})},
        )
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)

    def idle(self):
        """The same run, but its rounds do nothing, for tests that only look at files."""
        self.module.training_step = lambda batch, batch_idx: None
        return self

    def fit(self, checkpoint=None):
        self.trainer.fit(self.module, datamodule=self.data, ckpt_path=checkpoint, weights_only=True)
        return self


_FINISHED = {}


def finished(family, **options):
    """A whole run that saved every round; tests that ask for the same share it, so nobody may change it."""
    key = repr((family, sorted(options.items())))
    if key not in _FINISHED:
        scratch = tempfile.TemporaryDirectory()
        _FINISHED[key] = scratch, Run(family, scratch.name, every=1, keep=ROUNDS, **options).fit()
    return _FINISHED[key][1]


def assert_equal(left, right):
    """Equal to the bit: tensors, containers and plain values."""
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for name in left:
            assert_equal(left[name], right[name])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_equal(one, other)
    else:
        assert left == right


def assert_same_end(whole, resumed, resumed_after):
    """Weights, log, optimisers and the losses of the rounds since the resume are equal to the bit."""
    assert whole.module.round == resumed.module.round == ROUNDS
    assert resumed.losses.pilot == whole.losses.pilot[resumed_after:]
    assert resumed.losses.copilot == whole.losses.copilot[resumed_after:]
    assert len(resumed.losses.copilot) == ROUNDS - resumed_after
    assert_equal(weights(whole.model), weights(resumed.model))
    assert_equal(whole.log.state_dict(), resumed.log.state_dict())
    for one, other in zip(whole.trainer.optimizers, resumed.trainer.optimizers, strict=True):
        assert_equal(one.state_dict(), other.state_dict())


def names(folder):
    """What lies in a folder of checkpoints."""
    return sorted(path.name for path in folder.iterdir())
