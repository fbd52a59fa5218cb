"""Metric writers, throughput and memory, the record of a run's environment."""
