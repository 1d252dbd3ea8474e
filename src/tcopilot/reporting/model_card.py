"""The model card of an export: package, Pilot, data, λ, the gain, and the controls to compare the gain with."""

from collections.abc import Mapping
from pathlib import Path

import yaml
from transformers import PreTrainedConfig

from tcopilot.data.metrics import show, show_difference
from tcopilot.evaluation.results import Results
from tcopilot.models.quantization import bits_of
from tcopilot.reporting.tables import markdown_table
from tcopilot.version import __version__

NO_CONTROL = (
    "No control was run. A gain over the Pilot of the same run does not show that training a Copilot is better than "
    "spending the same time on training the Pilot."
)


ALONE = (
    "This folder holds the Copilot alone, as its run was judged by a recording and never loaded the Pilot. "
    "`python eval.py run=<run>` evaluates it on its Pilot, and `python train.py resume=<run> "
    "evaluation.modes=[generation]` writes both models here."
)


def model_card(
    results: Results, pilot_path: str | None, pilot_config: PreTrainedConfig, is_alone: bool = False
) -> str:
    """Write the card in Markdown, with the header that model hubs read.

    Args:
        results: the results of the run that made the export.
        pilot_path: the origin of the Pilot: a Hub id, a folder, of which only the name is written, or None for a
            model built from a config.
        pilot_config: the Pilot's config.
        is_alone: whether the export holds the Copilot without the Pilot.
    """
    is_pair = pilot_config.is_encoder_decoder
    header = {"library_name": "tcopilot", "tags": ["transformer-copilot"]}
    header["pipeline_tag"] = "text2text-generation" if is_pair else "text-generation"
    pilot = f"a {pilot_config.model_type} built from a config"
    if pilot_path is not None:
        is_local = Path(pilot_path).exists()
        pilot = Path(pilot_path).resolve().name if is_local else pilot_path
        header |= {} if is_local else {"base_model": pilot}
    if (bits := bits_of(pilot_config)) is not None:
        pilot += f", quantised to {bits}, whose weights are not in this folder"
    auto = f"AutoModelFor{'Seq2SeqLM' if is_pair else 'CausalLM'}"
    usage = (
        f"```python\nimport tcopilot\nfrom transformers import {auto}, AutoTokenizer\n\n"
        f'model, tokenizer = {auto}.from_pretrained("."), AutoTokenizer.from_pretrained(".")\n'
        f"model.weight = 0.0  # λ; 0 is the Pilot alone\n```"
    )
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# Pilot and Copilot from {pilot}",
        f"A Pilot and the Copilot that corrects its token distributions ([Transformer Copilot]"
        f"(https://arxiv.org/abs/2505.16270)), made by the package tcopilot {__version__}, which loads them.",
        markdown_table(["", ""], _about(results, pilot)),
        ALONE if is_alone else usage,
        f"## Gain on {results.reported_on}\n\n{_gain(results)}",
        f"## Controls\n\n{_controls(results)}",
    ]
    if results.notes:
        parts.append("## Notes\n\n" + "\n".join(f"- {note}" for note in results.notes))
    return "\n\n".join(parts) + "\n"


def _about(results: Results, pilot: str) -> list[list[str]]:
    rows = {name: part["rows"] for name, part in results.data.items() if "rows" in part}
    weight = results.selected_weight
    weight = weight if isinstance(weight, Mapping) else {"": weight}
    told = ", ".join(f"{value:g} {f'({name})' if name else ''}".rstrip() for name, value in weight.items())
    return [
        ["Pilot", f"{pilot}, {results.params.get('pilot', 0):,} parameters"],
        ["Copilot", f"{results.params.get('copilot', 0):,} parameters"],
        ["Data", "; ".join(f"{name}: {count:,} rows" for name, count in rows.items())],
        ["λ", f"{told}, {results.choice}"],
        ["Training", f"{results.rounds:,} rounds, {results.train_seconds:,.0f} s, seed {results.seed}"],
        ["Code", results.git],
    ]


def _gain(results: Results) -> str:
    head = ["benchmark", "metric", "Pilot", "Pilot + Copilot", "difference [95 %]", "verdict"]
    rows = [
        [
            *(one.benchmark, one.metric, show(one.pilot, one.unit), show(one.fused, one.unit)),
            show_difference(one.difference, one.unit, one.ci95),
            one.verdict,
        ]
        for one in results.gain
    ]
    return markdown_table(head, rows)


def _controls(results: Results) -> str:
    if not results.controls:
        return NO_CONTROL
    head = ["control", "benchmark", "metric", "value", "rounds", "seconds"]
    rows = [
        [
            *(one.name, one.benchmark, one.metric, show(one.value, one.unit)),
            *(f"{one.rounds:,}", f"{one.train_seconds:,.0f}"),
        ]
        for one in results.controls
    ]
    return markdown_table(head, rows)
