"""Measuring edits: every score, the tables and statistics made of them.

    stream -> StreamProbe (before) -> edits -> Measured -> Scores -> results.json -> report

metrics, words, reading: is a prompt answered as wanted. stream, lifelong: a whole stream.
results, report, statistics: what is written and shown. perplexity, probes: beside the edits.
"""
