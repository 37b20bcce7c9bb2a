"""A page that shows a dense model and what pruning made of it: one HTML file, without network and without scripts."""

from .answers import Answers, compare_answers
from .pictures import Pictures
from .shapes import Budget, budgets_of
from .write import write_page

__all__ = ["Answers", "Budget", "Pictures", "budgets_of", "compare_answers", "write_page"]
