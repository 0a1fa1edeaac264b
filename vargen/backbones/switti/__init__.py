"""Switti."""
