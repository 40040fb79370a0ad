"""What a person runs: `python -m scripts.quickstart`, `python -m scripts.train`."""
