"""Evaluate an exported run: `python eval.py run=<run dir> [fusion.weight=…] [data=…]`."""

import hydra
from omegaconf import DictConfig

from tcopilot.app.run import evaluate


@hydra.main(version_base="1.3", config_path="configs", config_name="eval")
def main(cfg: DictConfig) -> float:
    """Evaluate an exported run; see configs/eval.yaml."""
    return evaluate(cfg)


if __name__ == "__main__":
    main()
