"""The two ways in which a command can end badly; `jaxbp.cli` turns each into one line and an exit status."""


class UserError(Exception):
    """Something the user can mend: a bad key, value, file or folder. One line; the command exits with 2."""


class Diverged(Exception):
    """The loss became NaN or infinite. One line that says where; the command exits with 3."""
