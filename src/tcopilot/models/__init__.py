"""Pilot, Copilot and the fused model: what runs forward passes."""
