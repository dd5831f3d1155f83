"""Tests of functions and classes: no script, no process."""
