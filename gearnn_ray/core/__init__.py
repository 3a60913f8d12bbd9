"""Errors and events, which all rooms use. Imports no other room."""
