"""Page, tables and figures of evaluations: draws numbers and findings, decides nothing; never models, never torch."""

from drkl.reporting.page import report
from drkl.reporting.picture import write_picture

__all__ = ["report", "write_picture"]
