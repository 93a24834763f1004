"""Reports for people (terminal) and programs (JSON)."""
