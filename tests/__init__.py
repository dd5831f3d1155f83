"""The tests; conftest.py runs the scripts as a user would."""
