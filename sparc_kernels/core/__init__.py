"""Shared by every room and importing none of them: torch alone."""
