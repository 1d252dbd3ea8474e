"""Greedy decoding and sampling with caches of fixed shape and place, so that a step can be compiled to a CUDA graph.

The prompt is read as always. Then both models' keys and values move into caches with room for the whole answer, and
every further token is the same step: same shapes, same memory. The host waits for the device only now and then, to see
whether all rows have ended.

Shapes: B batch, T tokens of prompt and answer, M source length, N steps, K errors, P Pilot width, S rows of the log,
V vocabulary.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import Cache, EncoderDecoderCache, StaticLayer
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutput

from tcopilot.models.caches import BodyState, CopilotState, TCopilotCache, of_pilot
from tcopilot.models.fused_model import TCopilotModel
from tcopilot.models.log_attention import additive

BLOCK = 64
"""Compiled shapes are multiples of this, so that prompts of similar length share one compilation."""
PATIENCE = 8
"""Steps after which a GPU is asked whether all rows have ended."""
_ALL = "all layers"


class StaticState(CopilotState):
    """A Copilot's state in place: each step writes into the tensors that compiled code reads."""

    KEPT = ("target_B1", "pending_B1P", "feedback_BV")

    def __init__(self, state: CopilotState, answer: int, block: int) -> None:
        super().__init__(**self._held(state))

    def fill(self, state: CopilotState) -> None:
        """Take over the state that a prompt has left."""
        self.feedback = state.feedback
        for name in self.KEPT:
            getattr(self, name).copy_(getattr(state, name))

    def open_next(self) -> None:
        """Prepare the next step, outside compiled code."""

    def keep(self, states_B1P: Tensor, feedback_BV: Tensor) -> None:
        """Keep what the next step needs of this one, in place."""
        self.pending_B1P.copy_(states_B1P)
        self.feedback_BV.copy_(feedback_BV)

    def _held(self, state: CopilotState) -> dict[str, Tensor]:
        return {name: in_place(getattr(state, name).clone()) for name in self.KEPT}


class StaticBodyState(StaticState, BodyState):
    """The in-place state of a Copilot with decoder layers: masks cover all rows to come, and each step opens one."""

    KEPT = (*StaticState.KEPT, "position_B1")

    def __init__(self, state: BodyState, answer: int, block: int) -> None:
        mask_B11S, errors = state.log_mask_B11S, state.cache.get_seq_length()
        log_mask_B11S = mask_B11S.new_empty(len(mask_B11S), 1, 1, rounded(state.rows + answer, block))
        cache = static_cache(state.cache, answer, answer, block)
        log_mask = {"log_mask_B11S": in_place(log_mask_B11S), "rows": 0, "next_mask": 0.0}
        BodyState.__init__(self, cache=cache, **log_mask, **self._held(state))
        self.errors = 0
        self.self_mask_111K = in_place(mask_B11S.new_empty(1, 1, 1, rounded(errors + answer, block)))

    def fill(self, state: BodyState) -> None:
        """Take over the state that a prompt has left."""
        fill_cache(self.cache, state.cache)
        self.rows, self.errors, self.next_mask = state.rows, state.cache.get_seq_length(), state.next_mask
        closed = torch.finfo(self.log_mask_B11S.dtype).min
        self.log_mask_B11S.fill_(closed)[..., : self.rows] = state.log_mask_B11S[..., : self.rows]
        self.self_mask_111K.fill_(closed)[..., : self.errors] = 0
        super().fill(state)

    def open_next(self) -> None:
        """Open the masks for the next step's error and row of the log."""
        self.self_mask_111K[..., self.errors] = 0
        self.log_mask_B11S[..., self.rows] = self.next_mask
        self.errors, self.rows = self.errors + 1, self.rows + 1

    def grow(self) -> tuple[Tensor, Tensor]:
        """Return the additive masks over all columns; `open_next` has already opened this step's column."""
        return self.self_mask_111K, self.log_mask_B11S


