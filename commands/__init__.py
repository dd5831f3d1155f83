"""Commands of generate.py, one file each: parse, make, run."""
