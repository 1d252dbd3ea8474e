"""A Copilot on a Pilot that it was not trained with (Table 3): what fits, and putting both together."""

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from tcopilot.models.configuration import TCopilotConfig
from tcopilot.models.fused_model import TCopilotModel
from tcopilot.models.pilot import ModelSource, ModelSourceError
from tcopilot.settings import dtype_name


def transfer_problems(pilot: ModelSource, trained: TCopilotConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What keeps the Copilot of an export from reading another Pilot: family, width, vocabulary or tokenizer."""
    if trained.copilot is None:
        return ["copilot.path: this export has no Copilot (copilot=none), so there is nothing to put on another Pilot"]
    try:
        theirs, words = pilot.model_config, pilot.tokenizer().get_vocab()
    except ModelSourceError as error:
        return [str(error)]
    needed = (trained.pilot.model_type, trained.copilot["pilot_width"], trained.copilot["vocab_size"])
    given = (theirs.model_type, theirs.hidden_size, theirs.vocab_size)
    names = ("family", "width", "rows of the vocabulary")
    problems = [
        f"pilot.path={pilot.path}: {name} {have}, and the Copilot was trained with {want}; choose a Pilot that has it"
        for name, want, have in zip(names, needed, given, strict=True)
        if want != have
    ]
    if words != tokenizer.get_vocab():
        problems.append(
            f"pilot.path={pilot.path}: its vocabulary differs from that of the tokenizer that the Copilot was trained "
            f"with, so errors would stand for other tokens; choose a Pilot with the same tokenizer"
        )
    return problems


def transfer_copilot(pilot: ModelSource, trained: TCopilotModel, tokenizer: PreTrainedTokenizerBase) -> TCopilotModel:
    """Return a fused model of another Pilot and the Copilot of a trained model, which is left without one."""
    config, stored = trained.config, pilot.stored_config
    if isinstance(stored, TCopilotConfig) and stored.dtype is not None:  # keep the dtype of its training
        pilot = replace(pilot, dtype=dtype_name(stored.dtype))
    options = {"fusion": trained.fusion, "weight": config.weight, "feedback": config.feedback}
    return type(trained).from_pilot(pilot.load(tokenizer), trained.detach_copilot(), **options)
