"""Which model families are supported: those that pass a check on a tiny random model of the family.

A Copilot relies on a few properties of a family, and each is tested here. Since no list of names decides, a family
whose code changes in a new transformers release cannot fail silently. `docs/families.md` shows the results for every
family.

Shapes: B batch, T tokens, C width, U some tokens of the vocabulary.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging as transformers_logging

from tcopilot.models import families
from tcopilot.models.families import UnsupportedFamilyError
from tcopilot.models.pilot import without_reports
from tcopilot.models.tiny_model import TinyModel, tiny_config

Checks = dict[str, Callable[[TinyModel], None]]
MOST_WEIGHTS = 20_000_000
MOST_ALIKE = {"atol": 1e-3, "rtol": 1e-3}
_found: dict[str, Any] = {}


def check_family(config: PreTrainedConfig, decoder: bool = True) -> None:
    """Raise an `UnsupportedFamilyError` that names the failed check if a Copilot cannot work with this family.

    No weights are loaded. Results are cached in the process. Without `decoder`, the Copilot takes
    no layers of the family (a head, or none at all), and only the Pilot is checked.
    """
    if (found := failed_check(config, decoder)) is not None:
        raise UnsupportedFamilyError(f"model type {config.model_type!r} is not supported: {found}")


def failed_check(config: PreTrainedConfig, decoder: bool = True) -> str | None:
    """Say in a sentence what fails on a tiny model of a config; None if everything holds."""
    try:
        tiny = tiny_config(config)
        return _found_out(_pilot_fails, tiny) or (_found_out(_decoder_fails, tiny) if decoder else None)
    except Exception as error:  # a config may have any shape
        return f"no tiny model of it can be described ({_reason(error)})"


def embeds_tokens_alone(config: PreTrainedConfig) -> bool:
    """Whether the first layer of a decoder-only Pilot reads the input embedding of its tokens and nothing else.

    GPT-2 adds learned positions, Granite a factor: their X̃ cannot be rebuilt from the prompt's ids by the embedding.
    """
    return _found_out(_reads_embedding, tiny_config(config))


def embeds_positions(config: PreTrainedConfig) -> bool:
    """Whether its first layer reads more than that embedding times a factor, such as GPT-2's learned positions."""
    return _found_out(_reads_positions, tiny_config(config))


def reads_past_gaps(config: PreTrainedConfig) -> bool:
    """Whether masked columns amid a text leave what a decoder-only Pilot makes of it as it is.

    MPT measures distances in columns.
    """
    return _found_out(_reads_past_gap, tiny_config(config))


