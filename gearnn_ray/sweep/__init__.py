"""Comparison of several budgets M over the levels of a release."""
