"""Tests that run the scripts and programs as a user would."""
