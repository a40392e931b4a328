"""Other people's harnesses, run on our systems."""
