"""The work that ships with ZeroG: each folder is one application."""
