"""Tables, figures and the HTML page of a run: reads run folders, never models, never torch."""

from drkl.reporting.html import write_report
from drkl.reporting.picture import write_picture

__all__ = ["write_picture", "write_report"]
