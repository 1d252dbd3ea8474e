"""The Mistake Log: what the Pilot read, thought and got wrong, round after round."""
