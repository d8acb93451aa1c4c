"""The page at `/`: the pipeline as it is now, and a chat that shows where each request went."""
