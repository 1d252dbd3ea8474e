"""A head-only Copilot beside LoRA: an update that compares few tokens, against one that compares the vocabulary.

    python performance/few_tokens.py [--vocabularies 8192 49152 151936] [--json FILE]

A Llama of width 576 with random weights, as in SmolLM2-135M but for its depth, which no update reads. The Copilot has
the default configuration. An update draws 16 records with targets of 30 tokens from a full log, and is timed with
`frozen_head` and `likely_tokens` in turn in one process; ratios are of medians.
"""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tables import FEW_TOKENS, show, write
from timing import DEVICE, flops_of, in_turn
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tcopilot.data.batch import PromptTargetCollator
from tcopilot.mistake_log.log import MistakeLog
from tcopilot.mistake_log.storage import FrozenHeadStorage, LikelyTokensStorage
from tcopilot.models.head_copilot import HeadCopilot
from tcopilot.models.states import trace_pilot
from tcopilot.training.compared_tokens import compared_sum
from tcopilot.training.objectives import CrossEntropy, objective_sum

WIDTH, PROMPT, TARGET, ROWS = 576, 20, 30, 16


@dataclass
class Cost:
    """One line of the table.

    Attributes:
        seconds: of an update that compares few tokens.
        ratio: its time over that of an update that compares all.
        flops: the same ratio of floating-point operations.
    """

    vocabulary: int
    seconds: float
    ratio: float
    flops: float


def main() -> None:
    """Measure all vocabularies and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabularies", nargs="+", type=int, default=[8192, 49_152, 151_936])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    costs = []
    for vocabulary in given.vocabularies:
        costs.append(asdict(measure(vocabulary, given.repeats)))
        write(given.json, costs)
    show(f"An update of a head-only Copilot, {DEVICE}", costs, FEW_TOKENS)


def measure(vocabulary: int, repeats: int) -> Cost:
    """Time updates from both kinds of log in turn."""
    torch.manual_seed(0)
    pilot = _pilot(vocabulary)
    copilot = HeadCopilot.from_pilot(pilot).to(DEVICE)
    logs = [MistakeLog(storage=storage) for storage in (FrozenHeadStorage(), LikelyTokensStorage())]
    rows = [
        {
            name: torch.randint(3, vocabulary, (size,)).tolist()
            for name, size in (("source_ids", PROMPT), ("target_ids", TARGET))
        }
        | {"id": number, "benchmark": 0}
        for number in range(ROWS)
    ]
    with torch.no_grad():
        states = trace_pilot(pilot, PromptTargetCollator(0, "left")(rows).to(DEVICE), copilot.pooler)
    for log in logs:
        log.append(states)

    def of_all() -> None:
        record = logs[0].sample(ROWS, DEVICE)
        hidden_BNC, _ = copilot(
            copilot.taught_inputs(record.probs_BNV, record.targets_BN), None, None, record.states_BNP
        )
        _learn(copilot, objective_sum(CrossEntropy(), copilot, record, hidden_BNC))

    def of_few() -> None:
        _learn(copilot, compared_sum(CrossEntropy(), copilot, pilot, logs[1].sample_kept(ROWS, DEVICE)))

    seconds = in_turn({"all": of_all, "few": of_few}, repeats)
    return Cost(vocabulary, seconds["few"], seconds["few"] / seconds["all"], flops_of(of_few) / flops_of(of_all))


def _pilot(vocabulary: int) -> PreTrainedModel:
    config = AutoConfig.for_model(
        "llama", vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=3,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).to(DEVICE).eval().requires_grad_(False)


def _learn(copilot: HeadCopilot, loss: Tensor) -> None:
    copilot.zero_grad()
    loss.backward()


if __name__ == "__main__":
    main()
