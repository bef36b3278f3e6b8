"""The one exception for mistakes a user can mend."""


class UserError(ValueError):
    """Bad input: one sentence saying what was given, what is allowed and what to do.

    The command line prints the sentence on stderr and exits with code 2; no traceback.
    """
