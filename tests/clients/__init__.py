"""Tests in the code of other projects."""
