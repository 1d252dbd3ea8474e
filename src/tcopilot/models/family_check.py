"""Which model families are supported: those that pass a check on a tiny random model of the family.

A Copilot relies on a few things of a family, and each is tried here. No list of names decides, so a family whose code
changes with transformers cannot go wrong in silence. `docs/families.md` shows what the check says of every family.

Shapes: B batch, M prompt length, N target length, T = M + N, C width, V vocabulary.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from tcopilot.models import families
from tcopilot.models.families import UnsupportedFamilyError
from tcopilot.models.log_attention import additive, causal_mask

DEEPEST = 6
"""Layers of the tiny model, enough for every kind that families take turns with."""
SIZES = {
    "hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "vocab_size": 48, "intermediate_size": 32,
    "max_position_embeddings": 64, "d_kv": 16, "d_ff": 32, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "ffn_dim": 32, "ffn_hidden_size": 32,
    "word_embed_proj_dim": 64, "rotary_dim": 8, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "qk_head_dim": 32,
    "v_head_dim": 16, "sliding_window": 64, "query_pre_attn_scalar": 16,
}  # fmt: skip
"""Sizes of the tiny model, by the names that configs give them."""
LIMITS = {
    "num_key_value_heads": 2, "num_layers": 2, "encoder_layers": 2, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
}  # fmt: skip
"""Numbers that it has at most."""
MOST_ALIKE = {"atol": 1e-3, "rtol": 1e-3}
_found: dict[str, Any] = {}


@dataclass
class _Trial:
    """A tiny random model of a family in evaluation, and what is run through it."""

    config: PreTrainedConfig

    @cached_property
    def model(self) -> PreTrainedModel:
        auto = AutoModelForSeq2SeqLM if families.has_encoder(self.config.model_type) else AutoModelForCausalLM
        model = auto.from_config(self.config, dtype=torch.float32, attn_implementation="eager").eval()
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        return model

    @property
    def decoder(self) -> nn.Module:
        return self.model.get_decoder()

    @cached_property
    def ids_BT(self) -> Tensor:
        return torch.randint(3, 48, (2, 7))

    @cached_property
    def inputs_BTC(self) -> Tensor:
        return families.input_embeddings(self.model)[self.ids_BT]

    @property
    def positions_BT(self) -> Tensor:
        return torch.arange(self.ids_BT.shape[1]).expand_as(self.ids_BT)

    @property
    def mask_B1TT(self) -> Tensor:
        mask_1TT = causal_mask(self.ids_BT.shape[1], self.ids_BT.device)
        return additive(mask_1TT.expand(len(self.ids_BT), -1, -1), torch.float32)

    @cached_property
    def memory(self) -> dict[str, Tensor]:
        """What the decoder reads beside its inputs: nothing, or the output of its encoder."""
        if not families.has_encoder(self.config.model_type):
            return {}
        return {"encoder_hidden_states": self.model.get_encoder()(input_ids=self.ids_BT).last_hidden_state}

    def decode(self, **inputs: Any) -> Tensor:
        """The stock decoder's last hidden state, under its own masks."""
        return self.decoder(**inputs, **self.memory, use_cache=False).last_hidden_state

    @cached_property
    def body(self) -> nn.Module:
        """The body of a Copilot that starts from the model, as a saved config gives it; without log attention."""
        config = families.decoder_config(self.model.config)
        values = {**config.to_dict(), "model_type": config.model_type}
        body = families.build_body(families.body_config_from_dict(values)).eval()
        body.set_attn_implementation("eager")
        families.load_decoder_weights(body, self.model)
        return body

    @contextmanager
    def reading(self, layers: Iterable[int]) -> Iterator[nn.Module]:
        """The body while these layers read a log, whose rows are behind a layer's input norm already."""
        stock = {}
        for index in () if self.memory else layers:
            layer = families.decoder_layers(self.body)[index]
            stock[index] = families.self_attention(layer)
            families.install_log_attention(self.body, [index])
            families.self_attention(layer)[1].norm = None
        yield self.body
        for index, (name, attention) in stock.items():
            setattr(families.decoder_layers(self.body)[index], name, attention)

    @property
    def every_second(self) -> Iterable[int]:
        """Layers that read the log in the paper's first pattern."""
        return range(1, len(families.decoder_layers(self.decoder)), 2)


def check_family(config: PreTrainedConfig) -> None:
    """Raise an `UnsupportedFamilyError` that names the failed check if a Copilot cannot work with this family.

    No weights are loaded. What is found is kept for as long as the process runs.
    """
    if (found := failed_check(config)) is not None:
        raise UnsupportedFamilyError(f"model type {config.model_type!r} is not supported: {found}")


