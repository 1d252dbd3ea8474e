"""What models show before their weights load: families, sizes, depths, adapters, vocabularies.

Model configs and tokenizers are read here, weights are not.
"""

from hydra.utils import instantiate
from omegaconf import DictConfig
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from tcopilot.app.checks.controls import trains_frozen
from tcopilot.app.checks.problems import attempt
from tcopilot.app.checks.quantised import stored_problems
from tcopilot.models import families
from tcopilot.models.adapters import Lora, projections
from tcopilot.models.family_check import check_family
from tcopilot.models.pilot import ModelSource, ModelSourceError
from tcopilot.settings import is_whole


def source_problems(cfg: DictConfig, *sources: ModelSource | None) -> list[str]:
    """Models whose config cannot be read or built, or whose family is not supported; their weights are not read."""
    takes_layers = cfg.copilot.enabled and "layers" in cfg.copilot  # or it is only a head
    problems = []
    for source in filter(None, sources):
        found: list[str] = []
        key = f"{source.key}.config" if source.path is None else f"{source.key}.path={source.path}"
        attempt(found, lambda source=source, found=found: found.extend(_size_problems(source)), key)
        if not found:
            attempt(found, lambda source=source: check_family(source.model_config, takes_layers), key)
        problems += found
    return problems


def model_problems(cfg: DictConfig, pilot: ModelSource, donor: ModelSource | None) -> list[str]:
    """Problems of models that can be read: a Copilot too deep or too flat, adapters without a place."""
    config = pilot.model_config
    problems = stored_problems(cfg, pilot) + _adapter_problems(cfg, "pilot", config)
    if trains_frozen(cfg) and not projections(families.skeleton(config).get_decoder()):
        problems.append(
            f"control={cfg.control}: a frozen Pilot is trained by LoRA on its linear layers, and {config.model_type} "
            f"has none; use control=calibrated or null"
        )
    if not cfg.copilot.enabled:
        return problems
    if donor is not None and (trained := donor.trained_copilot) is not None:  # which brings its architecture
        if "layers" not in cfg.copilot and trained.get("kind", "decoder") != cfg.copilot.kind:
            kinds = (
                f"its trained Copilot is of kind {trained.get('kind', 'decoder')}, but copilot.kind={cfg.copilot.kind}"
            )
            problems.append(
                f"copilot.path={donor.path}: {kinds}; choose copilot=<name> of its kind, or another export"
            )
        return problems
    if "layers" not in cfg.copilot:
        if donor is not None:
            problems.append(
                f"copilot.path={donor.path}: a Copilot that is only a head starts without a checkpoint; leave it out"
            )
        if cfg.copilot.adapter:
            problems.append(
                "copilot.adapter: a Copilot that is only a head has nothing to adapt; use copilot.adapter=null"
            )
        return problems
    model = pilot if donor is None else donor
    depth = families.decoder_depth(model.model_config)
    layers = cfg.copilot.layers
    share = isinstance(layers, float) and 0 < layers <= 1
    if not (layers is None or share or (is_whole(layers) and 1 <= layers <= depth)):
        problems.append(
            f"copilot.layers={layers}: the {model.model_config.model_type} decoder of {model.key} has {depth} layers; "
            f"use 1 to {depth}, a share of them such as 0.5, or null for all"
        )
    elif cfg.copilot.pattern != 2 and not pilot.is_encoder_decoder and (copilot_layers(layers, depth) or depth) < 2:
        problems.append(
            f"copilot.layers={layers} of {depth} with copilot.pattern={cfg.copilot.pattern}: the first layer of a "
            f"decoder-only Copilot keeps self-attention, so no layer would read the log; use at least 2 layers or "
            f"copilot.pattern=2"
        )
    return problems + _adapter_problems(cfg, "copilot", model.model_config)


