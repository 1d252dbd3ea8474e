"""Theorem 4.1, measured on finished runs."""
