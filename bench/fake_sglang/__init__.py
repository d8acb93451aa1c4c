"""A stand-in for `sglang.Engine` inside the real engine.py, so that only the pipeline is measured.

`python -m bench.fake_sglang engine.py --model-path ...` runs the script with SGLang's own argument parsing and with
this package's `Engine` in the place of SGLang's.
"""
