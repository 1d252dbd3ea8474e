"""Peaks of the loss, a round and decoding, beside the estimate that training starts with, and bytes of a record.

    python performance/memory.py [--full] [--json FILE]

Every size runs in a process of its own. On the CPU peaks are bytes of live tensors, counted operation by operation and
therefore the same in every run; on a GPU they are what torch has allocated there. `--full` takes the sizes of
LLaMA-3.2-1B and -3B and FLAN-T5-base with adapters.
"""

import argparse
import logging
import multiprocessing
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from lightning import Trainer
from models import Shape
from tables import MEMORY, RECORDS, show, write
from timing import DEVICE
from torch.utils.data import DataLoader

from tcopilot.app.memory.dry_run import Load, measure
from tcopilot.app.memory.live_memory import LiveMemory
from tcopilot.functional import token_errors
from tcopilot.mistake_log.log import MistakeLog
from tcopilot.mistake_log.storage import DenseStorage, FrozenHeadStorage, TopKStorage
from tcopilot.training.callbacks import MistakeLogCallback
from tcopilot.training.module import TCopilotModule
from tcopilot.training.objectives import RootMeanSquaredError, objective_sum

SHORT = {
    "llama, width 128": Shape("llama"),
    "llama, width 256": Shape("llama", width=256, layers=6, vocab=16_384),
    "t5, width 128": Shape("t5", target=64),
}
FULL = {
    "LLaMA-3.2-1B": Shape("llama", 128_256, 2048, 16, 8, 150, 10, lora=True),
    "LLaMA-3.2-3B": Shape("llama", 128_256, 3072, 28, 8, 150, 10, lora=True),
    "FLAN-T5-base": Shape("t5", 32_128, 768, 12, 16, 150, 10, lora=True),
}
BEAMS = 4
MODELS = {"LLaMA-3.2-1B": (2048, 128_256), "LLaMA-3.2-3B": (3072, 128_256), "LLaMA-3.1-8B": (4096, 128_256),
          "Qwen2.5-0.5B": (896, 151_936), "Qwen2.5-3B": (2048, 151_936), "Qwen2.5-7B": (3584, 152_064)}  # fmt: skip
RECORD = {"M": 150, "N": 200}  # tokens of a prompt and of a target
GPU = torch.cuda.is_available()


@dataclass
class Peak:
    """One line of the first table, in bytes; `estimate` 0 where there is none."""

    size: str
    what: str
    peak: int
    estimate: int = 0

    @property
    def off(self) -> float:
        """The estimate over the peak, less 1."""
        return self.estimate / self.peak - 1


@dataclass
class Size:
    """One line of the second table: bytes of a record, and how many times smaller than dense in bfloat16."""

    model: str
    storage: str
    probs_bytes: int
    record_bytes: int
    probs_ratio: float
    record_ratio: float


def main() -> None:
    """Measure all cases and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="sizes of the paper's models; needs a GPU")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    peaks = []
    for name, shape in (FULL if arguments.full else SHORT).items():
        peaks += _apart(name, shape)
    device = "GPU" if GPU else "CPU"
    peaks = [asdict(peak) | {"off": peak.off if peak.estimate else None} for peak in peaks]
    sizes = [asdict(size) for model in MODELS for size in record_sizes(model)]
    show(f"Peaks of memory on the {device}", peaks, MEMORY)
    show(f"Bytes of a record in bf16-mixed training with LoRA, {RECORD}, h̄ in bfloat16", sizes, RECORDS)
    write(arguments.json, {"device": device, "peaks": peaks, "sizes": sizes})


def peaks_of(name: str, shape: Shape) -> list[Peak]:
    """All peaks of one size."""
    rounds = [_round(name, what, shape, joint) for what, joint in (("joint round", True), ("Pilot-only round", False))]
    return [*loss_peaks(name, shape), *rounds, *decoding_peaks(name, shape)]


def loss_peaks(name: str, shape: Shape) -> list[Peak]:
    """The Copilot's loss and its backward pass, ours in chunks and in one piece, beyond what both are given."""
    module = shape.module().to(DEVICE)
    copilot, objective = module.model.copilot, RootMeanSquaredError()
    log = _log(shape)
    with torch.no_grad():
        log.append(module._trace(shape.batch().to(DEVICE)))
    record = log.sample(shape.rows, DEVICE)
    hidden_BNC = torch.randn(shape.rows, shape.target, shape.width, device=DEVICE, requires_grad=True)

    def plain() -> None:
        log_probs = record.probs_BNV.clamp_min(torch.finfo(torch.float32).tiny).log()
        corrections = copilot.correct(hidden_BNC, log_probs)
        (corrections - token_errors(record.probs_BNV, record.targets_BN)).square().sum().backward()

    def chunked() -> None:
        objective_sum(objective, copilot, record, hidden_BNC).backward()

    return [
        Peak(name, "loss, in one piece", _peak_of(plain, [*copilot.parameters(), *record])),
        Peak(name, "loss, in chunks", _peak_of(chunked, [*copilot.parameters(), *record])),
    ]


