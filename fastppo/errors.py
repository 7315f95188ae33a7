"""What the program says when it cannot go on."""


class UserError(Exception):
    """Something the user can mend: one line that names the thing and the cure. Exit code 2."""


class TrainingStopped(Exception):
    """A run that would only learn nonsense from here on: one line, and the likeliest cause.

    Exit code 1: the input was fine, the run was not.
    """
