"""Early stopping of the Copilot by its error ratio on validation rows, and the choice of the Copilot that is kept."""

import logging
import math
from itertools import islice
from typing import Any, ClassVar

from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from tcopilot.models.base_copilot import BaseCopilot
from tcopilot.processes import agree_on, sum_over_processes
from tcopilot.settings import require, whole
from tcopilot.training.error_statistics import ErrorStatistics

log = logging.getLogger(__name__)


class CopilotStop(Callback):
    """Stops updating the Copilot once validation finds no better one; the Pilot is trained on.

    A Copilot is judged by E‖f^C − ℓ‖² / E‖ℓ‖² on validation rows, with the Pilot of that moment. Since the Pilot is
    trained further, the best Copilot so far need not be the best for the final Pilot. When training ends, the best and
    the last Copilot are both judged with the final Pilot, and the better one is kept.

    `patience` counts the validations without a better ratio after which it stops.
    """

    SETTINGS: ClassVar = {"patience": whole(mend="give a whole number of validations, at least 1")}

    def __init__(self, patience: int = 3) -> None:
        require(self.SETTINGS, {"patience": patience})
        self.patience = patience
        self._state: dict[str, Any] = {"best": math.inf, "round": 0, "waited": 0, "weights": {}}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """In a resumed run, stop the Copilot again if it had been stopped."""
        pl_module.copilot_stopped = self._state["waited"] >= self.patience

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the current Copilot."""
        if trainer.sanity_checking or not pl_module.copilot_learns:
            return
        ratio = agree_on(_reported(trainer))  # only the first process has it
        if ratio < self._state["best"]:
            weights = {name: weight.cpu().clone() for name, weight in _trained(pl_module.model.copilot).items()}
            self._state.update(best=ratio, round=pl_module.round, waited=0, weights=weights)
            return
        self._state["waited"] += 1
        if self._state["waited"] >= self.patience:
            pl_module.copilot_stopped = True
            best = self._state["round"]
            log.info("The Copilot stops after round %d; its best was after round %d", pl_module.round, best)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the better of the best and the last Copilot; a run that was stopped midway is left as it is."""
        if not self._state["weights"] or pl_module.round < pl_module.rounds:
            return
        pl_module.to(trainer.strategy.root_device)  # Lightning has left it on the CPU
        copilot = pl_module.model.copilot
        last, best_round = {name: weight.clone() for name, weight in _trained(copilot).items()}, self._state["round"]
        ratio_of_last = _ratio(trainer, pl_module)
        _put(copilot, self._state["weights"])
        ratio_of_best = _ratio(trainer, pl_module)
        kept = f"round {best_round}"
        if ratio_of_last <= ratio_of_best:
            _put(copilot, last)
            kept = "the last round"
        log.info(
            "With the final Pilot, the Copilot of round %d has error ratio %.3f, the last one's %.3f. The Copilot of "
            "%s is kept", best_round, ratio_of_best, ratio_of_last, kept,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """The best ratio so far with its round and weights, and the validations since."""
        return self._state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state."""
        self._state = dict(state_dict)


def _trained(copilot: BaseCopilot) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in copilot.named_parameters() if weight.requires_grad}


def _put(copilot: BaseCopilot, weights: dict[str, Tensor]) -> None:
    for name, weight in _trained(copilot).items():
        weight.copy_(weights[name])


def _reported(trainer: Trainer) -> float:
    return float(trainer.callback_metrics.get("val/error_ratio", math.inf))


def _ratio(trainer: Trainer, pl_module: LightningModule) -> float:
    """The error ratio on the validation batches that training looks at."""
    model = pl_module.model
    trainer.fit_loop.epoch_loop.val_loop.setup_data()  # a finished run that is resumed has not counted its batches
    batches = islice(trainer.datamodule.val_dataloader(), trainer.num_val_batches[0])
    statistics, training = ErrorStatistics([model.weight], model.fusion), model.training
    model.eval()
    for batch in batches:
        with trainer.precision_plugin.val_step_context():
            statistics.observe(model, batch.to(pl_module.device))
    model.train(training)
    statistics.reduce(sum_over_processes)
    return statistics.summary()["error_ratio"]
