"""Controls: models without a Copilot that a gain is held against, trained beside the run."""
