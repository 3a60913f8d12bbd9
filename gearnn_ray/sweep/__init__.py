"""Budgets M compared: what a sweep finds, and the job that finds it."""
