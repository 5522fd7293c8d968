"""Benchmarks. They print ratios within one run, because machines and their loads differ."""
