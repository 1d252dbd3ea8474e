"""Time of decoding: the stock Pilot, ours at λ = 0, and fused, side by side, with the floor beside it.

    python performance/decode.py [--cases full] [--static] [--device cuda] [--dtype bfloat16] [--json FILE]

Every figure is a ratio of medians measured alternately in one process; every text has its full length. The floor is
what no implementation can beat: the smaller one of the ratio of weight bytes read at each step and the ratio of FLOPs
counted by torch. `overhead` is the fused ratio over the floor. `--static` adds fused decoding with static caches and a
compiled step, for greedy cases; compilation is not part of the time.
"""

import argparse
import itertools
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from models import SIZES, copilot_options, pilot_of
from tables import DECODE, show, write
from timing import DEVICE, Action, flops_of, in_turn
from torch import nn

from tcopilot.models.fused_model import TCopilotModel
from tcopilot.models.modeling import fused_class

CASES = {  # prompt and answer, batch, beams
    "tiny": [((4, 4), 1, 1), ((4, 4), 2, 4)],
    "short": [((128, 16), 8, 1), ((128, 16), 8, 4), ((8, 64), 1, 1), ((256, 8), 8, 1)],
    "gpu": list(itertools.product([(128, 32)], [1, 8, 32], [1, 4])),
    "full": list(itertools.product([(8, 512), (512, 8), (8, 8), (128, 16)], [1, 8, 32], [1, 4])),
}


@dataclass
class Case:
    """One line of the table; `pilot` is ours at λ = 0, both over the stock Pilot's time."""

    architecture: str
    prompt: int
    answer: int
    batch: int
    beams: int
    pilot: float
    fused: float
    floor: float
    milliseconds: float  # of a step of the stock Pilot
    static: float | None = None  # fused, with static caches and a compiled step

    @property
    def overhead(self) -> float:
        """Fused time over the floor."""
        return self.fused / self.floor


def main() -> None:
    """Measure all cases and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", choices=CASES, default="short", help="which shapes, batches and beams")
    parser.add_argument("--static", action="store_true", help="also static caches, which compiles for each shape")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default=DEVICE)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the Pilot, with random weights")
    parser.add_argument("--copilot-layers", type=int, help="depth of the Copilot; the Pilot's unless given")
    parser.add_argument("--architectures", nargs="+", default=["llama", "t5"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    cases = []
    for architecture in arguments.architectures:
        model = _model(architecture, arguments.size, arguments.copilot_layers)
        model = model.to(arguments.device, getattr(torch, arguments.dtype)).eval()
        for (prompt, answer), batch, beams in CASES[arguments.cases]:
            shape = (architecture, prompt, answer, batch, beams)
            case = measure(model, *shape, arguments.repeats, arguments.static)
            cases.append(asdict(case) | {"overhead": case.overhead})
            if not arguments.device.startswith("cuda"):
                del cases[-1]["milliseconds"]
            # A visit that is cut short keeps what it has measured.
            write(arguments.json, {"arguments": vars(arguments) | {"json": None}, "cases": cases})
    what = f"{arguments.size}, {arguments.dtype}, {arguments.device}"
    show(f"Time of decoding over the stock Pilot's, {what}", cases, DECODE)


@torch.no_grad()
def measure(
    model: TCopilotModel, architecture: str, prompt: int, answer: int, batch: int, beams: int, repeats: int,
    static: bool = False,
) -> Case:  # fmt: skip
    """Time the ways alternately on the same prompts."""
    device = next(model.parameters()).device
    ids = torch.randint(3, model.config.pilot.vocab_size, (batch, prompt), device=device)
    options = {"attention_mask": torch.ones_like(ids), "num_beams": beams, "do_sample": False}
    options |= {"max_new_tokens": answer, "min_new_tokens": answer, "pad_token_id": 0, "eos_token_id": 1}

    def ours(weight: float, **more: object) -> None:
        model.weight = weight
        model.generate(ids, **options, **more)

    ways: dict[str, Action] = {
        "stock": lambda: model.pilot.generate(ids, **options),
        "pilot": lambda: ours(0.0),
        "fused": lambda: ours(1.0),
    }
    if static and beams == 1:
        ways["static"] = lambda: ours(1.0, cache_implementation="static")
    medians = in_turn(ways, repeats)
    floor = min(flops_of(ways["fused"]) / flops_of(ways["stock"]), _bytes(model, True) / _bytes(model, False))
    return Case(
        architecture, prompt, answer, batch, beams, medians["pilot"] / medians["stock"],
        medians["fused"] / medians["stock"], floor, 1000 * medians["stock"] / answer,
        medians["static"] / medians["stock"] if "static" in medians else None,
    )  # fmt: skip


def _bytes(model: TCopilotModel, fused: bool) -> int:
    """Bytes of the weights that every step reads; an input embedding is looked up, not read."""
    pilot = model.pilot
    parts: list[nn.Module] = [pilot.get_decoder(), pilot.get_output_embeddings()]
    if fused:
        parts += [model.copilot]
    parameters = {id(p): p for part in parts for p in part.parameters()}
    parameters.pop(id(pilot.get_input_embeddings().weight), None)
    output = pilot.get_output_embeddings().weight
    return sum(p.numel() * p.element_size() for p in parameters.values()) + (
        output.numel() * output.element_size() if id(output) not in parameters else 0
    )


def _model(architecture: str, size: str, copilot_layers: int | None) -> TCopilotModel:
    model = fused_class(architecture == "t5").from_pilot(
        pilot_of(architecture, size), layers=copilot_layers, **copilot_options(size)
    )
    nn.init.normal_(next(model.copilot.head.parameters()), std=0.02)
    return model


if __name__ == "__main__":
    main()
