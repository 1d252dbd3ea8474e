"""The Mistake Log: what the Pilot read (X̃), its hidden states (h) and its errors (ℓ), round by round."""