def failed_check(config: PreTrainedConfig) -> str | None:
    """Say in a sentence what fails on a tiny model of a config; None if everything holds."""
    try:
        return _found_out(_first_failure, tiny_config(config))
    except Exception as error:  # a config may have any shape
        return f"no tiny model of it can be described ({_reason(error)})"


def embeds_tokens_alone(config: PreTrainedConfig) -> bool:
    """Whether the first layer of a decoder-only Pilot reads the input embedding of its tokens and nothing else.

    GPT-2 adds learned positions, Granite a factor: their X̃ cannot be rebuilt from the prompt's ids by the embedding.
    """
    return _found_out(_reads_embedding, tiny_config(config))


def _found_out(question: Callable[[_Trial], Any], tiny: PreTrainedConfig) -> Any:
    """The answer for a tiny model, which is the same for all checkpoints whose configs differ in sizes only."""
    key = f"{question.__name__} {sorted(tiny.to_dict().items(), key=str)}"
    if key not in _found:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
            torch.manual_seed(0)
            _found[key] = question(_Trial(tiny))
    return _found[key]


def _first_failure(trial: _Trial) -> str | None:
    for what_fails, check in CHECKS.items():
        try:
            with torch.set_grad_enabled(check is _gradients):
                check(trial)
        except Exception as error:  # the family's own code may raise anything when it is run like this
            return f"{what_fails} ({_reason(error)})"
    return None


def _reads_embedding(trial: _Trial) -> bool:
    read_BTC = trial.model(input_ids=trial.ids_BT, output_hidden_states=True, use_cache=False).hidden_states[0]
    return torch.equal(read_BTC, trial.model.get_input_embeddings()(trial.ids_BT))


