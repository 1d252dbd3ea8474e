"""Train a Pilot and its Copilot: `python train.py [group=value …] [key=value …]`."""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from tcopilot.app.checks.groups import refuse_values_for_group_names
from tcopilot.app.run import train


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg: DictConfig) -> float:
    """Train a Pilot and its Copilot; see configs/train.yaml."""
    return train(cfg)


if __name__ == "__main__":
    refuse_values_for_group_names(Path(__file__).with_name("configs"))
    main()
