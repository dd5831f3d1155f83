"""Code files: the indices of a whole image set, entropy-coded, with their frequency tables.

Layout, numbers little-endian: MAGIC; length (u32) and text of a JSON header; length (u32) and bytes
of the frequency tables (LZMA); the chunks, each with the number of its words (u32), the CRC-32 of
its indices (u32) and the words (u32 each) of a range coder; the SHA-256 of everything before.
"""
