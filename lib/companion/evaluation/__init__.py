"""Metrics, claims, tables, parity with the authors' code."""
