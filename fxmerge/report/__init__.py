"""The reports of an analysis and of a merge: tables, JSON and pictures."""