def tiny_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A config of the same family with all its switches, and sizes for a model of a few thousand weights."""
    tiny = copy.deepcopy(config)
    families.cut_depth(tiny, min(families.decoder_depth(tiny), DEEPEST))
    limits = dict(LIMITS)
    if getattr(config, "num_key_value_heads", None) == getattr(config, "num_attention_heads", None):
        limits["num_key_value_heads"] = SIZES["num_attention_heads"]
    for name in SIZES.keys() | limits.keys():
        value = getattr(tiny, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            setattr(tiny, name, SIZES[name] if name in SIZES else min(value, limits[name]))
    for name, value in list(vars(tiny).items()):
        if name.endswith("_token_id") and value is not None:
            setattr(tiny, name, {"pad_token_id": 0, "decoder_start_token_id": 0}.get(name, 1))
        if "dropout" in name and isinstance(value, float):
            setattr(tiny, name, 0.0)
    return tiny


def _built(trial: _Trial) -> None:
    if trial.config.is_encoder_decoder != families.has_encoder(trial.config.model_type):
        raise ValueError("transformers reads and writes text with it in no class of its own")
    if not trial.memory:
        for layer in families.decoder_layers(trial.decoder):
            families.self_attention(layer)


def _embedding(trial: _Trial) -> None:
    _same(trial.decode(inputs_embeds=trial.inputs_BTC), trial.decode(input_ids=trial.ids_BT))


def _log_attention(trial: _Trial) -> None:
    if trial.memory:
        log_BTC, open_B1TT = trial.memory["encoder_hidden_states"], torch.zeros_like(trial.mask_B1TT)
        found_BTC = _run(trial, trial.body, log_BTC, open_B1TT=open_B1TT)
        _same(found_BTC, trial.decode(inputs_embeds=trial.inputs_BTC))
        return
    read: list[Tensor] = []
    with ExitStack() as hooks:
        for layer in families.decoder_layers(trial.decoder):
            stock, keep = families.self_attention(layer)[1], partial(_keep_first, read)
            hooks.callback(stock.register_forward_pre_hook(keep, with_kwargs=True).remove)
        expected_BTC = trial.decode(inputs_embeds=trial.inputs_BTC)
    for index, log_BTC in enumerate(read):
        with trial.reading([index]) as body:
            _same(_run(trial, body, log_BTC), expected_BTC)


def _keep_first(into: list[Tensor], module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
    into.append((*given, *named.values())[0])


def _head(trial: _Trial) -> None:
    given = {"decoder_input_ids": trial.ids_BT} if trial.memory else {}
    out = trial.model(input_ids=trial.ids_BT, output_hidden_states=True, use_cache=False, **given)
    states = out.decoder_hidden_states if trial.memory else out.hidden_states
    layers = len(families.decoder_layers(trial.decoder))
    if len(states) != layers + 1:
        raise ValueError(f"{layers} layers give {len(states)} hidden states")
    _alike(families.logits_from_head_input(trial.model, states[-1]), out.logits)
    some_U = torch.tensor([5, 2])
    _alike(families.logits_from_head_input(trial.model, states[-1], some_U), out.logits[..., some_U])


def _steps(trial: _Trial) -> None:
    places, log_BTC, mask_B1TT, steps = trial.positions_BT, trial.inputs_BTC.flip(1), trial.mask_B1TT, []
    with trial.reading(trial.every_second) as body:
        whole_BTC, cache = _run(trial, body, log_BTC), families.new_cache(body)
        for at in range(trial.ids_BT.shape[1]):
            now, mask_B11K = slice(at, at + 1), mask_B1TT[:, :, at : at + 1, : at + 1]
            query = (trial.inputs_BTC[:, now], mask_B11K, places[:, now])
            steps.append(families.run_body(body, *query, log_BTC[:, now], mask_B11K, places[:, now], cache))
    _alike(torch.cat(steps, dim=1), whole_BTC)


def _padding(trial: _Trial) -> None:
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


def _pilot_steps(trial: _Trial) -> None:
    ids_BT, first = trial.ids_BT, slice(0, 4)
    if trial.memory:
        whole = trial.model(input_ids=ids_BT, decoder_input_ids=ids_BT, use_cache=False).logits
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        shared = {"input_ids": ids_BT, "past_key_values": cache, "use_cache": True}
        parts = [trial.model(decoder_input_ids=ids_BT[:, first], **shared).logits]
        parts += [trial.model(decoder_input_ids=ids_BT[:, i : i + 1], **shared).logits for i in range(4, 7)]
    else:
        whole = trial.model(input_ids=ids_BT, use_cache=False).logits
        shared = {"past_key_values": DynamicCache(), "use_cache": True}
        parts = [trial.model(input_ids=ids_BT[:, first], **shared).logits]
        parts += [trial.model(input_ids=ids_BT[:, i : i + 1], **shared).logits for i in range(4, 7)]
    _alike(torch.cat(parts, dim=1), whole)


def _gradients(trial: _Trial) -> None:
    inputs_BTC, log_BTC = (trial.inputs_BTC.clone().requires_grad_() for _ in range(2))
    with trial.reading(trial.every_second) as body:
        _run(trial, body.train(), log_BTC, inputs_BTC).square().mean().backward()
    for name, read in (("inputs", inputs_BTC), ("log", log_BTC)):
        if read.grad is None or not read.grad.isfinite().all() or not read.grad.abs().sum() > 0:
            raise ValueError(f"that of its {name} is {'missing' if read.grad is None else 'zero or not finite'}")
    if not all(one.grad.isfinite().all() for one in body.parameters() if one.grad is not None):
        raise ValueError("those of its weights are not finite")


CHECKS: dict[str, Callable[[_Trial], None]] = {
    "it is not built of layers with an attention each, or no tiny model of it can be built": _built,
    "its decoder does not read embedded tokens as it reads tokens": _embedding,
    "log attention on a layer's own input is not the family's own attention": _log_attention,
    "its logits are not what its head makes of the last of its hidden states": _head,
    "reading a log that grows, with a cache, is not reading it at once": _steps,
    "a padded prompt is not read as it is read alone": _padding,
    "the Pilot itself does not go on from a cache of keys and values as it reads a whole text": _pilot_steps,
    "gradients do not flow from its decoder to what it reads, or are not finite": _gradients,
}
"""What a Copilot relies on: each check raises where it may not, for which its key is the sentence."""


def _run(
    trial: _Trial, body: nn.Module, log_BTC: Tensor, inputs_BTC: Tensor | None = None, open_B1TT: Tensor | None = None
) -> Tensor:
    """The body on the trial's inputs, with as many rows of a log as there are inputs."""
    inputs_BTC = trial.inputs_BTC if inputs_BTC is None else inputs_BTC
    log = (log_BTC, trial.mask_B1TT if open_B1TT is None else open_B1TT, trial.positions_BT)
    return families.run_body(body, inputs_BTC, trial.mask_B1TT, trial.positions_BT, *log, cache=None)


def _same(found: Tensor, expected: Tensor) -> None:
    if not expected.isfinite().all():
        raise ValueError("values of the family's own are not finite")
    if not torch.equal(found, expected):
        raise ValueError(f"they differ by up to {(found - expected).abs().max():.0e}")


def _alike(found: Tensor, expected: Tensor) -> None:
    if not torch.allclose(found, expected, **MOST_ALIKE):
        raise ValueError(f"they differ by up to {(found - expected).abs().max():.0e}")


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:157]}…"
