"""Stage ppo: sample, score, estimate advantages, update."""
