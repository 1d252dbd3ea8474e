"""The Pilot: a pretrained model from the Hub or a folder, or a small one built from a config."""

import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

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
from transformers.utils import logging as transformers_logging

from tcopilot.data.tokenizers import byte_tokenizer, word_tokenizer
from tcopilot.models.quantization import bits_of, keep_as_loaded, loading_options
from tcopilot.run_directory import RunDirectory
from tcopilot.settings import DTYPE


class ModelSourceError(ValueError):
    """A model or tokenizer cannot be loaded from where the config says."""


@dataclass
class ModelSource:
    """Where a model comes from; what cannot be read is refused by a `ModelSourceError`.

    Attributes:
        path: Hub id or local folder (from a run's export, its Pilot is loaded); None builds the model from
            `config` with random weights.
        config: values of the family's config, `model_type` among them. Sizes that follow from the tokenizer
            (vocabulary, special tokens) are filled in.
        dtype: type of the weights. `float32` unless the model stays frozen: optimisers need full-precision weights.
        revision: commit or tag on the Hub.
        key: name of the config node in error messages.
        quantization: `4bit` or `8bit` for the linear layers; None leaves them as they are.
    """

    SETTINGS: ClassVar = {"dtype": DTYPE}

    path: str | None = None
    config: dict[str, Any] | None = None
    dtype: str = "float32"
    revision: str | None = None
    key: str = "pilot"
    quantization: str | None = None

    @cached_property
    def model_config(self) -> PreTrainedConfig:
        """The model's config, without its weights."""
        if self.path is None:
            if not self.config:
                raise ModelSourceError(f"{self.key}.path is not set: give a Hub id or a folder with a model")
            try:
                return AutoConfig.for_model(**self.config)
            except (ValueError, TypeError, ArithmeticError, StrictDataclassError) as error:
                reason = str(error).strip().splitlines()[-1].strip().partition(" Should contain one of")[0]
                raise ModelSourceError(f"{self.key}.config={self.config}: {reason}") from error
        stored = self.stored_config
        return getattr(stored, "pilot", stored)  # an export of ours: its Pilot's

    @property
    def bits(self) -> str | None:
        """Quantisation of its linear layers: this source's own setting, else that of the stored model."""
        return self.quantization or bits_of(self.model_config)

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the Pilot has an encoder of its own."""
        return bool(self.model_config.is_encoder_decoder)

    @property
    def source_side(self) -> str:
        """Where prompts are padded: right for encoders, left where the target follows the prompt."""
        return "right" if self.is_encoder_decoder else "left"

    def tokenizer(self, vocabulary: list[str] | None = None) -> PreTrainedTokenizerBase:
        """The model's own tokenizer; a model built from a config gets one of the closed vocabulary, else of bytes."""
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
            model = self.whole_model(auto, dtype)
            model = getattr(model, "pilot", model)  # an export of ours: its Pilot
        else:
            self._fit_config(tokenizer)
            model = auto.from_config(self.model_config)
            for weights in model.state_dict(keep_vars=True).values():  # as `from_pretrained` does; rotary frequencies
                weights.data = weights.data.to(dtype)  # and other computed buffers keep their type
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        ends = end_ids(tokenizer, model)
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
        return model

    def _fit_config(self, tokenizer: PreTrainedTokenizerBase) -> None:
        config = self.model_config
        config.vocab_size = len(tokenizer)
        config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
        config.bos_token_id = tokenizer.bos_token_id
        if self.is_encoder_decoder:
            config.decoder_start_token_id = tokenizer.pad_token_id

    @property
    def stored_config(self) -> PreTrainedConfig:
        """The config in the folder; in an export of ours, that of both models."""
        return self._from_hub(AutoConfig)

    @property
    def trained_copilot(self) -> dict[str, Any] | None:
        """The architecture of the Copilot in an export of ours; None for any other model."""
        return None if self.path is None else getattr(self.stored_config, "copilot", None)

    @property
    def copilot_alone(self) -> Path | None:
        """The weights of a Copilot that was exported without its Pilot; None for any other model."""
        file = Path(self.path or "", Path(RunDirectory.copilot_alone.name).name)
        return file if file.is_file() else None

    def whole_model(self, auto: Any, dtype: torch.dtype) -> PreTrainedModel:
        """Load a model, and refuse missing, misshapen or non-finite weights, for transformers fills gaps."""
        with without_reports():
            options = {"dtype": dtype, **loading_options(self.quantization, dtype)}
            model, report = self._from_hub(auto, **options, output_loading_info=True, ignore_mismatched_sizes=True)
        apart = "config and weights do not belong together"
        if other := sorted(report["mismatched_keys"]):
            name, there, wanted = other[0]
            shapes = f"{name} has the shape {tuple(there)} in its file, and {tuple(wanted)} by config.json"
            raise ModelSourceError(f"{self._name}: {shapes} ({len(other)} such weights); {apart}")
        if missing := sorted(report["missing_keys"]):
            found = f"{len(missing)} weights are missing in its files, {missing[0]} among them"
            raise ModelSourceError(f"{self._name}: {found}; give a folder with all weights of the model")
        if extra := sorted(name for name in report["unexpected_keys"] if name.startswith(("pilot.", "copilot."))):
            found = f"config.json has no place for {len(extra)} weights, {extra[0]} among them"
            raise ModelSourceError(f"{self._name}: {found}; {apart}")
        for name, parameter in model.named_parameters():
            if parameter.numel() and not all(torch.isfinite(bound) for bound in parameter.detach().aminmax()):
                found = f"{name} holds values that are not finite (NaN or infinite)"
                raise ModelSourceError(f"{self._name}: {found}; the model is damaged, give another copy of it")
        keep_as_loaded(model)
        return model

    def _from_hub(self, auto: Any, **options: Any) -> Any:
        """Read a config, a tokenizer, or a model and the report on its weights; code beside them is never run."""
        self._check_path()
        try:
            found = auto.from_pretrained(self.path, revision=self.revision, trust_remote_code=False, **options)
        except Exception as error:  # a malformed file can make the libraries raise any error
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            if isinstance(error, pickle.UnpicklingError):  # torch's own message advises to load it anyway
                first_line = "its weights are a pickle file with more than tensors in it, which is never run"
            raise ModelSourceError(
                f"{self._name}: {auto.__name__} cannot read it ({first_line}). Give a Hub id that this "
                f"machine can reach, or a folder with config.json, weights and tokenizer"
            ) from error
        if code := getattr(found, "auto_map", None) or getattr(found, "init_kwargs", {}).get("auto_map"):
            found = f"it asks for code of its own (auto_map={code}), which is never run"
            raise ModelSourceError(
                f"{self._name}: {found}; give a model of transformers' own classes, without auto_map"
            )
        return found

    @property
    def _name(self) -> str:
        return f"{self.key}={self.path}" if self.key == "run" else f"{self.key}.path={self.path}"

    def _check_path(self) -> None:
        for name in ("path", "revision"):
            value = getattr(self, name)
            if not isinstance(value, str) and (name == "path" or value is not None):
                raise ModelSourceError(f"{self.key}.{name}={value}: expected a text, got a {type(value).__name__}")
        path = Path(self.path)
        if path.is_file():
            raise ModelSourceError(f"{self._name} is a file; give the folder that holds it")
        if self.path.startswith(("/", ".", "~")) and not path.is_dir():
            mend = "give a folder with config.json, weights and tokenizer, or a Hub id"
            raise ModelSourceError(f"{self._name}: there is no such folder; {mend}")


def end_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[int]:
    """Return every token that ends an answer: the tokenizer's, which ends targets, and those of the model's configs.

    They may differ, as in chat models, which end a turn by one token and a text by another.
    """
    found = [tokenizer.eos_token_id]
    for config in (model.config, model.generation_config):
        ids = getattr(config, "eos_token_id", None)
        found += ids if isinstance(ids, list) else [ids]
    return list(dict.fromkeys(token for token in found if token is not None))


@contextmanager
def without_reports() -> Iterator[None]:
    """Silence transformers' report on loaded weights, since this module reads it and raises its problems as errors."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        transformers_logging.set_verbosity(level)
