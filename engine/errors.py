"""The one exception the command line shows as a line instead of a traceback."""


class UserError(ValueError):
    """Something the user can fix: the message says what was expected, what was found and the fix."""


class OtherRankFailed(UserError):
    """Another rank has said what is wrong."""


class Diverged(UserError):
    """The weights of a run are broken (not finite, or far too large). Earlier checkpoints may still be good."""
