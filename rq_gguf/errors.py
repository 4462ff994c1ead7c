"""The one exception that users see."""


class UserError(Exception):
    """A bad input: one sentence that names the file, tensor or option and says what to do. The CLI exits with status 2."""
