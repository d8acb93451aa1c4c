"""What the three scripts share: see the README for a map of these modules."""