def decoding_peaks(name: str, shape: Shape) -> list[Peak]:
    """Fused decoding, greedy and with beams, of all rows of a batch."""
    model = shape.module().model.eval().to(DEVICE)
    batch = shape.batch().to(DEVICE)
    options = {"max_new_tokens": shape.target, "min_new_tokens": shape.target, "do_sample": False}
    options |= {"pad_token_id": 0, "eos_token_id": 1, "attention_mask": batch.source_mask_BM.long()}
    peaks = []
    for beams in (1, BEAMS):

        def decode(beams: int = beams) -> None:
            with torch.no_grad():
                model.generate(batch.source_ids_BM, num_beams=beams, **options)

        load = replace(_load(shape), prompts=shape.rows, copies=beams, answer=shape.target)
        estimate = measure(shape.module, load, _log(shape)).decoding
        what = "decoding, greedy" if beams == 1 else f"decoding, {beams} beams"
        held = sum(p.nbytes for p in model.parameters())
        peaks.append(Peak(name, what, held + _peak_of(decode, list(model.parameters())), estimate))
    return peaks


def record_sizes(model: str) -> list[Size]:
    """Bytes of a record by what is kept of p̂, against dense p̂ with X̃ and h̄, all in bfloat16."""
    width, vocab = MODELS[model]
    source, target = RECORD.values()
    half = torch.bfloat16
    ways = {
        "dense": (DenseStorage("bfloat16"), width * 2),
        "topk, k = 256": (TopKStorage(256, "bfloat16"), 8),
        "frozen_head": (FrozenHeadStorage(), 8),
    }
    sizes = []
    for name, (storage, of_prompt) in ways.items():
        probs = target * storage.bytes_per_token(vocab, width, half)
        record = probs + source * (of_prompt + 1) + target * (width * 2 + 8 + 1)  # X̃ or ids; h̄, targets; masks
        first = sizes[0] if sizes else Size("", "", probs, record, 1, 1)
        sizes.append(Size(model, name, probs, record, first.probs_bytes / probs, first.record_bytes / record))
    return sizes


def _round(name: str, what: str, shape: Shape, joint: bool) -> Peak:
    """Three rounds, since the first has no state of the optimisers yet; the log has come to three rounds too."""
    rounds, precision = 3, "bf16-mixed" if shape.lora else "32-true"
    log = _log(shape)

    def train() -> TCopilotModule:
        module = shape.module(joint)
        trainer = Trainer(
            accelerator="auto", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, precision=precision,
            callbacks=[MistakeLogCallback(log)],
        )  # fmt: skip
        trainer.fit(module, DataLoader([shape.batch(seed) for seed in range(rounds)], batch_size=None))
        return module

    peak = _peak_of(train)
    needed = measure(lambda: shape.module(joint), _load(shape), log if joint else None, precision, GPU)
    kept = log.nbytes if joint and not GPU else 0  # on the CPU the log lies where the models do
    return Peak(name, what, peak, needed.training + kept)


def _peak_of(act, held: list[torch.Tensor] = ()) -> int:
    """Most bytes of tensors during an action, beyond what is held before it."""
    if GPU:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        act()
        return torch.cuda.max_memory_allocated() - before
    memory = LiveMemory()
    for tensor in held:
        memory.count(tensor)
    before = memory.live
    with memory:
        act()
    return memory.peak - before


def _log(shape: Shape) -> MistakeLog:
    return MistakeLog(storage=FrozenHeadStorage() if shape.lora else DenseStorage())


def _load(shape: Shape) -> Load:
    return Load(shape.rows, shape.source, shape.target)


def _apart(name: str, shape: Shape) -> list[Peak]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_quiet) as process:
        return process.submit(peaks_of, name, shape).result()


def _quiet() -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


if __name__ == "__main__":
    main()
