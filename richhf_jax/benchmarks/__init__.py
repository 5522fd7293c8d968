"""Benchmarks: what is printed are ratios within one run, as machines and their loads differ."""
