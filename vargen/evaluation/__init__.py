"""Evaluation: runs, work that is shared and resumed, reports."""
