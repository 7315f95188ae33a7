"""Stage rm: a reward model from pairs of better and worse answers."""
