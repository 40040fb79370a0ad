"""Adapters for code written against other implementations; README.md beside has the tables."""
