"""The parts of `bench/mixed_soak.py`, one idea each; the script says how they work together."""
