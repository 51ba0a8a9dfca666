"""Judges: what a picture shows, or how a set of pictures looks, as a number with an interval."""
