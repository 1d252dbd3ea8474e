"""Conversations as training data: each learnt turn as prompt and target under the model's own chat template."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from tcopilot.data.answers import tidy
from tcopilot.data.benchmarks import Benchmark, DataError, Example, Row, lookup

Message = dict[str, Any]
COLUMNS = ("messages", "conversations")
PAIRS = (("prompt", "completion"), ("instruction", "output"))
"""Columns of a question and its answer, read if a row has none of `COLUMNS`; each is a text or a list of messages."""
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}
"""Maps ShareGPT's names of roles to the names that chat templates use."""
TURN = "_turn"
"""Row key of a pair: the number of the conversation (from 1) and of the message that is the target (from 0)."""
PROBE = "answer42"


@dataclass(kw_only=True)
class Chat(Benchmark):
    """Answer as the assistant of a conversation.

    Each turn of the assistant is a row of its own. Its prompt is the conversation so far, as the chat template writes
    it with the generation prompt, so that training, evaluation and use see the same text. Its target is the turn
    itself up to the token that closes it; the loss is on targets only. A single row for the whole conversation would
    be cheaper, but wrong for templates that change a turn once others follow, such as those that drop earlier
    reasoning; and all later code works on pairs of prompt and target.

    Messages are ``{role, content}``, or ShareGPT's ``{from, value}``. A message with ``weight: 0`` is context only. A
    prompt with its completion, or an instruction with its input and output, is a conversation of one turn. A column
    ``system`` is the system prompt of a conversation that has none, and ``tools`` is passed to the template.

    Attributes:
        messages_column: Column of the messages; None means ``messages`` or ``conversations``, whichever exists.
        turns: Which turns of the assistant are targets: ``all``, or the ``last`` of each conversation.
        system: System prompt for conversations without one; None adds none.
        template: A Jinja chat template, as a file or as its text, that replaces the tokenizer's own.
    """

    templated: ClassVar[bool] = True

    prompt: str = field(default="", init=False)
    target: str = field(default="", init=False)
    messages_column: str | None = None
    turns: Literal["all", "last"] = "all"
    system: str | None = None
    template: str | None = None

    def use_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Adopt the chat template, and make the token that closes a turn the end token of answers.

        Raises:
            DataError: If there is no template, or if an answer does not continue the generation prompt under it.
        """
        if self.template is not None:
            tokenizer.chat_template = self._given_template()
        if not tokenizer.chat_template:
            mend = "choose a chat model, or give the file of a Jinja template"
            raise self._error("template", f"the Pilot's tokenizer has no chat template; {mend}")
        self._tokenizer = tokenizer
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
        try:
            _, found, self._closing = self._written(messages).rpartition(PROBE)
            self._prompt_and_rest(messages)
        except TemplateError as error:
            raise self._error("template", f"the chat template cannot write a conversation ({error})") from error
        if not found:
            raise self._error("template", "the chat template leaves out what the assistant says")
        ends = [token for token in tokenizer.get_added_vocab() if self._closing.lstrip().startswith(token)]
        if ends:
            tokenizer.eos_token = max(ends, key=len)

    def derive(self, split: str, rows: Iterable[Row]) -> Iterable[Row]:
        """Make one row for each turn that is a target."""
        return _Turns(self, rows)

    def group_of(self, row: Row) -> str:
        """Return the opening of the conversation; all turns of conversations that open alike stay in one split."""
        opening = []
        for message in self._messages(row):
            opening.append(str(message["content"]))
            if message["role"] == "user":
                break
        return " ".join(" ".join(opening).split()).casefold()

    def render(self, row: Row) -> Example:
        """Write the conversation up to the row's turn, and this turn, under the chat template."""
        number, turn = row[TURN]
        try:
            messages = self._messages(row)
            if turn is None:
                raise DataError("no turn of the assistant follows one of the user; mend or remove it")
            prompt, rest = self._prompt_and_rest(messages[: turn + 1], row.get("tools") or None)
        except (DataError, TemplateError) as error:
            raise DataError(f"conversation {number}: {error}") from error
        target = rest.removesuffix(self._closing)
        return Example(prompt, target, tidy(target) or "")

    def targets_of(self, row: Row) -> list[int | None]:
        """Return the indices of the messages that are targets; [None] if there are none, which `render` reports."""
        try:
            messages = self._messages(row)
        except DataError:
            return [None]
        asked = next((place for place, one in enumerate(messages) if one["role"] == "user"), len(messages))
        answers = [place for place, one in enumerate(messages) if one["role"] == "assistant" and place > asked]
        learnt = [place for place in answers if messages[place].get("weight", 1)]
        return (learnt if self.turns == "all" else learnt[-1:]) or [None]

    def _messages(self, row: Row) -> list[Message]:
        where, given = self._given(row)
        if not isinstance(given, list) or not given:
            raise DataError(f"{where} is {given!r:.80}, expected a list of messages")
        messages = [_message(one, f"{where}.{place}") for place, one in enumerate(given)]
        system = row.get("system") or self.system
        if system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        return messages

    def _given(self, row: Row) -> tuple[str, Any]:
        """Return the name of the column or columns that hold a row's messages, and the raw messages."""
        if column := self.messages_column or next((name for name in COLUMNS if name in row), None):
            return column, lookup(row, column)
        if pair := next((pair for pair in PAIRS if row.keys() >= set(pair)), None):
            asked, said = (row[name] for name in pair)
            if isinstance(asked, list) and isinstance(said, list):
                return "+".join(pair), asked + said
            asked = f"{asked}\n\n{row['input']}" if row.get("input") else asked
            return "+".join(pair), [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        raise DataError(
            f"no column {' or '.join(map(repr, COLUMNS))}: it has {', '.join(map(repr, row))}. Name the column of "
            f"the messages in data.benchmarks.{self.name}.messages_column"
        )

    def _prompt_and_rest(self, messages: list[Message], tools: Any = None) -> tuple[str, str]:
        """Write a conversation as two texts: what comes before its last turn, and the rest."""
        prompt = self._written(messages[:-1], tools, add_generation_prompt=True)
        whole = self._written(messages, tools)
        if not whole.startswith(prompt):
            raise DataError(
                "under the chat template an answered conversation does not begin with the generation prompt, so no "
                f"target can be cut from it; give another template in data.benchmarks.{self.name}.template"
            )
        return prompt, whole[len(prompt) :]

    def _written(self, messages: list[Message], tools: Any = None, add_generation_prompt: bool = False) -> str:
        return self._tokenizer.apply_chat_template(
            messages, tools, add_generation_prompt=add_generation_prompt, tokenize=False
        )

    def _given_template(self) -> str:
        if "{" in self.template:
            return self.template
        try:
            return Path(self.template).read_text(encoding="utf-8")
        except OSError as error:
            raise self._error("template", f"the file cannot be read ({error.strerror})") from error


@dataclass(frozen=True)
class _Turns:
    """Iterate over the turns of conversations; each iteration starts anew."""

    chat: Chat
    rows: Iterable[Row]

    def __iter__(self) -> Iterator[Row]:
        for number, row in enumerate(self.rows, start=1):
            for turn in self.chat.targets_of(row):
                yield {**row, TURN: (number, turn)}


def _message(given: Any, where: str) -> Message:
    """Return a message in the form that chat templates expect, without keys that are null."""
    if not isinstance(given, Mapping):
        raise DataError(f"{where} is {given!r:.80}, expected a message with role and content")
    message = {key: value for key, value in given.items() if value is not None}
    role, content = (message.pop(old, message.get(new)) for old, new in (("from", "role"), ("value", "content")))
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if content is None and "tool_calls" in message:
        content = ""
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(f"{where} is {given!r:.80}, expected texts as role and content, or as from and value")
    return message | {"role": ROLES.get(role, role), "content": content}