class StaticDecoder:
    """Both models' caches at their full size, and the step that runs on them; the model itself is not kept.

    `cache`, filled by a prompt, gives shapes and types; `answer` is the longest answer, in tokens; `compiler` holds
    the arguments of `torch.compile` for the step, and None leaves the step uncompiled.
    """

    def __init__(
        self, model: TCopilotModel, cache: Cache, source_mask_BM: Tensor, answer: int, compiler: dict[str, Any] | None
    ) -> None:
        block, state, rows = _block(compiler), _state(cache), len(source_mask_BM)
        self.key = self.key_of(cache, answer, compiler)
        self.cache: Cache = static_cache(of_pilot(cache), answer, 0, block)
        if state is not None:
            self.cache = TCopilotCache(self.cache)
            kind = StaticBodyState if isinstance(state, BodyState) else StaticState
            self.cache.copilot = kind(state, answer, block)
        self.weights_B = in_place(torch.zeros(rows, device=model.device))
        self.encoder: dict[str, Any] = {}
        if model.config.is_encoder_decoder:  # transformers asks for it again: a stand-in will do
            columns = rounded(source_mask_BM.shape[1], block)
            mask_B11M = self.weights_B.new_empty(rows, 1, 1, columns, dtype=model.dtype)
            output_B1P = in_place(mask_B11M.new_zeros(rows, 1, model.config.pilot.hidden_size))
            output = BaseModelOutput(last_hidden_state=output_B1P)
            self.encoder = {"attention_mask": in_place(mask_B11M), "encoder_outputs": output}
        self._step = _step if compiler is None else torch.compile(_with_own_code(_step), **compiler)

    @staticmethod
    def key_of(cache: Cache, answer: int, compiler: dict[str, Any] | None) -> tuple:
        """Return a key that is equal for calls that one decoder can serve."""
        state, block = _state(cache), _block(compiler)
        copilot = static_sizes(state.cache, answer, answer, block) if isinstance(state, BodyState) else type(state)
        return str(compiler), copilot, static_sizes(of_pilot(cache), answer, 0, block)

    def fill(self, model: TCopilotModel, cache: Cache, source_mask_BM: Tensor, answer: int, weights_B: Tensor | None):
        """Copy in the cache that a prompt has filled, and make the masks and positions of the whole answer."""
        fill_cache(of_pilot(self.cache), of_pilot(cache))
        if (state := _state(cache)) is not None:
            _state(self.cache).fill(state)
        self.weights_B.copy_(torch.full_like(self.weights_B, model.weight) if weights_B is None else weights_B)
        if self.encoder:
            mask_B11M = additive(source_mask_BM[:, None], model.dtype)
            closed = torch.finfo(model.dtype).min
            self.encoder["attention_mask"].fill_(closed)[..., : mask_B11M.shape[-1]] = mask_B11M
        self._masks, self._positions_BN = self._schedule(model, source_mask_BM, answer)
        self._taken = 0

    def __call__(self, model: TCopilotModel, token_B1: Tensor) -> Tensor:
        """Run the step that follows a token; returns what the next one is chosen from, [B, V] in float32."""
        at = slice(self._taken, self._taken + 1)
        self._taken += 1
        if (state := _state(self.cache)) is not None:
            state.open_next()
        # Contiguous, so that strides do not tell compiled code how long the answer may be.
        masks = {name: mask_B1NT[:, :, at].contiguous() for name, mask_B1NT in self._masks.items()}
        position_B1 = self._positions_BN[:, at].contiguous()
        torch.compiler.cudagraph_mark_step_begin()
        return self._step(model, self.cache, self.encoder, token_B1, position_B1, masks, self.weights_B)

    def _schedule(self, model: TCopilotModel, source_mask_BM: Tensor, answer: int) -> tuple[dict[str, Tensor], Tensor]:
        """The Pilot's masks [B, 1, N, T] by kind of layer, and the positions [B, N] of the answer's tokens."""
        pilot, rows = of_pilot(self.cache), len(source_mask_BM)
        mask_BT, cache = None, getattr(pilot, "self_attention_cache", pilot)
        if not self.encoder:
            later = cache.get_max_length() - source_mask_BM.shape[1]
            mask_BT = torch.cat([source_mask_BM, source_mask_BM.new_ones(rows, later)], dim=1)
        read_BN0 = self.weights_B.new_empty(rows, answer, 0, dtype=model.dtype)
        masks = create_masks_for_generate(model.pilot.get_decoder().config, read_BN0, mask_BT, cache)
        positions_BN = source_mask_BM.sum(-1, keepdim=True) + torch.arange(answer, device=source_mask_BM.device)
        return masks if isinstance(masks, dict) else {_ALL: masks}, positions_BN


