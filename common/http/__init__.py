"""The HTTP side of the frontend: serving, admission, limits, one exchange."""
