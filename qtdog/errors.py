"""The one exception for mistakes that a user can mend; the command line prints it as one line and exits with 2."""


class UserError(Exception):
    """Names the thing that is wrong and the way out, in one line."""
