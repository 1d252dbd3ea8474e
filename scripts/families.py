"""Run the family check over all text models of the installed transformers and write `docs/families.md`.

    python scripts/families.py

One process, a few minutes. A family that breaks or takes too long is refused as it would be by a run.
"""

import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from tcopilot.models.families import has_encoder
from tcopilot.models.family_check import failed_check

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
SECONDS = 30
"""Longest that one family may take."""
INCOMPLETE = {
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
}
"""What the default config of a family leaves open and every checkpoint has."""
MARK = "<!-- All below is written by scripts/families.py. -->\n"


def model_types() -> list[str]:
    """All causal and sequence-to-sequence text models of transformers."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES})


def family_config(model_type: str) -> PreTrainedConfig:
    """The default config of a type, with what it leaves open."""
    config = AutoConfig.for_model(model_type, **INCOMPLETE.get(model_type, {}))
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = getattr(config, "pad_token_id", None)
    return config


def verdicts() -> dict[str, str | None]:
    """What the check says of each type: None, or the check that failed and why."""
    found: dict[str, str | None] = {}
    for model_type in model_types():
        try:
            with _time_limit(SECONDS):
                found[model_type] = failed_check(family_config(model_type))
        except Exception as error:  # of a config that cannot even be made
            found[model_type] = f"no tiny model of it can be described ({type(error).__name__})"
    return found


def tables(found: dict[str, str | None]) -> str:
    """The part of the page that follows from these verdicts."""
    lines = [f"With transformers {transformers.__version__}:\n"]
    for title, encoder in (("Decoder-only", False), ("Encoder-decoder", True)):
        names = [f"`{name}`" for name, why in found.items() if why is None and has_encoder(name) == encoder]
        lines += [f"## {title}: {len(names)} supported\n", ", ".join(names) + "\n"]
    refused = {name: why for name, why in found.items() if why is not None}
    lines += [f"## Refused: {len(refused)}\n", "| family | check that fails |", "| --- | --- |"]
    lines += [f"| `{name}` | {why.replace('|', '/')} |" for name, why in refused.items()]
    return "\n".join(lines) + "\n"


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    """Raise a TimeoutError in the block after so many seconds."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"it takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    prose, mark, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    PAGE.write_text(prose + mark + tables(verdicts()), encoding="utf-8")
    print(f"written: {PAGE}")
