"""The config of a fused model: its Pilot's own, its Copilot's architecture, and how both are fused."""

import copy

from transformers import AutoConfig, PreTrainedConfig

from tcopilot.models.base_copilot import FORMAT
from tcopilot.models.decoding import FEEDBACKS
from tcopilot.models.fusion import FusionRule, ProbabilityFusion, build_fusion, check_weight
from tcopilot.settings import one_of, require

WANTED = "give the export folder of a run, or a folder that save_pretrained of a fused model and its tokenizer wrote"
"""How error messages of programs that read a fused model tell which folder to give."""


class TCopilotConfig(PreTrainedConfig):
    """Config of a fused model: the Pilot's own config, the Copilot's architecture and how both are fused.

    Pilot and Copilot may be configs or their dictionaries; without a Copilot the model is the Pilot alone. `fusion` is
    a rule or its settings, the dotted path of its class among them; None is Eq. 8. λ = 0 is the Pilot, exactly.
    Feedback is `observed`, or `own` (Algorithm 2 as written). An export of a quantised Pilot lacks its weights:
    `base` gives `path` and `revision` of the model that they are loaded from.
    """

    model_type = "t_copilot"
    sub_configs = {"pilot": AutoConfig}
    has_no_defaults_at_init = True

    def __init__(self, pilot=None, copilot=None, fusion=None, weight=1.0, feedback="observed", base=None, **kwargs):
        if isinstance(pilot, dict):
            pilot = AutoConfig.for_model(**pilot)
        # A copy: transformers resets the attention implementation of the configs inside a composite one, and a live
        # model whose config loses it builds no masks and turns non-causal.
        pilot = copy.deepcopy(pilot)
        if hasattr(copilot, "to_dict"):
            copilot = copilot.to_dict()
        if copilot is not None and copilot.get("format") != FORMAT:
            raise ValueError(
                f"this model's Copilot has weights of format {copilot.get('format', 1)}, and this version of tcopilot "
                f"reads format {FORMAT}; use the version that saved it, or train it again"
            )
        fusion = ProbabilityFusion() if fusion is None else fusion
        self.fusion = fusion.settings() if isinstance(fusion, FusionRule) else fusion
        build_fusion(self.fusion)
        if pilot is not None:
            tokens = [f"{name}_token_id" for name in ("pad", "bos", "eos", "decoder_start")]
            shared = {name: getattr(pilot, name, None) for name in (*tokens, "is_encoder_decoder")}
            kwargs = {**shared, "tie_word_embeddings": False, **kwargs}
        self.pilot = pilot
        self.copilot = copilot
        self.weight = weight
        self.feedback = feedback
        self.base = base
        super().__init__(**kwargs)

    def __setattr__(self, name, value):
        """Set a value; λ and feedback are checked, since `from_pretrained` sets those given to it one by one."""
        if name == "weight":
            value = check_weight(value, "fusion.weight")
        elif name == "feedback":
            require({"fusion.feedback": one_of(FEEDBACKS)}, {"fusion.feedback": value})
        super().__setattr__(name, value)

    def get_text_config(self, decoder=None, encoder=None):
        """The Pilot's config, from which generation reads cache shapes and vocabulary size."""
        return self if self.pilot is None else self.pilot
