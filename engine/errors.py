"""The one exception the command line shows as a line instead of a traceback."""


class UserError(ValueError):
    """Something the user can fix: the message says what was expected, what was found and the fix."""


class OtherRankFailed(UserError):
    """Another rank has said what is wrong."""


class Diverged(UserError):
    """The weights of a run are broken (not finite, or far too large). Earlier checkpoints may still be good."""


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def fault_of(error: Exception) -> str:
    """One line, with the fix where it is a flag."""
    lines = str(error).strip().splitlines() or [""]
    said = lines[0] if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {lines[0]}"
    if "trust_remote_code" in str(error):
        return f"{said.rstrip('.')}. Read that code, then give --trust_remote_code true to run it"
    return said
