"""Instructions with their outputs, as rows in the format of Alpaca."""

from dataclasses import dataclass

from tcopilot.data.benchmarks import ExactMatch, Example, Row, text_at


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
        parts = [text_at(row, name) for name in (self.prompt_column, self.input) if row.get(name) not in (None, "")]
        return super().render({**row, self.prompt_column: "\n\n".join(parts)})