def _found_out(question: Callable[[TinyModel], Any], tiny: PreTrainedConfig) -> Any:
    """Answer a question about a tiny model once for all checkpoints whose configs differ in sizes only."""
    key = f"{question.__name__} {sorted(tiny.to_dict().items(), key=str)}"
    if key not in _found:
        with _as_usual(), _silence(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _found[key] = question(TinyModel(copy.deepcopy(tiny)))
    return _found[key]


@contextmanager
def _as_usual() -> Iterator[None]:
    """Compute in float32 on the CPU, even where the caller runs on the meta device or in half precision."""
    plain = torch.get_default_device().type == "cpu"  # setting it again would slow every call
    device = nullcontext() if plain else torch.device("cpu")
    with _disable_current_modes(), device, torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


@contextmanager
def _silence() -> Iterator[None]:
    """Silence transformers, since its messages here are about tiny models that the user never asked for."""
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with without_reports():
            yield
    finally:
        if bar:
            transformers_logging.enable_progress_bar()


def _pilot_fails(trial: TinyModel) -> str | None:
    return _first_failure(PILOT_CHECKS, trial)


def _decoder_fails(trial: TinyModel) -> str | None:
    trial.attention = "eager"  # one order of summation under any mask, so that equal means equal to the bit
    return _first_failure(DECODER_CHECKS, trial)


def _first_failure(checks: Checks, trial: TinyModel) -> str | None:
    for what_fails, check in checks.items():
        try:
            with torch.set_grad_enabled(check is _gradients):
                check(trial)
        except Exception as error:  # the family's own code may raise anything when it is run like this
            return f"{what_fails} ({_reason(error)})"
    return None


def _reads_embedding(trial: TinyModel) -> bool:
    read_BTC = trial.model(input_ids=trial.ids_BT, output_hidden_states=True, use_cache=False).hidden_states[0]
    return torch.equal(read_BTC, trial.model.get_input_embeddings()(trial.ids_BT))


def _reads_positions(trial: TinyModel) -> bool:
    read_BTC = trial.model(input_ids=trial.ids_BT, output_hidden_states=True, use_cache=False).hidden_states[0]
    embedded_BTC = trial.model.get_input_embeddings()(trial.ids_BT)
    is_alike = read_BTC.shape == embedded_BTC.shape
    return not (is_alike and torch.cosine_similarity(read_BTC, embedded_BTC, dim=-1).min() > 1 - 1e-3)


def _reads_past_gap(trial: TinyModel) -> bool:
    ids_BT, mask_BT = trial.ids_BT, torch.ones_like(trial.ids_BT)
    mask_BT[:, 2:4] = 0
    positions_BT = mask_BT.cumsum(-1) - 1
    gapped = trial.model(input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions_BT, use_cache=False)
    whole = trial.model(input_ids=torch.cat([ids_BT[:, :2], ids_BT[:, 4:]], dim=1), use_cache=False)
    return torch.allclose(gapped.logits[:, 4:], whole.logits[:, 2:], **MOST_ALIKE)


def _built(trial: TinyModel) -> None:
    weights = sum(weight.numel() for weight in families.skeleton(trial.config).parameters())
    if weights > MOST_WEIGHTS:
        raise ValueError(f"its config gives sizes under other names: {weights:,} weights remain")
    if trial.config.is_encoder_decoder != families.has_encoder(trial.config.model_type):
        raise ValueError("transformers has no class of its own that reads and writes text with it")
    families.decoder_layers(trial.decoder)
    read, written = trial.model.get_input_embeddings().num_embeddings, len(trial.model.get_output_embeddings().weight)
    if read != written:
        raise ValueError(f"it reads {read} different tokens and writes {written}")


def _embedding(trial: TinyModel) -> None:
    _same(trial.decode(inputs_embeds=trial.inputs_BTC), trial.decode(input_ids=trial.ids_BT))


def _log_attention(trial: TinyModel) -> None:
    if trial.memory:  # the stock cross-attention
        log_BTC, open_B1TT = trial.memory["encoder_hidden_states"], torch.zeros_like(trial.mask_B1TT)
        found_BTC = trial.run(trial.body, log_BTC, open_B1TT=open_B1TT)
        _same(found_BTC, trial.decode(inputs_embeds=trial.inputs_BTC))
        return
    read: list[Tensor] = []

    def keep_first(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        read.append((*given, *named.values())[0])

    with ExitStack() as hooks:
        for layer in families.decoder_layers(trial.decoder):
            stock = families.self_attention(layer)[1]
            hooks.callback(stock.register_forward_pre_hook(keep_first, with_kwargs=True).remove)
        expected_BTC = trial.decode(inputs_embeds=trial.inputs_BTC)
    for index, log_BTC in enumerate(read):
        with trial.reading([index]) as body:
            _same(trial.run(body, log_BTC), expected_BTC)


def _head(trial: TinyModel) -> None:
    given = {"decoder_input_ids": trial.ids_BT} if trial.memory else {}
    out = trial.model(input_ids=trial.ids_BT, output_hidden_states=True, use_cache=False, **given)
    states = out.decoder_hidden_states if trial.memory else out.hidden_states
    layers = len(families.decoder_layers(trial.decoder))
    if len(states) != layers + 1:
        raise ValueError(f"{layers} layers give {len(states)} hidden states")
    if len({state.shape[-1] for state in states}) > 1:
        raise ValueError("its hidden states have different widths")
    _alike(families.logits_from_head_input(trial.model, states[-1]), out.logits)
    some_U = torch.tensor([5, 2])
    _alike(families.logits_from_head_input(trial.model, states[-1], some_U), out.logits[..., some_U])


def _steps(trial: TinyModel) -> None:
    places, log_BTC, mask_B1TT, steps = trial.positions_BT, trial.inputs_BTC.flip(1), trial.mask_B1TT, []
    with trial.reading(trial.every_second) as body:
        whole_BTC, cache = trial.run(body, log_BTC), families.new_cache(body)
        for at in range(trial.ids_BT.shape[1]):
            now, mask_B11K = slice(at, at + 1), mask_B1TT[:, :, at : at + 1, : at + 1]
            query = (trial.inputs_BTC[:, now], mask_B11K, places[:, now])
            steps.append(families.run_body(body, *query, log_BTC[:, now], mask_B11K, places[:, now], cache))
    _alike(torch.cat(steps, dim=1), whole_BTC)


def _padding(trial: TinyModel) -> None:
    mask_BT = torch.ones_like(trial.ids_BT)
    if trial.memory:
        mask_BT[0, 4:] = 0
        alone = {"input_ids": trial.ids_BT[:1, :4], "decoder_input_ids": trial.ids_BT[:1]}
        padded = trial.model(input_ids=trial.ids_BT, attention_mask=mask_BT, decoder_input_ids=trial.ids_BT)
        _alike(padded.logits[:1], trial.model(**alone).logits)
        return
    mask_BT[0, :3] = 0
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp_min(0)
    padded = trial.model(input_ids=trial.ids_BT, attention_mask=mask_BT, position_ids=positions_BT, use_cache=False)
    _alike(padded.logits[:1, 3:], trial.model(input_ids=trial.ids_BT[:1, 3:], use_cache=False).logits)


def _pilot_steps(trial: TinyModel) -> None:
    ids_BT, read, given, cache = trial.ids_BT, "input_ids", {}, DynamicCache()
    if trial.memory:
        read, cache = "decoder_input_ids", EncoderDecoderCache(DynamicCache(), DynamicCache())
        given = {"encoder_outputs": BaseModelOutput(last_hidden_state=trial.memory["encoder_hidden_states"])}
    whole = trial.model(**{"input_ids": ids_BT, read: ids_BT}, use_cache=False).logits
    steps = (slice(0, 4), *(slice(i, i + 1) for i in range(4, 7)))
    parts = [trial.model(**given, **{read: ids_BT[:, at]}, past_key_values=cache, use_cache=True) for at in steps]
    _alike(torch.cat([part.logits for part in parts], dim=1), whole)


def _saved(trial: TinyModel) -> None:
    with trial.reading(trial.every_second) as body, TemporaryDirectory() as folder:
        _Pair(PreTrainedConfig(), trial.model, body).save_pretrained(folder)
        copies = copy.deepcopy((trial.model, body))
        _, report = _Pair.from_pretrained(folder, *copies, output_loading_info=True)
    for found in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(report[found]):
            raise ValueError(f"{found.replace('_', ' ')}: {names[0]}")


class _Pair(PreTrainedModel):
    """Pilot and body in one checkpoint."""

    config_class = PreTrainedConfig
    base_model_prefix = "pilot"  # as in the fused model: transformers' renaming of weights depends on it

    def __init__(self, config: PreTrainedConfig, pilot: PreTrainedModel, body: nn.Module) -> None:
        super().__init__(config)
        self.pilot, self.body = pilot, body
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing, since both models have their weights."""

    def should_save_on_this_rank(self, is_main_process: bool) -> bool:
        """Save in every process, since each runs the check itself."""
        return True


def _gradients(trial: TinyModel) -> None:
    inputs_BTC, log_BTC = (trial.inputs_BTC.clone().requires_grad_() for _ in range(2))
    with trial.reading(trial.every_second) as body:
        trial.run(body.train(), log_BTC, inputs_BTC).square().mean().backward()
    for name, read in (("inputs", inputs_BTC), ("log", log_BTC)):
        if read.grad is None or not read.grad.isfinite().all() or not read.grad.abs().sum() > 0:
            raise ValueError(f"gradient of its {name} is {'missing' if read.grad is None else 'zero or not finite'}")
    if not all(one.grad.isfinite().all() for one in body.parameters() if one.grad is not None):
        raise ValueError("gradients of its weights are not finite")


PILOT_CHECKS: Checks = {
    "no tiny model of it can be built": _built,
    "its logits differ from what its head makes of the last hidden state": _head,
    "padding a prompt changes what is read of it": _padding,
    "continuing from a cache of keys and values differs from reading the whole text at once": _pilot_steps,
}
DECODER_CHECKS: Checks = {
    "its decoder gives other results for embedded tokens than for the tokens": _embedding,
    "log attention on a layer's own input differs from the family's own attention": _log_attention,
    "reading a growing log with a cache differs from reading it at once": _steps,
    "gradients are not finite, or do not flow from its decoder to what it reads": _gradients,
    "the weights of a Pilot and a Copilot's body that are saved together do not load again": _saved,
}
"""What a Copilot needs of its Pilot and of the decoder that it is built from; a check raises where this fails."""


def _same(found: Tensor, expected: Tensor) -> None:
    if not expected.isfinite().all():
        raise ValueError("the values that the family itself computes are not finite")
    if not torch.equal(found, expected):
        raise ValueError(f"they differ by up to {(found - expected).abs().max():.0e}")


def _alike(found: Tensor, expected: Tensor) -> None:
    if not torch.allclose(found, expected, **MOST_ALIKE):
        raise ValueError(f"they differ by up to {(found - expected).abs().max():.0e}")


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:157]}…"
