"""llama.cpp's own server tests, run against `outpace serve`: `python -m tools.llamacpp_tests`."""
