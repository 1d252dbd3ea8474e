"""The programs: from a config to a finished run."""