def _step(model, cache, encoder, token_B1, position_B1, masks, weights_B) -> Tensor:
    """One step of both models, of fixed shapes: what is compiled."""
    mask = masks.get(_ALL, masks)
    if encoder:
        given = {"decoder_input_ids": token_B1, "decoder_attention_mask": mask, **encoder}
    else:
        given = {"input_ids": token_B1, "attention_mask": mask, "position_ids": position_B1}
    return model.next_logits(given, token_B1, cache, weights_B)[:, -1]


def sample(
    model: TCopilotModel, input_ids: Tensor, logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList, generation_config: GenerationConfig, **model_kwargs: Any,
) -> Any:  # fmt: skip
    """Decode with static caches in place of transformers' `_sample`; returns no hidden states and no caches."""
    rows, prompt = input_ids.shape
    length = stopping_criteria.max_length
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    logits_BV, cache = outputs.logits[:, -1].float(), outputs.past_key_values
    decoder = _ready_decoder(model, cache, length - prompt, generation_config, model_kwargs)
    del outputs, cache
    tokens_BT = torch.cat([input_ids, input_ids.new_zeros(rows, length - prompt)], dim=1)
    can_end = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    open_B, written = input_ids.new_ones(rows), input_ids.new_zeros(())
    kept: dict[str, list[Tensor]] = {"scores": [], "logits": []}
    for at in range(prompt, length):
        scores_BV = logits_processor(tokens_BT[:, :at], logits_BV)
        for name, values_BV in (("scores", scores_BV), ("logits", logits_BV)):
            if getattr(generation_config, f"output_{name}"):
                kept[name].append(values_BV.clone())
        sampled = generation_config.do_sample
        token_B = torch.multinomial(scores_BV.softmax(-1), 1)[:, 0] if sampled else scores_BV.argmax(-1)
        if can_end:
            token_B = torch.where(open_B > 0, token_B, generation_config._pad_token_tensor)
        tokens_BT[:, at] = token_B
        written += open_B.max()
        open_B = open_B & ~stopping_criteria(tokens_BT[:, : at + 1], None)
        if at + 1 == length or ((at + 1 - prompt) % _patience(input_ids) == 0 and not open_B.any()):
            break
        logits_BV = decoder(model, tokens_BT[:, at : at + 1].clone())
    found = {"sequences": tokens_BT[:, : prompt + written]}
    if not generation_config.return_dict_in_generate:
        return found["sequences"]
    found |= {name: tuple(values[: int(written)]) or None for name, values in kept.items()}
    return (GenerateEncoderDecoderOutput if model.config.is_encoder_decoder else GenerateDecoderOnlyOutput)(**found)


def _patience(tokens: Tensor) -> int:
    return 1 if tokens.device.type == "cpu" else PATIENCE


