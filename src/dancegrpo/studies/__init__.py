"""Studies: the paper's comparisons in miniature, as data, and the command that re-runs them (`dancegrpo reproduce`)."""

from dancegrpo.studies.pages import markdown_table, markdown_tables, write_index, write_page
from dancegrpo.studies.reproduce import Outcome, reproduce, studies_named
from dancegrpo.studies.results import Result, read_results
from dancegrpo.studies.study import Arm, Claim, Condition, Study, load_study, study_names

__all__ = [
    "Arm",
    "Claim",
    "Condition",
    "Outcome",
    "Result",
    "Study",
    "load_study",
    "markdown_table",
    "markdown_tables",
    "read_results",
    "reproduce",
    "studies_named",
    "study_names",
    "write_index",
    "write_page",
]
