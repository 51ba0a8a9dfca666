"""Scenes of two or three emoji, in which it can be said exactly whether a picture shows what its caption says."""
