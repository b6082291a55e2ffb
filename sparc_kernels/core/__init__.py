"""Used by every other folder and importing none of them: torch only."""
