"""Figures of evaluations."""
