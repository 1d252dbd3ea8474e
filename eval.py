"""Evaluate an exported run: `python eval.py run=<run dir> [fusion.weight=…] [data=…]`."""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from tcopilot.app.checks.groups import refuse_values_for_group_names
from tcopilot.app.run import evaluate


@hydra.main(version_base="1.3", config_path="configs", config_name="eval")
def main(cfg: DictConfig) -> float:
    """Evaluate an exported run; see configs/eval.yaml."""
    return evaluate(cfg)


if __name__ == "__main__":
    refuse_values_for_group_names(Path(__file__).with_name("configs"))
    main()
