"""Measuring: one file per benchmark."""
