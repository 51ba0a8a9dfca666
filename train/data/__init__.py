"""Captioned pictures: readers of folders, and the builders that write such folders."""
