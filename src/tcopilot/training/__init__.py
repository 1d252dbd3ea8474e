"""Algorithm 1: the joint round of Pilot and Copilot, its objectives, states and callbacks."""
