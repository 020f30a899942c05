"""A gradient checker for hand-written backward passes, ours and anyone's: `jaxbp.check`."""

from jaxbp.checker.check import check
from jaxbp.checker.data import inputs
from jaxbp.checker.report import CheckFailed, Report, Row

__all__ = ["CheckFailed", "Report", "Row", "check", "inputs"]
