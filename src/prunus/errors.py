"""The two errors that a command ends with in one sentence, without a traceback."""


class UserError(ValueError):
    """Bad input: one sentence saying what was given, what is allowed and what to do.

    The command line prints the sentence on stderr and exits with code 2; no traceback.
    """


class EngineError(RuntimeError):
    """What an engine did that is no mistake of the user: it died, hung, answered nonsense or computed something else.

    The command line prints the sentence on stderr, with what the engine said last, and exits with code 1; no traceback.
    """
