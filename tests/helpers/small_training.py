"""A tiny harness for tests of training: small models, small batches, a Lightning Trainer on the CPU."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel, get_scheduler

from tcopilot.data import Batch, GeneratedTask, PromptTargetCollator, TCopilotDataModule, word_tokenizer
from tcopilot.mistake_log.log import MistakeLog
from tcopilot.mistake_log.policies import Fifo
from tcopilot.mistake_log.rounds import LoggedRecords
from tcopilot.models.fused_model import TCopilotModel
from tcopilot.models.modeling import TCopilotForCausalLM, TCopilotForSeq2SeqLM
from tcopilot.training.callbacks import MistakeLogCallback
from tcopilot.training.learner import Learner
from tcopilot.training.module import TCopilotModule

torch.set_num_threads(1)
VOCAB = 24
FUSED_ADAMW = partial(torch.optim.AdamW, fused=True)  # one kernel in place of ten for each of a hundred weights
FAMILIES = ("t5", "llama")
T5_FIRST = ("t5", pytest.param("llama", marks=pytest.mark.slow))  # the other family waits for the slow suite
LLAMA_FIRST = ("llama", pytest.param("t5", marks=pytest.mark.slow))


def tiny_pilot(family: str, vocab: int = VOCAB, width: int = 16, layers: int = 2, dropout: float = 0.0, seed: int = 0):
    """A Pilot with random weights, large enough for p̂ to be far from uniform."""
    torch.manual_seed(seed)
    special = {"vocab_size": vocab, "pad_token_id": 0, "eos_token_id": 1}
    if family == "t5":
        config = AutoConfig.for_model(
            "t5", d_model=width, d_kv=width // 2, num_heads=2, d_ff=2 * width, num_layers=layers,
            num_decoder_layers=layers, dropout_rate=dropout, decoder_start_token_id=0, **special,
        )  # fmt: skip
        return AutoModelForSeq2SeqLM.from_config(config)
    config = AutoConfig.for_model(
        "llama", hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, attention_dropout=dropout, tie_word_embeddings=True, initializer_range=0.3, **special,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def tiny_model(
    family: str, copilot: bool = True, head_std: float = 0.0, pilot: PreTrainedModel | None = None, **options: Any
) -> TCopilotModel:
    """A fused model; `head_std` above 0 starts the Copilot away from its no-op, so that all of it gets gradients."""
    names = ("vocab", "width", "layers", "dropout", "seed")
    built = {name: options.pop(name) for name in names if name in options}
    pilot = tiny_pilot(family, **built) if pilot is None else pilot
    cls = TCopilotForSeq2SeqLM if family == "t5" else TCopilotForCausalLM
    if not copilot:
        return cls(cls.config_class(pilot.config), pilot)
    model = cls.from_pilot(pilot, **options)
    if head_std:
        nn.init.normal_(next(model.copilot.head.parameters()), std=head_std)
        nn.init.normal_(model.copilot.start)  # at 0 its gradient is 1000 times all others', and so is its rounding
    return model


def source_side(family: str) -> str:
    """Where a family's prompts are padded."""
    return "right" if family == "t5" else "left"


def random_batch(
    family: str,
    rows: int = 4,
    seed: int = 0,
    targets: Sequence[int] | None = None,
    first_id: int | None = None,
    benchmarks: Sequence[int] | None = None,
    vocab: int = VOCAB,
) -> Batch:
    """Rows of random tokens with different prompt and target lengths; `targets` fixes the target lengths."""
    generator = torch.Generator().manual_seed(seed)
    number = partial(torch.randint, size=(1,), generator=generator)
    first_id = 1000 * seed if first_id is None else first_id
    made = []
    for row in range(rows):
        length = int(number(1, 6)) if targets is None else targets[row]
        made.append(
            {
                "source_ids": torch.randint(3, vocab, (int(number(2, 7)),), generator=generator).tolist(),
                "target_ids": [*torch.randint(3, vocab, (length - 1,), generator=generator).tolist(), 1],
                "id": first_id + row,
                "benchmark": 0 if benchmarks is None else benchmarks[row],
            }
        )
    return PromptTargetCollator(0, source_side(family))(made)


