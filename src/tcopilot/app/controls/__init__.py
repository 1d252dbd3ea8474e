"""Controls: models without a Copilot, trained beside the run, that a gain is compared with."""
