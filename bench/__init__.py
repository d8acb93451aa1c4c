"""How fast the pipeline is, next to others, in one run: `python -m bench cpu` and `python -m bench gpu`."""
