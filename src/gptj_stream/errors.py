"""The one exception family for a user's mistakes."""


class UserError(ValueError):
    """Input the user can mend: the message is one line that names the value, the limit and the fix.

    The command line prints it without a traceback and exits with code 2.
    """