def learner(
    lr: float = 1e-2,
    clip: float | None = 1.0,
    schedule: Callable[..., Any] | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = FUSED_ADAMW,
) -> Learner:
    """An optimiser with a constant learning rate, unless told otherwise."""
    return Learner(partial(optimizer, lr=lr), schedule or partial(get_scheduler, name="constant"), clip)


def small_module(model: TCopilotModel, rounds: int, **options: Any) -> TCopilotModule:
    """A module in which both models learn, with one Copilot step a round on at most 8 records."""
    defaults = {"pilot": learner(), "copilot": learner(), "copilot_batch_size": 8, "steps_per_round": 1}
    return TCopilotModule(model, rounds=rounds, **{**defaults, **options})


class InOrder(Fifo):
    """Draws all records in the order in which they were logged, so that a test knows which is which."""

    def draw(self, log: LoggedRecords, records: int, generator: torch.Generator) -> Tensor:
        """The oldest first."""
        return torch.arange(min(records, len(log)))


def of_records(log: MistakeLog, name: str) -> Tensor:
    """One value per record held, in log order: `energy`, `repeated` or `benchmark`."""
    return torch.cat([logged.tensors[name] for logged in log.rounds])


class Losses(Callback):
    """Keeps both losses of every round."""

    def __init__(self) -> None:
        self.pilot: list[float] = []
        self.copilot: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Read them where users read them."""
        for name in ("pilot", "copilot"):
            if (value := trainer.callback_metrics.get(f"train/{name}_loss")) is not None:
                getattr(self, name).append(float(value))


class EachRound(Callback):
    """Calls a function after every round."""

    def __init__(self, function: Callable[[Trainer, TCopilotModule], Any]) -> None:
        self.function = function

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Call it."""
        self.function(trainer, pl_module)


def trainer_for(callbacks: Iterable[Callback] = (), log: MistakeLog | None = None, **options: Any) -> Trainer:
    """A quiet Trainer on the CPU, set up as `configs/trainer/cpu.yaml` does."""
    owner = [] if log is None else [MistakeLogCallback(log, every_n_rounds=1)]
    defaults = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "min_epochs": 0, "logger": False,
        "limit_val_batches": 0, "num_sanity_val_steps": 0, "use_distributed_sampler": False,
        "enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False,
    }  # fmt: skip
    return Trainer(callbacks=[*owner, *callbacks], **{**defaults, **options})


def train_on(
    module: TCopilotModule,
    batches: Sequence[Batch],
    log: MistakeLog | None = None,
    callbacks: Iterable[Callback] = (),
    **options: Any,
) -> Losses:
    """Run one round per batch and return the losses."""
    losses = Losses()
    trainer = trainer_for([losses, *callbacks], log, **options)
    trainer.fit(module, DataLoader(list(batches), batch_size=None))
    return losses


def task_data(
    family: str, rounds: int, batch_size: int = 8, rows: int = 64, kind: str = "multiple_choice", seed: int = 0
) -> TCopilotDataModule:
    """A generated task of few rows, prepared for a family."""
    task = GeneratedTask(name=kind, kind=kind, train=rows, validation=32, test=8)
    data = TCopilotDataModule({kind: task}, batch_size=batch_size, eval_batch_size=16, rounds=rounds, seed=seed)
    data.prepare(word_tokenizer(task.vocabulary), source_side(family))
    return data


def vocabulary_size(data: TCopilotDataModule) -> int:
    """V of the tokenizer of generated tasks."""
    return len(word_tokenizer(data.vocabulary))


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are equal to the bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def furthest(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Largest absolute difference of two sets of tensors."""
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)
