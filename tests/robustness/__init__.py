"""Tests with damaged input, killed processes and long runs."""
