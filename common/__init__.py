"""What the three scripts share: the README has a map."""
