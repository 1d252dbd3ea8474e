"""Whether a run fits into memory."""
