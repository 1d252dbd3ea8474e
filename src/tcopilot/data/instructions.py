"""Instructions with their outputs, as rows in the format of Alpaca."""

from dataclasses import dataclass
from typing import Any

from tcopilot.data.answers import tidy
from tcopilot.data.benchmarks import DataError, ExactMatch, Example, Row, lookup, text_at


@dataclass(kw_only=True)
class Instruction(ExactMatch):
    """Answer an instruction of Alpaca's format; ``{prompt}`` is the instruction, a blank line and the input, if any.

    Attributes:
        input: Column of the input, which may be empty or missing.
    """

    prompt: str = "### Instruction:\n{prompt}\n\n### Response:\n"
    target: str = "{target}"
    prompt_column: str = "instruction"
    target_column: str = "output"
    input: str = "input"

    def render(self, row: Row) -> Example:
        """Fill the templates; the answer is the tidied output."""
        paths = (path for path in (self.prompt_column, self.input) if _value(row, path) not in (None, ""))
        asked = "\n\n".join(text_at(row, path) for path in paths)
        said = {"target": text_at(row, self.target_column)} if "target" in self._named else {}
        example = self._example(row, "", prompt=asked, **said)
        return example._replace(answer=tidy(example.target) or "")


def _value(row: Row, path: str) -> Any:
    """Return the value at a column or a dotted path; None if there is none."""
    try:
        return lookup(row, path)
    except DataError:
        return None