def tokenizer_problems(pilot: ModelSource, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A tokenizer with more words than the model has rows for."""
    words, rows = len(tokenizer), pilot.model_config.vocab_size
    found = (
        f"its tokenizer has {words} tokens, but its model only {rows} rows; give a folder where both belong together"
    )
    return [f"pilot.path={pilot.path}: {found}"] if words > rows else []


def donor_problems(pilot: ModelSource, donor: ModelSource, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A checkpoint for the Copilot that cannot read the Pilot's tokens; its own tokenizer must be the Pilot's.

    Call it after the Pilot's tokenizer was made, from which a Pilot built from a config takes its vocabulary.
    """
    ours, theirs = pilot.model_config, donor.model_config
    try:
        words = donor.tokenizer().get_vocab()
    except ModelSourceError:
        words = None
    fits = len(tokenizer) <= theirs.vocab_size if words else ours.vocab_size == theirs.vocab_size
    problem, trained = None, donor.trained_copilot
    reads = None if trained is None else (trained["pilot_width"], trained["vocab_size"])
    if reads not in (None, (ours.hidden_size, ours.vocab_size)):
        problem = (
            f"its trained Copilot reads a Pilot of width {reads[0]} with {reads[1]} tokens, and this one has "
            f"{ours.hidden_size} and {ours.vocab_size}; choose a Pilot like that it was trained with"
        )
    elif ours.model_type != theirs.model_type or not fits:
        problem = (
            f"{theirs.model_type} with {theirs.vocab_size} tokens cannot read a {ours.model_type} Pilot with "
            f"{ours.vocab_size} tokens; choose a checkpoint of the same family and tokenizer"
        )
    elif words and words != tokenizer.get_vocab():
        problem = (
            "its tokenizer has other tokens than the Pilot's; choose a checkpoint with the Pilot's tokenizer (the "
            "matrices may differ in padding rows)"
        )
    return [] if problem is None else [f"copilot.path={donor.path}: {problem}"]


def copilot_layers(layers: int | float | None, depth: int) -> int | None:
    """A depth as it is, or a share of the Pilot's (0.5 is half, at least one layer).

    >>> copilot_layers(0.5, 12), copilot_layers(3, 12), copilot_layers(None, 12)
    (6, 3, None)
    """
    return max(1, round(layers * depth)) if isinstance(layers, float) else layers


def _size_problems(source: ModelSource) -> list[str]:
    """Sizes that no model can have; a config of one's own is also built, without memory."""
    config, given = source.model_config, source.config or {}
    heads, groups = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    where = f"{source.key}.config" if source.path is None else f"{source.key}.path={source.path}: config.json"
    if heads and groups and (groups < 1 or heads % groups):
        return [f"{where}: num_key_value_heads={groups} does not divide num_attention_heads={heads}; choose a divisor"]
    if source.path is not None:
        return []
    problems = [
        f"{where}.{name}={value}: must be at least 1"
        for name, value in given.items()
        if is_whole(value) and value < 1 and (name.startswith(("num_", "d_")) or name.endswith(("_size", "_dim")))
    ]
    known = type(config)()
    problems += [
        f"{where}.{name}={value}: {config.model_type} has no such setting; look up its name in {type(config).__name__}"
        for name, value in given.items()
        if not hasattr(known, name)
    ]
    if problems:
        return problems
    try:
        families.skeleton(config)
    except Exception as error:  # what a library says to values of the user's own, of any kind
        return [f"{where}={given}: no {config.model_type} can be built of it ({type(error).__name__}: {error})"]
    return []


def _adapter_problems(cfg: DictConfig, key: str, config: PreTrainedConfig) -> list[str]:
    node = cfg[key].adapter
    if not node:
        return []
    problems: list[str] = []

    def check() -> None:
        adapter = instantiate(node, _convert_="all")
        if isinstance(adapter, Lora):
            adapter.check(families.skeleton(config) if key == "pilot" else families.skeleton(config).get_decoder())

    attempt(problems, check, f"{key}.adapter")
    return problems