def _ready_decoder(model, cache: Cache, answer: int, config: GenerationConfig, model_kwargs) -> StaticDecoder:
    """The model's decoder with these caches moved in; the previous call's decoder is reused if its sizes fit."""
    mask_BM = model_kwargs.get("attention_mask")
    if mask_BM is None:  # generate drops a mask of ones
        encoded = model.config.is_encoder_decoder
        read = model_kwargs["encoder_outputs"][0] if encoded else of_pilot(cache).layers[0].keys[:, 0]
        mask_BM = read.new_ones(read.shape[:2])
    compiler = None  # transformers has two settings for it
    if not config.disable_compile:
        compiler = (config.compile_config or CompileConfig(fullgraph=True, dynamic=False)).to_dict()
    decoder = model.static_decoder
    if decoder is None or decoder.key != StaticDecoder.key_of(cache, answer, compiler):
        decoder = model.static_decoder = StaticDecoder(model, cache, mask_BM, answer, compiler)
    decoder.fill(model, cache, mask_BM.bool(), answer, model_kwargs.get("weights_B"))
    return decoder


def _with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """Copy a function, for torch limits how often it compiles one piece of code, and each decoder compiles its own."""
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


def _block(compiler: dict[str, Any] | None) -> int:
    return 1 if compiler is None else BLOCK


def _state(cache: Cache) -> CopilotState | None:
    return cache.copilot if isinstance(cache, TCopilotCache) else None


def static_cache(cache: Cache, room: int, memory_room: int, block: int) -> Cache:
    """An empty cache of fixed size and place for what a filled one holds and for what is to come.

    Sliding windows must not have dropped anything. There is `room` for more columns in the self-attention
    (in a decoder-only Copilot also rows of the log) and `memory_room` in the cross-attention, in multiples of a block.
    """
    if isinstance(cache, EncoderDecoderCache):
        parts = (cache.self_attention_cache, room), (cache.cross_attention_cache, memory_room)
        return EncoderDecoderCache(*(static_cache(part, columns, 0, block) for part, columns in parts))
    static = Cache([StaticLayer(rounded(layer.get_seq_length() + room, block)) for layer in cache.layers])
    for place, layer in zip(static.layers, cache.layers, strict=True):
        place.lazy_initialization(layer.keys, layer.values)
    return static


def static_sizes(cache: Cache, room: int, memory_room: int, block: int) -> list[tuple]:
    """Sizes and types of what `static_cache` makes."""
    if isinstance(cache, EncoderDecoderCache):
        sizes = static_sizes(cache.self_attention_cache, room, 0, block)
        return sizes + static_sizes(cache.cross_attention_cache, memory_room, 0, block)
    held = [(rounded(layer.get_seq_length() + room, block), layer.keys) for layer in cache.layers]
    return [(size, keys.shape[:2], keys.shape[-1], keys.dtype, keys.device) for size, keys in held]


def fill_cache(static: Cache, cache: Cache) -> None:
    """Move keys and values into a cache of `static_cache`."""
    if isinstance(cache, EncoderDecoderCache):
        fill_cache(static.self_attention_cache, cache.self_attention_cache)
        fill_cache(static.cross_attention_cache, cache.cross_attention_cache)
        static.is_updated = dict.fromkeys(range(len(cache.cross_attention_cache.layers)), True)
        return
    for place, layer in zip(static.layers, cache.layers, strict=True):
        seen = layer.get_seq_length()
        for held, given in ((place.keys, layer.keys), (place.values, layer.values)):
            held[:, :, :seen] = given
            held[:, :, seen:] = 0  # masks hide these columns, but a NaN left by an earlier call would come through
        place.cumulative_length.fill_(seen)


def rounded(size: int, block: int) -> int:
    """The smallest multiple of a block that holds a size.

    >>> rounded(65, 64), rounded(64, 64), rounded(5, 1)
    (128, 64, 5)
    """
    return -(-size // block) * block


def in_place(tensor: Tensor) -> Tensor:
    """Tell compiled code that a tensor stays where it is, so that a CUDA graph may read and write it there."""
    torch._dynamo.mark_static_address(tensor)
    return tensor
