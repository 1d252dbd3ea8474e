"""Fused models in EleutherAI's lm-evaluation-harness, as its model `tcopilot`.

The harness has no plugin mechanism: its command knows only the models of its own package. The command below therefore
registers our model and then runs the harness's, with the same arguments (needs `pip install 'tcopilot[eval]'`):

    tcopilot-lm-eval --model tcopilot --model_args pretrained=<export>,weight=0.3 --tasks arc_easy --batch_size 8
    python -m tcopilot.evaluation.lm_eval --model tcopilot …

In Python, importing this module makes `lm_eval.simple_evaluate(model="tcopilot", …)` work.

The harness's `--use_cache` stores answers by request, not by model, so use a separate file for each export, λ and
feedback.

Shapes: B batch, N targets, K = N − 1 known targets, V vocabulary.
"""

import logging
import os
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedConfig

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import Collator, resolve_max_length
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error}; the harness comes with: pip install 'tcopilot[eval]'", name=error.name
    ) from error

from tcopilot.data.batch import PromptTargetCollator
from tcopilot.models.configuration import WANTED, TCopilotConfig
from tcopilot.models.decoding import FEEDBACKS
from tcopilot.models.fused_model import TCopilotModel
from tcopilot.models.fusion import check_weight
from tcopilot.models.states import position_ids
from tcopilot.settings import one_of, require

# These options change or wrap the weights of a single model, and do not work for a Pilot and Copilot in one.
_PILOT_ONLY_OPTIONS = ("peft", "delta", "autogptq", "gptqmodel", "gguf_file")

Request = tuple[tuple[str, str] | None, Sequence[int], Sequence[int]]  # text, context, continuation

_logger = logging.getLogger(__name__)


