"""The Copilot: the Pilot family's own decoder, reading the Mistake Log and estimating the Pilot's token errors.

Shapes: B batch, M source length, N target length, K past targets, P Pilot width, C Copilot width, V vocabulary,
S rows of the log (null row, X̃, h̄).
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tcopilot.functional import POOLINGS, shift_right
from tcopilot.models import families
from tcopilot.models.base_copilot import BaseConfig, BaseCopilot
from tcopilot.models.caches import BodyState
from tcopilot.models.error_input import project_errors
from tcopilot.models.family_check import check_family
from tcopilot.models.heads import HEADS
from tcopilot.models.log_attention import CONTEXTS, additive, causal_mask, log_mask, log_positions
from tcopilot.models.states import StatePooler
from tcopilot.settings import ANY, FLAG, Rule, is_number, list_of, one_of, require

PATTERNS = {1: ("even", "all"), 2: ("every", "all"), 3: ("even", "first_half"), 4: ("even", "second_half")}
"""The paper's insertion patterns (Section F.4): which decoder-only layers, counted from 1, become log attention, and
over which of the Pilot's layers h is pooled. In an encoder-decoder, 1 equals 2."""
POSITIONS = ("pilot", "none")
READS = ("errors", "source", "states")
"""What a Copilot reads: ℓ_{<i}, X̃ and h̄. The paper's reads all; leaving one out is an ablation."""


@dataclass(kw_only=True)
class CopilotConfig(BaseConfig):
    """Defines a Copilot with decoder layers, the paper's.

    Attributes:
        body: config of the family's decoder, as a dictionary.
        pattern: insertion pattern of the paper, see `PATTERNS`.
        pooling: how h is pooled over the Pilot's layers.
        context: `strict` (target i reads h_{<i}, the paper's) or `inclusive` (h_{≤i}).
        positions: `none` (the paper's) or `pilot` (the Pilot's own positions). None is resolved to `pilot` for a
            decoder-only body and to `none` for one of an encoder-decoder, whose X̃ carries the order already.
        tied: the soft head reads the error input's matrix as its unembedding.
        reads: which of `READS` it is shown; what is left out is hidden in training and decoding alike.
    """

    kind: ClassVar[str] = "decoder"
    SETTINGS: ClassVar = {
        "head": one_of(HEADS),
        "pattern": one_of(PATTERNS),
        "pooling": one_of(POOLINGS),
        "context": one_of(CONTEXTS),
        "positions": one_of(POSITIONS).or_null(),
        "reads": list_of(READS),
    }

    body: dict[str, Any]
    head: str = "linear"
    pattern: int = 1
    pooling: str = "mean"
    context: str = "strict"
    positions: str | None = None
    tied: bool = False
    reads: list[str] = field(default_factory=lambda: list(READS))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions is None:
            self.positions = "none" if families.has_encoder(self.body["model_type"]) else "pilot"

    @property
    def pooler(self) -> StatePooler:
        """How the Pilot's states are pooled for this Copilot."""
        return StatePooler(self.pooling, PATTERNS[self.pattern][1])


