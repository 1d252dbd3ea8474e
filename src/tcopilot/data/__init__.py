"""Data: benchmarks and built-in tasks, their rows as batches, and the answers in generated text."""

from tcopilot.data.batch import Batch, PromptTargetCollator
from tcopilot.data.benchmarks import Benchmark, DataError, ExactMatch, Example
from tcopilot.data.chat import Chat
from tcopilot.data.generated_tasks import GeneratedTask
from tcopilot.data.instructions import Instruction
from tcopilot.data.metrics import Answer, CorpusMetric, MacroF1, Metric
from tcopilot.data.module import TCopilotDataModule
from tcopilot.data.next_item import NextItem
from tcopilot.data.question_types import Cloze, LetteredOptions, MultipleChoice, NumberAnswer, YesNo
from tcopilot.data.tokenizers import byte_tokenizer, word_tokenizer

__all__ = [
    "Answer",
    "Batch",
    "Benchmark",
    "Chat",
    "Cloze",
    "CorpusMetric",
    "DataError",
    "ExactMatch",
    "Example",
    "GeneratedTask",
    "Instruction",
    "LetteredOptions",
    "MacroF1",
    "Metric",
    "MultipleChoice",
    "NextItem",
    "NumberAnswer",
    "PromptTargetCollator",
    "TCopilotDataModule",
    "YesNo",
    "byte_tokenizer",
    "word_tokenizer",
]