@register_model("tcopilot")
class TCopilotLM(HFLM):
    """A fused model in the harness, which scores and generates by p̃.

    The Copilot corrects targets only, so its output depends on where the target begins. Hence every continuation is
    scored as the target of its own context; contexts are padded left and continuations right, so that all targets of
    a batch begin in the same column. In rolling likelihoods a window's text is the target of the tokens before it.

    Args:
        pretrained: the `export` folder of a run, or a folder that `save_pretrained` wrote; or a loaded fused model,
            whose `weight` and `feedback` are then changed.
        weight: λ ≥ 0; 0 is the Pilot. Default: as in the export.
        feedback: `observed` or `own`. Default: as in the export.
        **options: options of the harness's `hf` model, such as `batch_size`, `dtype` and `max_length`.

    Raises:
        ValueError: if `pretrained` is not an export, or an option is out of range or unsupported for fused models.
    """

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | TCopilotModel,
        weight: float | None = None,
        feedback: str | None = None,
        **options: Any,
    ) -> None:
        _check_options(weight, feedback, options)
        self._given_weight = weight
        if isinstance(pretrained, os.PathLike):
            pretrained = os.fspath(pretrained)
        options.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        options.setdefault("softmax_dtype", "float32")
        super().__init__(pretrained, **options)
        if weight is not None:
            self.model.weight = weight
        if feedback is not None:
            self.model.config.feedback = feedback

    @property
    def max_length(self) -> int:
        """Maximum number of tokens of a text: as given, else the Pilot's."""
        if self._max_length:
            return self._max_length
        return resolve_max_length(self.config.pilot, self.tokenizer, default=self._DEFAULT_MAX_LENGTH)

    def _get_config(self, pretrained: str, **options: Any) -> None:
        try:
            super()._get_config(pretrained, **options)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"pretrained={pretrained}: no export can be read there ({reason}); {WANTED}") from error

    def _get_backend(self, config: PreTrainedConfig, *args: Any, **options: Any) -> None:
        if not isinstance(config, TCopilotConfig):
            raise ValueError(f"pretrained is a {config.model_type} model, which --model hf evaluates; {WANTED}")
        if config.copilot is None and self._given_weight:
            raise ValueError(f"weight={self._given_weight}: this export has no Copilot, so λ has no effect")
        super()._get_backend(config, backend="seq2seq" if config.is_encoder_decoder else "causal")

    def tok_batch_encode(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Tokenise prompts and pad them on the side used in training, which is the right for encoders."""
        ids, mask = super().tok_batch_encode(*args, **options)
        if self.backend == "causal":
            return ids, mask
        tokens_first = mask.argsort(dim=1, descending=True, stable=True)
        return ids.gather(1, tokens_first), mask.gather(1, tokens_first)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        if self.backend == "seq2seq":
            return super()._model_call(inps, attn_mask, labels)
        # The harness calls this to find how many rows fit (batch_size=auto); a text that is all target needs most.
        return self._logits(input_ids=inps, target_start=1)

    def _logits(self, **inputs: Any) -> Tensor:
        dtype = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            return self.model(**inputs).logits

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self.backend == "seq2seq":
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        same_row = defaultdict(list)  # requests that differ only in the last token: one pass
        cut = 0
        for index, (_, context, continuation) in enumerate(requests):
            if not context or not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"a context of {len(context)} and a continuation of {len(continuation)} tokens: the first needs 1 "
                    f"or more, the second 1 to max_length={self.max_length}"
                )
            room = self.max_length + 1 - len(continuation)
            cut += len(context) > room
            same_row[tuple(context[-room:]), tuple(continuation[:-1])].append(index)
        if cut:
            _logger.warning("%d contexts were cut at their start, as texts exceed max_length=%d", cut, self.max_length)
        rows = [(None, context, (*known, requests[same[0]][2][-1])) for (context, known), same in same_row.items()]

        batch_size, batch_fn = self.batch_size, None
        if batch_size == "auto":
            batch_size = override_bs or 0
            if not override_bs and rows:
                self.batch_sizes, batch_fn = {}, self._batch_scheduler
        answers = [(0.0, False)] * len(requests)
        progress = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood")
        longest_first = Collator(rows, sort_fn=lambda row: (-len(row[1]) - len(row[2]), row[1:]))
        for chunk in longest_first.get_batched(n=batch_size, batch_fn=batch_fn):
            for (_, context, continuation), log_probs_NV in zip(chunk, self._score(chunk), strict=True):
                known = continuation[:-1]
                tokens_K = torch.tensor(known, dtype=torch.long, device=log_probs_NV.device)
                before_KV, last_V = log_probs_NV[: len(known)], log_probs_NV[len(known)]
                total = before_KV.gather(1, tokens_K[:, None]).sum()
                greedy = torch.equal(before_KV.argmax(-1), tokens_K)
                for index in same_row[context, known]:
                    text, _, (*_, token) = requests[index]
                    answers[index] = float(total + last_V[token]), greedy and int(last_V.argmax()) == token
                    if text is not None:
                        self.cache_hook.add_partial("loglikelihood", text, answers[index])
                    progress.update(1)
        progress.close()
        return answers

    def _score(self, rows: list[Request]) -> Tensor:
        """Return log p̃ [B, N, V] at the N targets of each row; the last target is predicted but never an input."""
        collate = PromptTargetCollator(self.tokenizer.pad_token_id, "left")
        batch = collate([{"source_ids": row[1], "target_ids": row[2][:-1], "id": 0, "benchmark": 0} for row in rows])
        ids = torch.cat([batch.source_ids_BM, batch.target_ids_BN], dim=1).to(self.device)
        mask = torch.cat([batch.source_mask_BM, batch.target_mask_BN], dim=1).long().to(self.device)
        logits_BNV = self._logits(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position_ids(mask),
            target_start=batch.source_ids_BM.shape[1],
            logits_to_keep=batch.target_ids_BN.shape[1] + 1,
        )
        return logits_BNV.log_softmax(-1, dtype=self.softmax_dtype)


def _check_options(weight: Any, feedback: Any, options: dict[str, Any]) -> None:
    """Refuse unsupported options before the weights are loaded."""
    if weight is not None:
        check_weight(weight)
    require({"feedback": one_of(FEEDBACKS).or_null()}, {"feedback": feedback})
    if unfit := [name for name in _PILOT_ONLY_OPTIONS if options.get(name)]:
        raise ValueError(f"{', '.join(unfit)}: not for fused models; merge or convert the weights before the export")


main = cli_evaluate
"""The harness's own command, which now knows the model `tcopilot`."""

if __name__ == "__main__":
    main()