class Copilot(BaseCopilot):
    """Reads (ℓ_{<i}, X̃, h) and estimates ℓ_i (Section 3.1). A new Copilot outputs 0: the fused model is the Pilot."""

    config_class = CopilotConfig
    SETTINGS: ClassVar = {
        "layers": ANY,
        "error_input": one_of(("embedding", "normal")),
        "train_error_input": FLAG,
        "dropout": Rule(
            lambda value: value is None or (is_number(value) and 0 <= value < 1),
            "give a number in [0, 1), or null for the checkpoint's own",
        ),
    }

    def __init__(self, config: CopilotConfig) -> None:
        super().__init__(config)
        self.pooler, self.reads_errors = config.pooler, "errors" in config.reads
        body_config = families.body_config_from_dict(config.body)
        self.body = families.build_body(body_config)
        width, vocab = body_config.hidden_size, config.vocab_size
        if not families.is_cross_attending(self.body):
            families.install_log_attention(self.body, self._log_layers())
        if config.positions == "none":
            families.remove_positions(self.body)
        self.error_in = nn.Parameter(torch.randn(vocab, width))
        self.start = nn.Parameter(torch.zeros(width))
        self.null = nn.Parameter(torch.zeros(width))
        self.source_in = _LogInput(config.pilot_width, width)
        self.states_in = _LogInput(config.pilot_width, width)
        self.head = HEADS[config.head](width, vocab)
        if config.head == "soft" and not config.tied:
            self.unembedding = nn.Parameter(torch.zeros(vocab, width), requires_grad=False)

    @classmethod
    def from_pilot(
        cls, pilot: PreTrainedModel, layers: int | None = None, donor: PreTrainedModel | None = None,
        error_input: str = "embedding", train_error_input: bool = True, tokens: int | None = None,
        dropout: float | None = None, **options: Any,
    ) -> "Copilot":  # fmt: skip
        """Build a Copilot for a Pilot, before adapters are injected, from the decoder of a donor of the same family.

        Args:
            pilot: the Pilot.
            layers: depth; the donor's first layers are copied. Default: all of them.
            donor: a model with the same vocabulary, of any width (the paper's small Copilots). Default: the Pilot.
            error_input: start of the map that reads ℓ: `embedding` (Eᵀℓ) or `normal` (N(0, 1)).
            train_error_input: whether that map is trained. Keep it frozen with LoRA.
            tokens: size of the tokenizer that both share. Needed where their matrices differ in padding rows, as
                those of Qwen2.5-7B (152,064) and Qwen2.5-0.5B (151,936) do; the Copilot takes the Pilot's rows.
            dropout: rate of the body in training; None keeps the donor's.
            **options: fields of `CopilotConfig`.
        """
        donor = pilot if donor is None else donor
        check_family(donor.config)
        vocab, donor_vocab = (m.get_input_embeddings().num_embeddings for m in (pilot, donor))
        same = vocab == donor_vocab or (tokens is not None and tokens <= min(vocab, donor_vocab))
        if not same or donor.config.model_type != pilot.config.model_type:
            raise ValueError(
                f"Pilot ({pilot.config.model_type}, {vocab} tokens) and Copilot ({donor.config.model_type}, "
                f"{donor_vocab} tokens) must be of one family and share the vocabulary; choose another copilot.path"
            )
        given = {"error_input": error_input, "train_error_input": train_error_input, "dropout": dropout}
        require(cls.SETTINGS, given, "copilot")
        body_config = families.decoder_config(donor.config, layers)
        if dropout is not None:
            families.set_dropout(body_config, dropout)
        matrices = (families.input_embeddings(donor), donor.get_output_embeddings().weight)
        embeddings_VC, output_VC = (  # cut padding rows off, or add rows of zeros
            nn.functional.pad(matrix.detach()[:vocab], (0, 0, 0, max(0, vocab - len(matrix)))) for matrix in matrices
        )
        frozen = error_input == "embedding" and not train_error_input
        config = CopilotConfig(
            body={**body_config.to_dict(), "model_type": body_config.model_type},
            pilot_width=pilot.config.hidden_size,
            vocab_size=vocab,
            tied=frozen and torch.equal(embeddings_VC, output_VC),
            **options,
        )
        copilot = cls(config)
        families.load_decoder_weights(copilot.body, donor)
        with torch.no_grad():
            if error_input == "embedding":
                copilot.error_in.copy_(embeddings_VC)
            # A start at 0 would send a huge gradient through the first norm, and clipping would stall the rest.
            copilot.start.normal_(std=copilot.error_in.std().item())
            if families.is_cross_attending(copilot.body):
                for rows in (copilot.source_in, copilot.states_in):
                    rows.norm.weight.fill_(families.memory_scale(donor))
            if hasattr(copilot, "unembedding"):
                copilot.unembedding.copy_(output_VC)
        copilot.error_in.requires_grad_(train_error_input and "errors" in config.reads)
        return copilot

    def inputs(self, past_errors_BKV: Tensor) -> Tensor:
        """Embed past errors as Eᵀℓ and shift them right: the inputs [B, K + 1, C] of targets 0 … K."""
        if not self.reads_errors:
            return self.start.expand(past_errors_BKV.shape[0], past_errors_BKV.shape[1] + 1, -1)
        return shift_right(past_errors_BKV.to(self.error_in.dtype) @ self.error_in, self.start)

    def taught_inputs(self, probs_BNV: Tensor, targets_BN: Tensor) -> Tensor:
        """Embed ℓ_{<i} chunk by chunk."""
        if not self.reads_errors:
            return super().taught_inputs(probs_BNV, targets_BN)
        return shift_right(project_errors(probs_BNV[:, :-1], targets_BN[:, :-1], self.error_in), self.start)

    def forward(
        self, inputs_BNC: Tensor, source_BMP: Tensor, source_mask_BM: Tensor, states_BNP: Tensor, keep: bool = False
    ) -> tuple[Tensor, BodyState | None]:
        """Run all N targets at once, from their `inputs` and the log: X̃ of the prompt and h̄ of the targets.

        Returns hidden states [B, N, C] for `correct`, and the state from which `step` goes on (None unless `keep`).
        """
        targets = inputs_BNC.shape[1]
        readable = states_BNP[:, :-1] if self.is_strict else states_BNP
        null_B1C = self.null.to(inputs_BNC.dtype).expand(inputs_BNC.shape[0], 1, -1)
        log_BSC = torch.cat([null_B1C, self.source_in(source_BMP), self.states_in(readable)], dim=1)
        rows = log_BSC.shape[1]
        log_at_BS, targets_at_BN = log_positions(source_mask_BM, targets)
        visible_BNS = log_mask(source_mask_BM, targets, self.config.context)[..., :rows]
        first_state = 1 + source_mask_BM.shape[1]
        for name, hidden in (("source", slice(1, first_state)), ("states", slice(first_state, None))):
            if name not in self.config.reads:
                visible_BNS[..., hidden] = False
        cache = families.new_cache(self.body) if keep else None
        past_B1NN = additive(causal_mask(targets, inputs_BNC.device), inputs_BNC.dtype)
        log = (log_BSC, additive(visible_BNS, inputs_BNC.dtype), self._positions(log_at_BS[:, :rows]))
        hidden_BNC = families.run_body(self.body, inputs_BNC, past_B1NN, self._positions(targets_at_BN), *log, cache)
        if not keep:
            return hidden_BNC, None
        position_B1 = targets_at_BN[:, -1:] + 1
        return hidden_BNC, BodyState(
            cache=cache,
            log_mask_B11S=additive(visible_BNS[:, -1:], inputs_BNC.dtype),
            rows=rows,
            next_mask=0.0 if "states" in self.config.reads else torch.finfo(inputs_BNC.dtype).min,
            position_B1=position_B1,
            target_B1=torch.full_like(position_B1, targets),
            pending_B1P=states_BNP[:, -1:],
        )

    def step(self, inputs_B1C: Tensor, row_B1P: Tensor, state: BodyState) -> Tensor:
        """Run the body for one more target, from the previous target's embedded error; the state moves on.

        The log gains h̄ of the previous target in strict context, h̄ of this target in inclusive context.
        """
        self_mask_111K, log_mask_B11S = state.grow()
        log = (self.states_in(row_B1P), log_mask_B11S, self._positions(state.position_B1 - int(self.is_strict)))
        query = (inputs_B1C, self_mask_111K, self._positions(state.position_B1))
        hidden_B1C = families.run_body(self.body, *query, *log, state.cache)
        state.position_B1 += 1
        state.target_B1 += 1
        return hidden_B1C

    @property
    def unembedding_VC(self) -> Tensor | None:
        """The frozen matrix that the soft head reads, stored once; None for a linear head."""
        if self.config.head != "soft":
            return None
        return self.error_in if self.config.tied else self.unembedding

    def _positions(self, positions: Tensor) -> Tensor:
        if self.config.positions == "none":
            return torch.zeros_like(positions)
        last = families.largest_position(self.body)  # padding behind a target may stand beyond it
        return positions if last is None else positions.clamp_max(last)

    def _log_layers(self) -> list[int]:
        depth = len(families.decoder_layers(self.body))
        layers = list(range(depth)) if PATTERNS[self.config.pattern][0] == "every" else list(range(1, depth, 2))
        if not layers:
            raise ValueError(
                f"copilot layers={depth} with pattern {self.config.pattern}: the first layer keeps self-attention, so "
                f"no layer would read the log; use copilot.layers=2 or more, or copilot.pattern=2"
            )
        return layers


class _LogInput(nn.Module):
    """Brings X̃ or h̄ to one scale and to the Copilot's width before keys and values are taken."""

    def __init__(self, pilot_width: int, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(pilot_width, eps=1e-6)
        self.project = nn.Identity() if pilot_width == width else nn.Linear(pilot_width, width, bias=False)
        if pilot_width != width:
            nn.init.normal_(self.project.weight, std=pilot_width**-0.5)  # rows keep their scale

    def forward(self, rows_BSP: Tensor) -> Tensor:
        return self.project(self.norm(rows_BSP.to(self.norm.weight.dtype)))
