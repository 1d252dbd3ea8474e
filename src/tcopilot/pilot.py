"""The Pilot: a pretrained model from the Hub or a folder, or a small one built from a config."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tcopilot.data.tokenizers import byte_tokenizer, word_tokenizer


class ModelSourceError(ValueError):
    """A model or tokenizer cannot be had from where the config says."""


@dataclass
class ModelSource:
    """Where a model comes from.

    Attributes:
        path: Hub id or local folder, of which an export of a run gives its Pilot; None builds the model from
            `config` with random weights.
        config: values of the family's config, `model_type` among them. Sizes that follow from the tokenizer
            (vocabulary, special tokens) are filled in.
        dtype: of the weights. `float32` unless the model stays frozen: optimisers need full-precision weights.
        revision: commit or tag on the Hub.
        key: the config node, for messages.
    """

    path: str | None = None
    config: dict[str, Any] | None = None
    dtype: str = "float32"
    revision: str | None = None
    key: str = "pilot"

    @cached_property
    def model_config(self) -> PreTrainedConfig:
        """The model's config, without its weights.

        Raises:
            ModelSourceError: if neither path nor config is given, or the path cannot be read.
        """
        if self.path is None:
            if not self.config:
                raise ModelSourceError(f"{self.key}.path is not set: give a Hub id or a folder with a model")
            try:
                return AutoConfig.for_model(**self.config)
            except (ValueError, TypeError, StrictDataclassError) as error:
                reason = str(error).strip().splitlines()[-1].strip().partition(" Should contain one of")[0]
                raise ModelSourceError(f"{self.key}.config={self.config}: {reason}") from error
        return self._from_hub(AutoConfig)

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the Pilot has an encoder of its own."""
        return bool(self.model_config.is_encoder_decoder)

    @property
    def source_side(self) -> str:
        """Where prompts are padded: right for encoders, left where the target follows the prompt."""
        return "right" if self.is_encoder_decoder else "left"

    def tokenizer(self, vocabulary: list[str] | None = None) -> PreTrainedTokenizerBase:
        """The model's own tokenizer; for a model built from a config, one of the data's words, else of bytes.

        Args:
            vocabulary: the closed vocabulary of generated tasks, or None.
        """
        if self.path is None:
            tokenizer = byte_tokenizer() if vocabulary is None else word_tokenizer(vocabulary)
            self._fit_config(tokenizer)
        else:
            tokenizer = self._from_hub(AutoTokenizer)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = self.source_side
        return tokenizer

    def load(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """Load the weights, or build random ones (from torch's global seed) that fit the tokenizer."""
        auto = AutoModelForSeq2SeqLM if self.is_encoder_decoder else AutoModelForCausalLM
        dtype = getattr(torch, self.dtype)
        if self.path is not None:
            model = self._from_hub(auto, dtype=dtype)
        else:
            self._fit_config(tokenizer)
            model = auto.from_config(self.model_config).to(dtype)
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        return model

    def _fit_config(self, tokenizer: PreTrainedTokenizerBase) -> None:
        config = self.model_config
        config.vocab_size = len(tokenizer)
        config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
        config.bos_token_id = tokenizer.bos_token_id
        if self.is_encoder_decoder:
            config.decoder_start_token_id = tokenizer.pad_token_id

    def _from_hub(self, auto: Any, **options: Any) -> Any:
        try:
            found = auto.from_pretrained(self.path, revision=self.revision, trust_remote_code=False, **options)
            return found.pilot if hasattr(found, "pilot") else found  # an export of ours: config or model of its Pilot
        except (OSError, ValueError) as error:
            first_line = str(error).strip().splitlines()[0]
            raise ModelSourceError(
                f"{self.key}.path={self.path}: {auto.__name__} cannot read it ({first_line}). Give a Hub id that this "
                f"machine can reach, or a folder with config.json, weights and tokenizer"
            ) from error
